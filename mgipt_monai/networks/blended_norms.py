# SPDX-License-Identifier: Apache-2.0
"""VPTTA's alignment: towards a blend of the source's and the image's own statistics instead of the source's."""

from __future__ import annotations

from torch import Tensor

from .aligned_layer import AlignedLayer
from .alignment import AlignedNorms
from .calibration import calibrate

__all__ = ["BlendedNorms"]


class _BlendedLayer(AlignedLayer):
    # the blend is a goal and not a way to get there: no gradient flows through it, neither here nor below

    def target(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        source = super().target(mean, std)
        if self.norms.normalization != "calibrated":
            return source
        target_mean, target_variance = calibrate(mean.detach(), std.detach(), *source, self.norms.source_weight)
        return target_mean, target_variance.sqrt()

    def share(self) -> float:
        return 0.0 if self.norms.normalization == "calibrated" else super().share()


class BlendedNorms(AlignedNorms):
    """Norm layers that, where they normalise ``calibrated``, are aligned with the very blend they normalise with.

    The blend's mean and variance are ``source_weight * source + (1 - source_weight) * image`` and carry no gradient.
    The logits are those of :class:`AlignedNorms`; under another normalisation the loss is as well. With ``statistics``
    the source's part of the target is theirs, also at layers that keep their own forward.

    Args:
        network: see :class:`AlignedNorms`.
        layers: see :class:`AlignedNorms`.
        source_weight: share of the source in the blend; may be set anew for each image.
        statistics: see :class:`AlignedNorms`.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        >>> image = torch.rand(1, 3, 16, 16)
        >>> near, far = (BlendedNorms(network, source_weight=weight).loss(image, "calibrated") for weight in (0.1, 0.9))
        >>> bool(near < far)
        True
    """

    layer_forward = _BlendedLayer
