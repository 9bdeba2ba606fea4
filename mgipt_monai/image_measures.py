# SPDX-License-Identifier: Apache-2.0
"""What is measured of one predicted image, per metric and class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.metrics import CumulativeIterationMetric, HausdorffDistanceMetric, SurfaceDiceMetric, SurfaceDistanceMetric
from monai.utils import CommonKeys
from torch import Tensor

__all__ = ["PROBABILITY", "ImageMeasures"]

PROBABILITY = "prob"
"""The key of the probability map in a postprocessed output."""

IN_SPACING = (HausdorffDistanceMetric, SurfaceDistanceMetric, SurfaceDiceMetric)


class ImageMeasures:
    """Applies MONAI metrics to one image at a time and names their values.

    Args:
        mask_metrics: name to metric (``reduction="none"``) of the predicted mask.
        probability_metrics: name to metric of the probability map, which the postprocessing must leave under ``prob``.
        class_names: names of the prediction's channels; None numbers them.
    """

    def __init__(
        self,
        mask_metrics: Mapping[str, CumulativeIterationMetric] | None = None,
        probability_metrics: Mapping[str, CumulativeIterationMetric] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.mask_metrics, self.probability_metrics = dict(mask_metrics or {}), dict(probability_metrics or {})
        self.class_names = class_names

    def __call__(self, output: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """Measure a decollated, postprocessed output.

        Args:
            output: ``label`` and ``pred``, masks of 0 and 1 (K, \\*spatial), and for probability metrics
                ``prob``, whose last K channels count (a softmax background comes first).

        Returns:
            Per metric the value of each class; distances in the unit of the label's spacing (pixels where a file has
            none). Empty without a label.

        Raises:
            ValueError: if the mask and the prediction differ in shape, or ``prob`` is missing.
        """
        label = output.get(CommonKeys.LABEL)
        if label is None:
            return {}
        pred = output[CommonKeys.PRED]
        if pred.shape != label.shape:
            raise ValueError(
                f"the mask is {tuple(label.shape)} where the prediction is {tuple(pred.shape)}: it must have the "
                "image's size, and one channel per class"
            )
        if self.probability_metrics and PROBABILITY not in output:
            raise ValueError(f"probability_metrics need the output's {PROBABILITY!r}: copy it in the postprocessing")
        values = {name: self._values(metric, pred, label) for name, metric in self.mask_metrics.items()}
        for name, metric in self.probability_metrics.items():
            values[name] = self._values(metric, output[PROBABILITY][-len(label) :], label)
        return values

    def _values(self, metric: CumulativeIterationMetric, pred: Tensor, label: Tensor) -> dict[str, float]:
        options = {}
        if isinstance(metric, IN_SPACING) and hasattr(label, "pixdim"):
            options["spacing"] = label.pixdim[: label.ndim - 1].tolist()
        scores = metric(y_pred=[pred], y=[label], **options)[0].tolist()
        # the buffer would grow with the stream; the records keep the values
        metric.reset()
        return dict(zip(self.class_names or map(str, range(len(scores))), scores, strict=True))
