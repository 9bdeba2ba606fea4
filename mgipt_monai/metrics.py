# SPDX-License-Identifier: Apache-2.0
"""Metrics of one predicted image, metrics that MONAI does not provide, and the expected Dice without a label."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from monai.metrics import CumulativeIterationMetric, HausdorffDistanceMetric, SurfaceDiceMetric, SurfaceDistanceMetric
from monai.utils import CommonKeys, optional_import
from torch import Tensor

__all__ = ["PROBABILITY", "UNADAPTED", "ImageMeasures", "MaxEMeasure", "SMeasure", "expected_dice", "mask_dice"]

PROBABILITY = "prob"
"""Key of the probability map in a postprocessed output."""
UNADAPTED = "unadapted"
"""Key of the prediction without adaptation in a postprocessed output."""

IN_SPACING = (HausdorffDistanceMetric, SurfaceDistanceMetric, SurfaceDiceMetric)


class ImageMeasures:
    """Applies MONAI metrics to one image at a time and returns their values by class.

    Args:
        mask_metrics: name to metric (``reduction="none"``) of the predicted mask.
        probability_metrics: name to metric of the probability map, which the postprocessing must store as ``prob``.
        class_names: names of the prediction's channels; None uses their numbers.
    """

    def __init__(
        self,
        mask_metrics: Mapping[str, CumulativeIterationMetric] | None = None,
        probability_metrics: Mapping[str, CumulativeIterationMetric] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.mask_metrics, self.probability_metrics = dict(mask_metrics or {}), dict(probability_metrics or {})
        self.class_names = class_names

    def __call__(self, output: Mapping[str, Any], key: str = CommonKeys.PRED) -> dict[str, dict[str, float]]:
        """Measure a decollated, postprocessed output.

        Args:
            output: ``label`` and ``pred``, masks of 0 and 1 (K, \\*spatial), and for probability metrics ``prob``,
                of which the last K channels are used (a softmax background comes first).
            key: the prediction to measure; any other than ``pred`` is measured without probability metrics.

        Returns:
            The value of each class for each metric; distances are in the unit of the label's spacing (pixels for files
            without spacing). Empty if there is no label.

        Raises:
            ValueError: if the mask and the prediction differ in shape, or ``prob`` is missing.
        """
        label = output.get(CommonKeys.LABEL)
        if label is None:
            return {}
        pred = output[key]
        if pred.shape != label.shape:
            raise ValueError(
                f"the mask has shape {tuple(label.shape)} but the prediction {tuple(pred.shape)}: it must have the "
                "size of the image, and one channel per class"
            )
        has_map = key == CommonKeys.PRED
        if self.probability_metrics and has_map and PROBABILITY not in output:
            raise ValueError(f"probability_metrics need {PROBABILITY!r} in the output: copy it in the postprocessing")
        values = {name: self._values(metric, pred, label) for name, metric in self.mask_metrics.items()}
        for name, metric in self.probability_metrics.items() if has_map else ():
            values[name] = self._values(metric, output[PROBABILITY][-len(label) :], label)
        return values

    def _values(self, metric: CumulativeIterationMetric, pred: Tensor, label: Tensor) -> dict[str, float]:
        options: dict[str, Any] = {}
        if isinstance(metric, IN_SPACING) and hasattr(label, "pixdim"):
            options["spacing"] = label.pixdim[: label.ndim - 1].tolist()
        scores = cast(Tensor, metric(y_pred=[pred], y=[label], **options)[0]).tolist()
        # the metric's buffer would grow with the stream; the values are kept in the records
        metric.reset()
        return self.by_class(scores)

    def by_class(self, values: Sequence[float]) -> dict[str, float]:
        """Return the values of the classes by their names."""
        return dict(zip(self.class_names or map(str, range(len(values))), values, strict=True))


def mask_dice(one: Tensor, other: Tensor) -> list[float]:
    """Return the Dice of two masks of 0 and 1 (K, \\*spatial) for each class; 1 where both are empty.

    Example:
        >>> mask_dice(torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.tensor([[1, 0, 0], [0, 0, 0]]))
        [0.6666666666666666, 1.0]
    """
    pairs = zip(one.flatten(1) > 0, other.flatten(1) > 0, strict=True)
    counts = [(int((a & b).sum()), int(a.sum()) + int(b.sum())) for a, b in pairs]
    return [2 * both / total if total else 1.0 for both, total in counts]


def expected_dice(probabilities: Tensor, masks: Tensor) -> list[float]:
    """Return for each class the Dice that a mask has with the truth if the probabilities are right.

    It is the mask's soft Dice with its own probabilities, 2 sum(p m) / (sum(p) + sum(m)), which nearly is the expected
    Dice of independent pixels. Of an empty mask it is one minus the largest probability, a bound on the probability
    that the class is absent. Networks are too sure of themselves, more so on images of another site: the number ranks
    images, and estimates their Dice once it is calibrated on labelled ones (``mgipt commission``).

    Args:
        probabilities: (K, \\*spatial), in [0, 1].
        masks: (K, \\*spatial), of 0 and 1.

    Example:
        >>> expected_dice(torch.tensor([[0.75, 0.75, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
        [0.8571428571428571]
    """
    found = []
    for probability, mask in zip(probabilities.flatten(1), masks.flatten(1) > 0, strict=True):
        # summed in double precision without a copy of the volume
        both, whole = (values.sum(dtype=torch.float64) for values in (probability[mask], probability))
        total = whole + mask.sum()
        found.append(float(2 * both / total) if mask.any() else 1 - float(probability.max()))
    return found


py_sod_metrics, _ = optional_import("py_sod_metrics", descriptor="{}: pip install mgipt_monai[benchmark]")


class _MapMetric(CumulativeIterationMetric):
    """A metric of a probability map and a mask, computed for each image and channel."""

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        if y is None:
            raise ValueError(f"{type(self).__name__} needs masks to compare with")
        if y_pred.ndim != 4 or y_pred.shape != y.shape:
            raise ValueError(
                f"{type(self).__name__} needs two-dimensional maps and masks of one shape (B, K, H, W), got "
                f"{tuple(y_pred.shape)} and {tuple(y.shape)}"
            )
        # interpolated values may exceed [0, 1] by a rounding error
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
    (K, H, W); returns (B, K) in [0, 1], higher is better. The maximum is taken per image and channel; the map is not
    rescaled to [0, 1] first.

    Raises:
        ValueError: if the maps are not two-dimensional or differ from the masks in shape.
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
    """Structure measure (Fan et al., ICCV 2017): the mean of object- and region-aware similarity.

    Shapes, range and errors are as for :class:`MaxEMeasure`.

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
