# SPDX-License-Identifier: Apache-2.0
"""Batch-norm adaptation in one forward: the source's statistics are blended with the image's, or with the stream's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mgipt_monai.methods.base import AdaptationMethod, Prediction
from mgipt_monai.networks.alignment.fused import Blend
from mgipt_monai.networks.alignment.layers import NEEDS_BATCH_NORM, find_norm_layers
from mgipt_monai.networks.alignment.norms import AlignedNorms
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.utils.state_checks import check_finite, check_keys, check_number, check_tensor

__all__ = ["BatchNormAdaptation", "DyNo"]


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


class DyNo(AdaptationMethod):
    """Statistics of the source, of the image and of a domain between them, weighted by the image's distances (DyNo).

    The domain between is the plain mean, over the images so far, of statistics halfway between the source's and the
    image's. The distance of an image from a domain is ``|mean - its mean| + |variance - its variance|`` for each
    channel. The source's statistics have the weight ``sigmoid(distance from the domain between - distance from the
    source)``, and the other two share the rest equally. There is no setting. Cost: 1 F.

    Keeps between images, for each channel of each norm layer, the mean and variance of the domain between, without
    spatial information.

    Source: Fu, Chen et al., DyNo: dynamic normalization based test-time adaptation for 2D medical image segmentation,
    MLMI 2024. The paper describes the three domains, the moving average and the fusion by distance; the formulas are
    those of the authors' released program. Ours is the start: before the first image, that image's own halfway
    statistics are the domain between, and each image is measured against that of the images before it.

    Args:
        network: the source network, with batch norm that stores its statistics.
        aligned_layers: regular expression on the names of the norm layers to adapt; None adapts all.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a network without usable norm layers.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> method = DyNo(network)
        >>> logits = method(torch.rand(1, 3, 16, 16))
        >>> 0 <= method.last[0]["source_weight"] <= 1
        True
    """

    def __init__(self, network: nn.Module, aligned_layers: str | None = None, output: Output | None = None) -> None:
        self.aligned_layers = aligned_layers
        self._count = 0
        self.between: dict[str, Tensor] = {}
        super().__init__(network, output)

    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        self.norms.start(image)
        self.norms.begin(self.between, self._count)
        with torch.no_grad():
            logits = self.norms.predict(image, "calibrated")
        self._count, self.between = self._count + 1, {**self.between, **self.norms.updated}
        weight = torch.cat(list(self.norms.weights.values())).mean().item()
        return Prediction(logits, {"source_weight": weight, "forwards": self.norms.forwards, "backwards": 0})

    def _bound(self) -> None:
        find_norm_layers(self.network, self.aligned_layers, NEEDS_BATCH_NORM)
        self.norms = _ThreeDomainNorms(self.network, self.aligned_layers, route=self.route)

    def _reset(self) -> None:
        self._count, self.between = 0, {}

    def _state(self) -> dict[str, Any]:
        between = {name: statistics.cpu().clone() for name, statistics in self.between.items()}
        return {"count": self._count, "between": between}

    def _load_state(self, state: dict[str, Any]) -> None:
        check_number("count", state["count"], least=0, whole=True)
        check_keys("between", state["between"], set())
        for name, statistics in state["between"].items():
            if name not in self.norms.layers:
                raise ValueError(f"the state has statistics of a layer {str(name)[:60]!r} that is not adapted")
            check_tensor(f"statistics of {name}", statistics)
            expected = (2, len(self.norms.stored(name)[0]))
            if statistics.shape != expected:
                shape = tuple(statistics.shape)
                raise ValueError(f"the state's statistics of {name} have the shape {shape}, not {expected}")
            check_finite(f"statistics of {name}", statistics)
            if (statistics[1] < 0).any():
                raise ValueError(f"the state's statistics of {name} have a negative variance")
        if bool(state["count"]) != bool(state["between"]):
            raise ValueError(f"the state has {state['count']} images but statistics of {len(state['between'])} layers")
        self._count = state["count"]
        self.between = {name: statistics.clone() for name, statistics in state["between"].items()}


class _ThreeDomainNorms(AlignedNorms):
    """Norm layers whose ``calibrated`` is DyNo's blend.

    Attributes:
        updated: the layers' domain between, with the current image: mean and variance, (2, C).
        weights: the layers' weights of the source for the current image, (C,).
    """

    def begin(self, between: dict[str, Tensor], count: int) -> None:
        """Start an image: ``between`` is the domain of the ``count`` images before it."""
        self.between, self.count = between, count
        self.updated: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def blend(self, name: str, mean: Tensor, std: Tensor) -> Blend | None:
        """Return the fused statistics, which replace the features' own."""
        if self.normalization != "calibrated":
            return super().blend(name, mean, std)
        source_mean, source_std = self.stored(name)
        source, own = torch.stack([source_mean, source_std.square()]), torch.stack([mean[0], std[0].square()])
        halfway = (source + own) / 2
        # a layer that was left out so far starts like the first image
        before = self.between[name].to(own.device) if name in self.between else halfway
        weight = torch.sigmoid((own - before).abs().sum(dim=0) - (own - source).abs().sum(dim=0))
        between = torch.lerp(before, halfway, 1 / (self.count + 1))
        fused = torch.lerp((between + own) / 2, source, weight)
        self.updated[name], self.weights[name] = between, weight
        return Blend(fused[0], fused[1], 1.0)
