# SPDX-License-Identifier: Apache-2.0
"""Common base of the methods that change weights: they train a copy of the source network."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mgipt_monai.methods.base import AdaptationMethod, Prediction
from mgipt_monai.networks.alignment.layers import NEEDS_BATCH_NORM, find_norm_layers
from mgipt_monai.networks.alignment.norms import AlignedNorms
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.networks.prompts.early_stop import Head, check_head
from mgipt_monai.utils.state_checks import check_finite, check_keys, check_tensor

__all__ = ["TrainedCopy", "WeightAdaptation", "load_weights", "norm_affine_names"]


def norm_affine_names(network: nn.Module, layers: str | None = None) -> set[str]:
    """Return the names of the weights and biases of the batch norms.

    Raises:
        ValueError: if there is no batch norm with stored statistics, or none of them has weights.
    """
    found = find_norm_layers(network, layers, NEEDS_BATCH_NORM)
    affine = {id(parameter) for layer in found.values() for parameter in layer.parameters(recurse=False)}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in affine}
    if not names:
        raise ValueError(
            f"none of the batch norms {', '.join(found)} has weights to adapt (affine=False): use BatchNormAdaptation"
        )
    return names


def load_weights(weights: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Copy saved values into the weights with the same names; raise ValueError if anything does not fit."""
    check_keys("state's weights", saved, set())
    if differing := sorted(map(str, weights.keys() ^ saved.keys())):
        raise ValueError(f"the state and the network have different weights: {', '.join(differing)}")
    for name, weight in weights.items():
        check_tensor(name, saved[name], weight.dtype)
        if saved[name].shape != weight.shape:
            raise ValueError(
                f"the state's {name} has shape {tuple(saved[name].shape)}, the network's {tuple(weight.shape)}"
            )
        check_finite(f"numbers of {name}", saved[name])
        with torch.no_grad():
            weight.copy_(saved[name])


