# SPDX-License-Identifier: Apache-2.0
"""A correction of a frozen network to a site: a small set of numbers for its input, norm layers and output."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mgipt_monai.networks.alignment.layers import has_stored_statistics, stored_statistics
from mgipt_monai.networks.prompts.frequency import LowFrequencies
from mgipt_monai.utils.state_checks import check_finite, check_keys, check_number, check_tensor

__all__ = ["Correction", "NormShift", "ShiftedNorm", "input_statistics", "is_shifted"]


@dataclass(frozen=True)
class NormShift:
    """How far the statistics of one norm layer move from the layer's own to the site's.

    Attributes:
        share: of the mean and of the logarithm of the deviation, (2,); 0 keeps the layer's own statistics (stored by
            batch norm, or the image's), 1 takes the site's.
        mean: mean over the site's labelled images of a channel's or, for group norm, a group's mean, (C,).
        std: geometric mean of the deviations, including the layer's eps, (C,).
    """

    share: Tensor
    mean: Tensor
    std: Tensor

    def between(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation between the layer's own, (..., C), and the site's."""
        own = self.mean.to(mean), self.std.to(std)
        return torch.lerp(mean, own[0], self.share[0]), torch.lerp(std.log(), own[1].log(), self.share[1]).exp()


@dataclass(frozen=True)
class Correction:
    """A correction of a frozen network to a site. Each part can be absent; without any, nothing changes, not a bit.

    Attributes:
        offset: added to the logits, one number per output channel, (K,).
        temperature: the logits are divided by it, after the offset; above 0. It changes no mask.
        prompts: multi-scale site prompts, (1, C, \\*sides) each, which act together: the image plus the change by each
            prompt (Eq. 1).
        norms: dotted name to shift of the statistics of norm layers.
    """

    offset: Tensor | None = None
    temperature: float = 1.0
    prompts: tuple[Tensor, ...] = ()
    norms: Mapping[str, NormShift] = field(default_factory=dict)

    def to_image(self, image: Tensor) -> Tensor:
        """Apply the prompts to images (B, C, \\*spatial); without prompts, the same tensor is returned."""
        changed = image
        for prompt in self.prompts:
            changed = changed + LowFrequencies(image, prompt.shape[-1]).apply(prompt.to(image.device)) - image
        return changed

    def to_logits(self, logits: Tensor) -> Tensor:
        """Apply offset and temperature to logits (B, K, \\*spatial)."""
        if self.offset is not None:
            logits = logits + self.offset.to(logits).view(1, -1, *[1] * (logits.ndim - 2))
        return logits if self.temperature == 1 else logits / self.temperature

    def to_network(self, network: nn.Module) -> nn.Module:
        """Return a corrected copy that shares all parameters; the same network if there is nothing to correct.

        Batch norm gets other stored statistics. Instance and group norm get a hook that moves the image's statistics.

        Raises:
            ValueError: if the network lacks a layer, or it has other channels.
        """
        norms = {name: shift for name, shift in self.norms.items() if shift.share.any()}
        if not norms:
            return network
        shared = {id(parameter): parameter for parameter in network.parameters()}
        corrected = copy.deepcopy(network, shared)
        layers = dict(corrected.named_modules())
        for name, shift in norms.items():
            layer = layers.get(name)
            if layer is None or not is_shifted(layer) or _channels(layer) != len(shift.mean):
                raise ValueError(f"the network has no norm layer {name} with {len(shift.mean)} channels to correct")
            if has_stored_statistics(layer):
                eps: float = layer.eps
                mean, variance = stored_statistics(layer)
                new_mean, new_std = shift.between(mean, (variance + eps).sqrt())
                mean.copy_(new_mean)
                variance.copy_((new_std.square() - eps).clamp(min=0))
            else:
                layer.register_forward_hook(ShiftedNorm(shift))
        return corrected

    def state(self) -> dict[str, Any]:
        """Return it as tensors (on the CPU) and plain types."""
        return {
            "offset": None if self.offset is None else self.offset.detach().cpu().clone(),
            "temperature": self.temperature,
            "prompts": [prompt.detach().cpu().clone() for prompt in self.prompts],
            "norms": {
                name: {key: getattr(shift, key).detach().cpu().clone() for key in ("share", "mean", "std")}
                for name, shift in self.norms.items()
            },
        }

    @classmethod
    def from_state(cls, state: Any) -> Correction:
        """Return what :meth:`state` was called on.

        Raises:
            ValueError: if the state does not fit.
        """
        check_keys("correction", state, {"offset", "temperature", "prompts", "norms"})
        check_number("temperature", state["temperature"], least=1e-3, most=1e3)
        check_keys("norms", state["norms"], set())
        if not isinstance(state["prompts"], (list, tuple)):
            raise ValueError("the correction's prompts must be a list")
        norms = {}
        for name, shift in state["norms"].items():
            check_keys(f"shift of {name}", shift, {"share", "mean", "std"})
            for key in ("share", "mean", "std"):
                check_tensor(f"{key} of {name}", shift[key])
                check_finite(f"{key} of {name}", shift[key])
            if shift["share"].shape != (2,) or shift["mean"].ndim != 1 or shift["mean"].shape != shift["std"].shape:
                raise ValueError(f"the correction's shift of {name} has another shape")
            if (shift["std"] <= 0).any():
                raise ValueError(f"the correction's deviations of {name} must be above 0")
            norms[name] = NormShift(shift["share"], shift["mean"], shift["std"])
        for prompt in state["prompts"]:
            check_tensor("prompt", prompt)
            check_finite("prompt", prompt)
            if prompt.ndim < 3 or len(prompt) != 1:
                raise ValueError(f"a prompt of the correction has the shape {tuple(prompt.shape)}")
        if state["offset"] is not None:
            check_tensor("offset", state["offset"])
            check_finite("offset", state["offset"])
            if state["offset"].ndim != 1:
                raise ValueError("the correction's offset must be one number per output channel")
        return cls(state["offset"], float(state["temperature"]), tuple(state["prompts"]), norms)

    @property
    def digest(self) -> str:
        """SHA-256 of all its numbers, as 64 hexadecimal digits."""
        digest = hashlib.sha256(repr(self.temperature).encode())
        tensors = [*([] if self.offset is None else [self.offset]), *self.prompts]
        for name, shift in sorted(self.norms.items()):
            digest.update(name.encode())
            tensors += [shift.share, shift.mean, shift.std]
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def numbers(self) -> dict[str, int]:
        """How many numbers each part has that was fitted (``statistics`` counts those that were measured)."""
        return {
            "offset": 0 if self.offset is None else self.offset.numel(),
            "prompts": sum(prompt.numel() for prompt in self.prompts),
            "norms": 2 * len(self.norms),
            "statistics": sum(2 * len(shift.mean) for shift in self.norms.values()),
        }


