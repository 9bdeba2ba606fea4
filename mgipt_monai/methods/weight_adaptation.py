# SPDX-License-Identifier: Apache-2.0
"""What the methods share that change weights: they train a copy of the source network, which ``reset`` drops."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mgipt_monai.networks.early_stop import Head, check_head
from mgipt_monai.networks.norm_layers import NEEDS_BATCH_NORM, find_norm_layers
from mgipt_monai.networks.state_checks import check_keys

from .base import AdaptationMethod
from .trained_copy import TrainedCopy, norm_affine_names

__all__ = ["WeightAdaptation"]


class WeightAdaptation(AdaptationMethod):
    """Base of the methods that train weights: the copy, its state, and what it costs.

    The copy is made of the network at the first image of a stream, so weights loaded into the network before it count.
    A subclass gives the optimiser, and what is done with one image; ``_weight_names`` and ``_copy_type`` where it needs
    others.

    Args:
        network: the source network, with batch norm that stores its statistics; it is not changed.
        head: ``sigmoid`` (each channel a structure) or ``softmax`` (channel 0 is background).
        aligned_layers: regular expression on the names of the norm layers that take the image's statistics and, in
            methods that adapt norm layers, are adapted; None takes all.
        seed: seeds what is random, with the image index.

    Raises:
        ValueError: at construction, for a setting out of range or a network without usable norm layers.
    """

    _copy_type: type[TrainedCopy] = TrainedCopy

    def __init__(
        self, network: nn.Module, *, head: Head = "sigmoid", aligned_layers: str | None = None, seed: int = 0
    ) -> None:
        check_head(head)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.head, self.aligned_layers, self.seed = head, aligned_layers, seed
        self.adapted: TrainedCopy | None = None
        super().__init__(network)

    @abstractmethod
    def _optimizer(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of the trained weights."""

    @abstractmethod
    def _adapt(self, adapted: TrainedCopy, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Adapt the copy to one image (1, C, \\*spatial); return its logits and the record of what was done."""

    def _weight_names(self) -> set[str]:
        return norm_affine_names(self.network, self.aligned_layers)

    def _copy(self) -> TrainedCopy:
        return self._copy_type(self.network, self._weight_names(), self.aligned_layers, self._optimizer)

    def _adapt_and_predict(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        if self.adapted is None:
            self.adapted = self._copy()
        name, weight = next(iter(self.adapted.weights.items()))
        if weight.device != self.network.get_parameter(name).device:
            self._load_state(self._state())  # the method was moved, its copy follows
        adapted = self.adapted
        adapted.norms.forwards = adapted.backwards = 0
        logits, record = self._adapt(adapted, image)
        return logits.detach(), {"forwards": adapted.norms.forwards, "backwards": adapted.backwards, **record}

    def _image_seed(self) -> int:
        return int(np.random.SeedSequence((self.seed, self.images_seen)).generate_state(1)[0])

    def _bound(self) -> None:
        # a network that cannot be adapted is refused at construction
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
        # tensors made under inference_mode could not be trained
        with torch.inference_mode(False):
            fresh = self._copy()
            fresh.load(state)
        self.adapted = fresh