class TrainedCopy:
    """A copy of a network with some trainable weights; its norm layers use the statistics of each image.

    The stored statistics of the copy never change. It is not an ``nn.Module``, so it is not part of the method's state
    dict, and a checkpoint of the source network still fits the method.

    Args:
        network: the source network, which is not changed.
        names: names of the weights to train.
        layers: which batch norms use the image's statistics, see :class:`AlignedNorms`.
        make_optimizer: builds the optimiser of a list of weights.
    """

    KEYS: tuple[str, ...] = ("weights", "optimizer")

    def __init__(
        self,
        network: nn.Module,
        names: set[str],
        layers: str | None,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.norms = AlignedNorms(self.network, layers)
        self.weights = {name: weight for name, weight in self.network.named_parameters() if name in names}
        for weight in self.weights.values():
            weight.requires_grad_()
        self._make_optimizer = make_optimizer
        self.optimizer = make_optimizer(list(self.weights.values()))
        self.backwards = 0

    def predict(self, image: Tensor) -> Tensor:
        """Run the copy with the image's own statistics; (1, C, \\*spatial) to logits (1, K, \\*spatial)."""
        return self.norms.predict(image, "instance")

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Return the gradient of the loss of one image with respect to each trained weight.

        Raises:
            FloatingPointError: if it is not finite, before any weight is changed.
        """
        self.backwards += 1
        gradients = torch.autograd.grad(loss, list(self.weights.values()), materialize_grads=True)
        if not all(torch.isfinite(value).all() for value in (loss, *gradients)):
            raise FloatingPointError("the loss or its gradient is not finite: check the image and the network")
        return list(gradients)

    @contextmanager
    def moved(self, offsets: Sequence[Tensor]) -> Iterator[None]:
        """Move the weights by these offsets within the block; afterwards they are bit-identical to before."""
        weights = list(self.weights.values())
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, offset in zip(weights, offsets, strict=True):
                weight.add_(offset)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, kept, strict=True):
                    weight.copy_(value)

    def step(self, gradients: Sequence[Tensor], lr: float | None = None) -> None:
        """Take one optimiser step along these gradients, optionally with another learning rate."""
        for weight, gradient in zip(self.weights.values(), gradients, strict=True):
            weight.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """Return copies of the trained weights and of the optimiser's moments, on the CPU."""
        return {
            "weights": {name: weight.detach().clone().cpu() for name, weight in self.weights.items()},
            "optimizer": {
                index: {key: value.clone().cpu() for key, value in moments.items()}
                for index, moments in self.optimizer.state_dict()["state"].items()
            },
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned; raise ValueError if it does not fit."""
        load_weights(self.weights, state["weights"])
        self._check_moments(state["optimizer"])
        # copied: the optimiser would write into the caller's tensors
        moments = {i: {key: m.clone() for key, m in each.items()} for i, each in state["optimizer"].items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def _check_moments(self, saved: Any) -> None:
        """Raise ValueError unless these are the optimiser's moments of all weights, or empty (before any step)."""
        weights = list(self.weights.values())
        check_keys("state's optimizer", saved, set())
        if saved and set(saved) != set(range(len(weights))):
            raise ValueError(f"the state's optimizer has moments of {len(saved)} weights, this needs {len(weights)}")
        # a step shows which moments the optimiser keeps
        probe = nn.Parameter(torch.zeros(1))
        probe.grad = torch.zeros(1)
        optimizer = self._make_optimizer([probe])
        optimizer.step()
        expected = optimizer.state[probe]
        for index, weight in enumerate(weights if saved else []):
            name = f"optimizer at number {index}"
            check_keys(f"state's {name}", saved[index], set(expected))
            for key, moment in saved[index].items():
                check_tensor(name, moment, weight.dtype)
                if key not in expected or moment.shape != (weight.shape if expected[key].ndim else ()):
                    raise ValueError(f"the state's {name} does not fit: {key} of shape {tuple(moment.shape)}")
                check_finite(name, moment)


class WeightAdaptation(AdaptationMethod):
    """Base of the methods that train weights: the copy, its state, and its cost.

    The network is copied at the first image of a stream, so weights loaded before it take effect. A subclass implements
    the optimiser and the update for one image, and overrides ``_weight_names`` and ``_copy_type`` if needed.

    Args:
        network: the source network, with batch norm that stores its statistics; it is not changed.
        head: ``sigmoid`` (each channel a structure) or ``softmax`` (channel 0 is background).
        aligned_layers: regular expression on the names of the norm layers that use the image's statistics and, in
            methods that adapt norm layers, are adapted; None: all.
        seed: seeds random numbers, with the image index.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a setting out of range or a network without usable norm layers.
    """

    _copy_type: type[TrainedCopy] = TrainedCopy

    def __init__(
        self,
        network: nn.Module,
        *,
        head: Head = "sigmoid",
        aligned_layers: str | None = None,
        seed: int = 0,
        output: Output | None = None,
    ) -> None:
        check_head(head)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.head, self.aligned_layers, self.seed = head, aligned_layers, seed
        self.adapted: TrainedCopy | None = None
        super().__init__(network, output)

    @abstractmethod
    def _optimizer(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of the trained weights."""

    @abstractmethod
    def _adapt(self, adapted: TrainedCopy, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Adapt the copy to one image (1, C, \\*spatial); return its logits and a record of what was done."""

    def _weight_names(self) -> set[str]:
        return norm_affine_names(self.network, self.aligned_layers)

    def _copy(self) -> TrainedCopy:
        adapted = self._copy_type(self.network, self._weight_names(), self.aligned_layers, self._optimizer)
        for part in vars(adapted).values():
            if isinstance(part, AlignedNorms):
                part.route = self.route
        return adapted

    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        if self.adapted is None:
            self.adapted = self._copy()
        name, weight = next(iter(self.adapted.weights.items()))
        if weight.device != self.network.get_parameter(name).device:
            self._load_state(self._state())  # the method was moved to another device
        adapted = self.adapted
        adapted.norms.forwards = adapted.backwards = 0
        logits, record = self._adapt(adapted, image)
        return Prediction(logits.detach(), {**self._cost(), **record})

    def _cost(self) -> dict[str, int]:
        adapted = self.adapted
        return (
            super()._cost() if adapted is None else {"forwards": adapted.norms.forwards, "backwards": adapted.backwards}
        )

    def _image_seed(self) -> int:
        return int(np.random.SeedSequence((self.seed, self.images_seen)).generate_state(1)[0])

    def _bound(self) -> None:
        # refuse an unsuitable network at construction
        find_norm_layers(self.network, self.aligned_layers, NEEDS_BATCH_NORM)
        self._weight_names()
        if self.adapted is not None:
            self._load_state(self._state())

    def _reset(self) -> None:
        self.adapted = None

    def _state(self) -> dict[str, Any]:
        return {key: {} for key in self._copy_type.KEYS} if self.adapted is None else self.adapted.state()

    def _load_state(self, state: dict[str, Any]) -> None:
        check_keys("state's weights", state["weights"], set())
        if not state["weights"]:
            self.adapted = None
            return
        # tensors created in inference_mode cannot be trained
        with torch.inference_mode(False):
            restored = self._copy()
            restored.load(state)
        self.adapted = restored