def is_shifted(layer: nn.Module) -> bool:
    """Whether a layer's statistics can be shifted: batch, instance or group norm."""
    return isinstance(layer, (_NormBase, nn.GroupNorm))


def _channels(layer: nn.Module) -> int:
    return layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features  # type: ignore[return-value]


def input_statistics(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (with eps) of a layer's input by image and channel or group, (B, C)."""
    groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else x.shape[1]
    variance, mean = torch.var_mean(x.reshape(len(x), groups, -1), dim=2, correction=0)
    return mean, (variance + layer.eps).sqrt()  # type: ignore[operator]


class ShiftedNorm:
    """Forward hook of a norm layer that normalises with shifted statistics."""

    def __init__(self, shift: NormShift) -> None:
        self.shift = shift

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return what replaces the layer's output."""
        x = inputs[0]
        if has_stored_statistics(layer):
            stored_mean, variance = stored_statistics(layer)
            own = stored_mean[None], (variance + layer.eps).sqrt()[None]  # type: ignore[operator]
        else:
            own = input_statistics(layer, x)
        mean, std = self.shift.between(*own)
        if isinstance(layer, nn.GroupNorm):
            width = x.shape[1] // layer.num_groups
            mean, std = mean.repeat_interleave(width, dim=1), std.repeat_interleave(width, dim=1)
        weight, bias = cast("tuple[Tensor | None, Tensor | None]", (layer.weight, layer.bias))
        scale = std.reciprocal() if weight is None else weight / std
        offset = -mean * scale if bias is None else bias - mean * scale
        shape = (*scale.shape, *[1] * (x.ndim - 2))
        return x * scale.view(shape) + offset.view(shape)
