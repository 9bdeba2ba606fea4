# SPDX-License-Identifier: Apache-2.0
"""Batch-norm adaptation: each image's statistics replace the source's, or are blended with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mgipt_monai.methods.base import AdaptationMethod, Prediction
from mgipt_monai.networks.alignment.layers import NEEDS_BATCH_NORM, find_norm_layers
from mgipt_monai.networks.alignment.norms import AlignedNorms
from mgipt_monai.networks.alignment.windows import Output

__all__ = ["BatchNormAdaptation"]


class BatchNormAdaptation(AdaptationMethod):
    """Batch-norm statistics estimated from each image and blended with the source's.

    Adapts the mean and variance with which the norm layers normalise, and no weight. Keeps nothing between images, so
    no patient data. Cost: 1 F (one forward of the network).

    Source: Schneider et al., Improving robustness against common corruptions by covariate shift adaptation, NeurIPS
    2020 (the blend); Nado et al., arXiv 2006.10963 (``source_weight=0``), here for one image at a time.

    Args:
        network: the source network, with batch norm that stores its statistics.
        source_weight: weight of the source's statistics in [0, 1]: 0 uses only the image's own, 1 only the source's.
        aligned_layers: regular expression on the names of the norm layers to adapt; None adapts all.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a weight out of range, or a network without usable norm layers.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> BatchNormAdaptation(network, source_weight=0.5)(torch.rand(1, 3, 16, 16)).shape
        torch.Size([1, 2, 16, 16])
    """

    takes_windows = True

    def __init__(
        self,
        network: nn.Module,
        source_weight: float = 0.0,
        aligned_layers: str | None = None,
        output: Output | None = None,
    ) -> None:
        self.source_weight, self.aligned_layers = source_weight, aligned_layers
        super().__init__(network, output)

    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        self.norms.start(image)
        with torch.no_grad():
            logits = self.norms.predict(image, "calibrated")
        return Prediction(logits, {"forwards": self.norms.forwards, "backwards": 0})

    def _bound(self) -> None:
        # other norm layers store no statistics to replace, so a statistics file would not help
        find_norm_layers(self.network, self.aligned_layers, NEEDS_BATCH_NORM)
        self.norms = AlignedNorms(self.network, self.aligned_layers, self.source_weight, route=self.route)
