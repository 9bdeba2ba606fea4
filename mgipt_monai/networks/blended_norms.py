# SPDX-License-Identifier: Apache-2.0
"""VPTTA's alignment: towards a blend of the source's and the image's own statistics instead of the source's."""

from __future__ import annotations

from torch import Tensor

from .alignment import AlignedNorms, _AlignedForward, alignment_loss
from .calibration import calibrate, instance_statistics, normalize

__all__ = ["BlendedNorms"]


class _BlendedForward(_AlignedForward):
    def align(self, x: Tensor) -> Tensor:
        norms, layer = self.norms, self.layer
        if norms.normalization != "calibrated":
            return super().align(x)
        mean, std = instance_statistics(x)
        # the blend is a goal and not a way to get there: no gradient flows through it, neither here nor below
        target_mean, target_variance = calibrate(
            mean.detach(), std.detach(), layer.running_mean, layer.running_var.sqrt(), norms.source_weight
        )
        if norms.losses is not None:
            norms.losses.append(alignment_loss(mean, std, target_mean, target_variance.sqrt()))
        return normalize(x, target_mean, target_variance, layer)


class BlendedNorms(AlignedNorms):
    """Norm layers that, where they normalise ``calibrated``, are aligned with the very blend they normalise with.

    The blend's mean and variance are ``source_weight * source + (1 - source_weight) * image`` and carry no gradient.
    The logits are those of :class:`AlignedNorms`; under another normalisation the loss is as well.

    Args:
        network: see :class:`AlignedNorms`.
        layers: see :class:`AlignedNorms`.
        source_weight: share of the source in the blend; may be set anew for each image.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        >>> image = torch.rand(1, 3, 16, 16)
        >>> near, far = (BlendedNorms(network, source_weight=weight).loss(image, "calibrated") for weight in (0.1, 0.9))
        >>> bool(near < far)
        True
    """

    layer_forward = _BlendedForward
