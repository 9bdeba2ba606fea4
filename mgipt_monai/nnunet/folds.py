# SPDX-License-Identifier: Apache-2.0
"""The folds of an nnU-Net: an ensemble of networks, each adapted by a method of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from mgipt_monai.methods.base import AdaptationMethod, Prediction
from mgipt_monai.networks.alignment import AlignedNorms
from mgipt_monai.networks.alignment.windows import Precision
from mgipt_monai.utils.state_checks import check_keys

__all__ = ["FoldEnsemble"]


class FoldEnsemble(AdaptationMethod):
    """The mean logits of several networks, each of which adapts to an image with its own method, state and guard.

    The logits are averaged in half precision, as nnU-Net averages those of its folds. The cost is the sum of the
    methods'.

    Args:
        methods: one for each fold, around networks of their own.

    Raises:
        ValueError: for fewer than two methods, or two around the same network.

    Example:
        >>> from mgipt_monai import Source
        >>> folds = FoldEnsemble([Source(nn.Conv2d(1, 2, 1)), Source(nn.Conv2d(1, 2, 1))])
        >>> folds(torch.rand(1, 1, 4, 4)).shape, folds.last[0]["forwards"]
        (torch.Size([1, 2, 4, 4]), 2)
    """

    def __init__(self, methods: Sequence[AdaptationMethod]) -> None:
        networks = [method.network for method in methods]
        if len(networks) < 2 or len(set(networks)) < len(networks):
            raise ValueError(f"give a method for each of two or more networks, got {len(set(networks))} networks")
        super().__init__(nn.ModuleList(networks))
        self.methods = nn.ModuleList(methods)

    @property
    def folds(self) -> list[AdaptationMethod]:
        """The methods."""
        return list(self._modules.get("methods") or [])  # type: ignore[arg-type] # none while the first is bound

    @property
    def takes_windows(self) -> bool:
        """Whether all methods can predict through a sliding window."""
        return all(method.takes_windows for method in self.folds)

    def predict_through(self, inferer: Inferer, windows: int = 2) -> None:
        """Run each network through an inferer from now on, see :class:`AdaptationMethod`."""
        super().predict_through(inferer, windows)
        for method in self.folds:
            method.predict_through(inferer, windows)

    def compute_in(self, precision: Precision) -> None:
        """Run each network in this precision from now on, see :class:`AdaptationMethod`."""
        super().compute_in(precision)
        for method in self.folds:
            method.compute_in(precision)

    def settings(self) -> dict[str, Any]:
        """Return the settings of all methods, each behind its number."""
        parts = {f"{i}.{key}": value for i, fold in enumerate(self.folds) for key, value in fold.settings().items()}
        return {"class": self.name, **parts}

    def source_norms(self) -> AlignedNorms:
        """Return the norm layers of the first network."""
        return self.folds[0].source_norms()

    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        first, *others = (method(image).half() for method in self.folds)
        for logits in others:
            first += logits
        first /= len(self.folds)
        records = [method.last[0] for method in self.folds]
        costs = {key: sum(record[key] for record in records) for key in ("forwards", "backwards")}
        return Prediction(first.to(torch.float32), {**costs, "folds": records})

    def _bound(self) -> None:
        for method, network in zip(self.folds, self.network.children(), strict=False):  # no methods at first
            if method.network is not network:
                method.bind(network)

    def _reset(self) -> None:
        for method in self.folds:
            method.reset()

    def _state(self) -> dict[str, Any]:
        return {"folds": {str(i): method.adaptation_state() for i, method in enumerate(self.folds)}}

    def _load_state(self, state: dict[str, Any]) -> None:
        check_keys("folds", state["folds"], {str(i) for i in range(len(self.folds))})
        before = [method.adaptation_state() for method in self.folds]
        try:
            for i, method in enumerate(self.folds):
                method.load_adaptation_state(state["folds"][str(i)])
        except BaseException:
            for method, own in zip(self.folds, before, strict=True):
                method.load_adaptation_state(own)
            raise
