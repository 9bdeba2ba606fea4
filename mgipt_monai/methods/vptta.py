# SPDX-License-Identifier: Apache-2.0
"""VPTTA, the predecessor of MGIPT: one prompt per image, initialised from those of similar images in a memory."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mgipt_monai.methods.base import AdaptationMethod, Prediction
from mgipt_monai.networks.alignment.norms import AlignedNorms, BlendedNorms
from mgipt_monai.networks.alignment.source_statistics import SourceStatistics, read_statistics
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.networks.prompts.frequency import (
    LowFrequencies,
    Offset,
    check_channels,
    check_offset,
    check_step,
    check_tuning,
    loss_gradients,
    prompt_offset,
)
from mgipt_monai.utils.state_checks import check_finite, check_tensors, is_whole

__all__ = ["VPTTA"]

Start = Literal["memory", "latest"]

TEMPERATURE = 0.2
"""Temperature of the softmax over the neighbours' similarities."""


class VPTTA(AdaptationMethod):
    """Visual prompt-based test-time adaptation (Chen et al., "Each Test Image Deserves A Specific Prompt", CVPR 2024).

    Adapts one low-frequency amplitude prompt per image, by one Adam step on the alignment loss; the network is frozen.
    Layers normalise with, and are aligned with, a blend of source and image statistics, in which the n-th image of the
    stream has the weight ``1 / (sqrt(n) / warm_n + 1)``. Cost: 2 forwards and 1 backward per image.

    Keeps between images, for the latest ``memory_size`` images, the tuned prompt and the amplitudes of the image's
    lowest frequencies: **a trace of each of these patients' images**, which the state file contains as well. Adam's
    moments are also kept along the stream.

    Args:
        network: a network with batch norm that stores its statistics, or any network with ``statistics``; it is frozen
            and set to evaluation mode.
        lr: learning rate (0.05; 0.01 for polyps).
        betas: Adam's betas.
        side: side of the prompt; the released rule is ``max(1, int(image_side * 0.01))``.
        memory_size: number of images remembered, first in, first out.
        neighbours: number of remembered images that a prompt is initialised from; prompts start at ones until that many
            are remembered.
        warm_n: the larger, the more slowly the blend moves from the image's statistics to the source's.
        centred: whether the prompt's block is centred on the zero frequency (see :class:`LowFrequencies`).
        start: initial prompt once there are enough neighbours: ``memory`` is the published mix of the prompts of the
            most similar images, ``latest`` the previous image's prompt (see :meth:`released`).
        offset: see :func:`mgipt_monai.networks.prompt_offset`.
        prompted_channels: channels of the image that are prompted; None for all. Clicks or guidance should not be.
        statistics: a statistics file or its content, see :class:`MGIPT`; it is the source's part of the blend that
            layers are aligned with.
        aligned_layers: regular expression on the names of the norm layers to align; None aligns all.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a setting out of range, or a network without usable norm layers; at the first
            image, for statistics that belong to other weights.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> vptta = VPTTA(network)
        >>> vptta(torch.rand(2, 3, 32, 32)).shape, vptta.last[1]["memory"]
        (torch.Size([2, 2, 32, 32]), 2)
    """

    takes_windows = True

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float = 0.05,
        betas: Sequence[float] = (0.9, 0.99),
        side: int = 5,
        memory_size: int = 40,
        neighbours: int = 16,
        warm_n: float = 5,
        centred: bool = True,
        start: Start = "memory",
        offset: Offset = "auto",
        prompted_channels: Sequence[int] | None = None,
        statistics: SourceStatistics | str | os.PathLike | None = None,
        aligned_layers: str | None = None,
        output: Output | None = None,
    ) -> None:
        betas = check_step(lr, betas)
        for name, value in (("side", side), ("memory_size", memory_size), ("neighbours", neighbours)):
            if not is_whole(value) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value}")
        if neighbours > memory_size:
            raise ValueError(f"neighbours must be at most memory_size ({memory_size}), got {neighbours}")
        if not 0 < warm_n < math.inf:
            raise ValueError(f"warm_n must be above 0, got {warm_n}")
        if start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}; got {start!r}")
        self.aligned_layers, self.statistics = aligned_layers, read_statistics(statistics)
        super().__init__(network, output)
        self.lr, self.betas, self.side, self.centred = lr, betas, side, centred
        self.offset, self.prompted_channels = check_offset(offset), check_channels(prompted_channels)
        self.memory_size, self.neighbours, self.warm_n, self.start = memory_size, neighbours, warm_n, start
        self.amplitudes: list[Tensor] = []
        self.prompts: list[Tensor] = []
        self.moments: list[Tensor] = []

    @classmethod
    def released(cls, network: nn.Module, *, image_side: int = 512, **overrides: Any) -> VPTTA:
        """Build the method that reproduces the outputs of the released code (run on a CPU), for ``image_side``.

        The prompt's block is one step off centre. From the 17th image on, the released code starts each prompt where
        the previous one ended, as if every prompt in the memory were the latest; ``start="memory"`` gives the published
        mix.
        """
        released = {"side": max(1, int(image_side * 0.01)), "centred": False, "start": "latest", "offset": "none"}
        return cls(network, **{**released, **overrides})

    def prompt_maps(self) -> dict[str, Tensor]:
        """Return the latest image's prompt."""
        return {"latest": self.prompts[-1][0].cpu()} if self.prompts else {}

    def adapted_input(self, image: Tensor) -> Tensor:
        """Return the latest image with its prompt."""
        return self._frequencies(image, prompt_offset(image, self.offset)).apply(self.prompts[-1])

    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        self.norms.start(image)
        root = math.sqrt(self.images_seen + 1)
        self.norms.source_weight = root / (root + self.warm_n)

        offset = prompt_offset(image, self.offset)
        low = self._frequencies(image, offset)
        amplitude = low.coefficients.abs()
        prompt = self._initial_prompt(amplitude).requires_grad_()
        loss, (gradient,) = loss_gradients(lambda x: self.norms.loss(x, "calibrated"), low.apply(prompt), prompt)
        check_tuning(loss, gradient)
        prompt = self._adam_step(prompt, gradient)
        with torch.no_grad():
            logits = self.norms.predict(low.apply(prompt), "calibrated")

        self.amplitudes = [*self.amplitudes, amplitude][-self.memory_size :]
        self.prompts = [*self.prompts, prompt][-self.memory_size :]
        record = {"loss_before": loss.item(), "memory": len(self.prompts), "offset": offset[0].tolist()}
        return Prediction(logits, {**record, **self._cost()})

    def _frequencies(self, image: Tensor, offset: Tensor) -> LowFrequencies:
        if self.side > min(image.shape[2:]):  # the memory needs blocks of one shape
            sides = "x".join(map(str, image.shape[2:]))
            raise ValueError(f"an image of {sides} is smaller than a prompt of side {self.side}: set a smaller side")
        return LowFrequencies(image, self.side, self.centred, offset, self.prompted_channels)

    def _initial_prompt(self, amplitude: Tensor) -> Tensor:
        """Return the prompt that this image's tuning starts from."""
        if self.prompts and self.prompts[0].shape != amplitude.shape:
            raise ValueError(
                f"this image needs a prompt of shape {tuple(amplitude.shape)}, the stream's have "
                f"{tuple(self.prompts[0].shape)}: convert the image, or start a new stream with reset()"
            )
        if len(self.prompts) < self.neighbours:
            return torch.ones_like(amplitude)
        if self.start == "latest":
            return self.prompts[-1].to(amplitude.device, copy=True)
        amplitudes, prompts = (torch.cat(kept).to(amplitude.device) for kept in (self.amplitudes, self.prompts))
        similarity, nearest = cosine_similarity(amplitudes.flatten(1), amplitude.flatten(1)).topk(self.neighbours)
        return torch.tensordot(torch.softmax(similarity / TEMPERATURE, dim=0), prompts[nearest], dims=1)[None]

    def _adam_step(self, prompt: Tensor, gradient: Tensor) -> Tensor:
        """Return the prompt after one Adam step, with moments that are kept along the stream."""
        moments = [moment.to(prompt.device, copy=True) for moment in self.moments]
        first, second = moments or (torch.zeros_like(gradient), torch.zeros_like(gradient))
        adam = torch.optim.Adam([prompt], lr=self.lr, betas=self.betas)
        steps = torch.tensor(float(self.images_seen))
        adam.state[prompt] = {"step": steps, "exp_avg": first, "exp_avg_sq": second}
        prompt.grad = gradient
        adam.step()
        self.moments = [first, second]
        return prompt.detach()

    def source_norms(self) -> AlignedNorms:
        """Return the norm layers that the prompt is tuned with."""
        return self.norms

    def _cost(self) -> dict[str, int]:
        return {"forwards": self.norms.forwards, "backwards": self.norms.loss_windows}

    def _bound(self) -> None:
        self.norms = BlendedNorms(self.network, self.aligned_layers, statistics=self.statistics, route=self.route)

    def _reset(self) -> None:
        self.amplitudes, self.prompts, self.moments = [], [], []

    def _state(self) -> dict[str, list[Tensor]]:
        return {name: [t.clone().cpu() for t in getattr(self, name)] for name in ("amplitudes", "prompts", "moments")}

    def _load_state(self, state: dict[str, Any]) -> None:
        for name in self._state():
            check_tensors(name, state[name])
        kept = {name: [t.detach().clone() for t in state[name]] for name in self._state()}
        counts = {name: len(tensors) for name, tensors in kept.items()}
        images = counts["prompts"]
        if images > self.memory_size or list(counts.values()) != [images, images, 2 * bool(images)]:
            raise ValueError(f"the state holds {counts}, this needs 2 moments and at most {self.memory_size} of each")
        tensors = [*kept["amplitudes"], *kept["prompts"], *kept["moments"]]
        for tensor in tensors:
            dims = tensor.ndim - 2
            if dims < 1 or tensor.shape != tensors[0].shape or tensor.shape[2:] != (self.side,) * dims:
                raise ValueError(f"the state has a tensor of shape {tuple(tensor.shape)}, this has side {self.side}")
        check_finite("prompts", *tensors)
        self.amplitudes, self.prompts, self.moments = kept["amplitudes"], kept["prompts"], kept["moments"]
