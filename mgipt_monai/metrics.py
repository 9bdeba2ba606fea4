# SPDX-License-Identifier: Apache-2.0
"""Metrics of probability maps that polyp and saliency papers report, as MONAI metrics around ``pysodmetrics``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from monai.metrics import CumulativeIterationMetric
from monai.utils import optional_import
from torch import Tensor

__all__ = ["MaxEMeasure", "SMeasure"]

py_sod_metrics, _ = optional_import("py_sod_metrics", descriptor="{}: pip install mgipt_monai[benchmark]")


class _MapMetric(CumulativeIterationMetric):
    """A metric of one probability map and one mask, computed for each image and channel."""

    def _compute_tensor(self, y_pred: Tensor, y: Tensor, **_: Any) -> Tensor:
        if y_pred.ndim != 4 or y_pred.shape != y.shape:
            raise ValueError(
                f"{type(self).__name__} needs maps and masks of one two-dimensional shape (B, K, H, W), got "
                f"{tuple(y_pred.shape)} and {tuple(y.shape)}"
            )
        # interpolation may leave [0, 1] by a rounding error
        maps, masks = y_pred.detach().clamp(0, 1).cpu().double().numpy(), (y > 0.5).cpu().numpy()
        scores = [[self._score(m, t) for m, t in zip(*pair, strict=True)] for pair in zip(maps, masks, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def aggregate(self) -> Tensor:
        """Return the mean over all images and channels so far."""
        return self.get_buffer().mean()

    @abstractmethod
    def _score(self, probability: np.ndarray, mask: np.ndarray) -> float:
        """Score one map in [0, 1] (H, W) against one boolean mask."""


class MaxEMeasure(_MapMetric):
    """Maximum enhanced-alignment measure (Fan et al., IJCAI 2018) over the 256 thresholds of a probability map.

    Called like a MONAI metric with probabilities in [0, 1] and masks of 0 and 1, each (B, K, H, W) or a list of
    (K, H, W); gives (B, K) in [0, 1], higher is better. The maximum is taken per image and channel, and the map is not
    stretched to [0, 1] first.

    Raises:
        ValueError: for maps that are not two-dimensional or not of the masks' shape.
        OptionalImportError: if pysodmetrics is not installed.

    Example:
        >>> mask = torch.zeros(1, 1, 16, 16)
        >>> mask[..., 4:9, 4:9] = 1
        >>> MaxEMeasure()(mask * 0.9, mask).round(decimals=2).tolist()
        [[1.0]]
    """

    def _score(self, probability: np.ndarray, mask: np.ndarray) -> float:
        measure = py_sod_metrics.Emeasure()
        measure.step(probability, mask, normalize=False)
        return float(measure.get_results()["em"]["curve"].max())


class SMeasure(_MapMetric):
    """Structure measure (Fan et al., ICCV 2017) of a probability map: half object-, half region-aware similarity.

    Shapes, range and errors as for :class:`MaxEMeasure`.

    Example:
        >>> mask = torch.zeros(1, 1, 16, 16)
        >>> mask[..., 4:9, 4:9] = 1
        >>> SMeasure()(mask, mask).round(decimals=3).tolist()
        [[1.0]]
    """

    def _score(self, probability: np.ndarray, mask: np.ndarray) -> float:
        measure = py_sod_metrics.Smeasure()
        measure.step(probability, mask, normalize=False)
        return float(measure.get_results()["sm"])
