# SPDX-License-Identifier: Apache-2.0
"""Calibration (Eq. 6): with which mean and variance a frozen norm layer normalises one image."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

__all__ = ["Normalization", "calibrate", "instance_statistics", "normalize"]

Normalization = Literal["instance", "calibrated", "source"]
"""``instance``: the image's own statistics; ``calibrated``: a blend of the source's and the image's;
``source``: the stored ones (plain evaluation)."""


def check_normalization(name: str, value: str) -> None:
    """Raise ValueError unless ``value`` is one of the three ways to normalise."""
    if value not in get_args(Normalization):
        raise ValueError(f"{name} must be one of {', '.join(get_args(Normalization))}; got {value!r}")


def instance_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample and channel over the spatial axes.

    Args:
        x: features (B, C, \\*spatial).

    Returns:
        Mean and standard deviation, each (B, C); the deviation with n - 1 in the denominator, zero for a single voxel.
        Its gradient is zero, not infinite, where a channel is constant.
    """
    voxels = math.prod(x.shape[2:])
    std, mean = torch.std_mean(x.flatten(2), dim=2, correction=1 if voxels > 1 else 0)
    return mean, std


def calibrate(
    mean: Tensor, std: Tensor, source_mean: Tensor, source_std: Tensor, source_weight: float
) -> tuple[Tensor, Tensor]:
    """Blend the image's statistics with the source's (Eq. 6).

    Args:
        mean: the image's mean (B, C).
        std: the image's standard deviation (B, C).
        source_mean: stored mean (C,).
        source_std: stored standard deviation (C,).
        source_weight: lambda in [0, 1]; 1 gives the source's statistics, 0 the image's.

    Returns:
        Mean and variance (B, C): ``lambda * source + (1 - lambda) * image``, for the mean and for the variance.
    """
    return torch.lerp(mean, source_mean, source_weight), torch.lerp(std.square(), source_std.square(), source_weight)


def normalize(x: Tensor, mean: Tensor, variance: Tensor, layer: nn.Module) -> Tensor:
    """Normalise with given statistics and the layer's own eps, weight and bias.

    Args:
        x: features (B, C, \\*spatial).
        mean: (B, C).
        variance: (B, C).
        layer: the norm layer; its ``weight`` and ``bias`` may be None.

    Returns:
        Normalised features, same shape as ``x``.
    """
    scale = torch.rsqrt(variance + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight
    shift = -mean * scale
    if layer.bias is not None:
        shift = shift + layer.bias
    per_channel = (*mean.shape, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.view(per_channel), x, scale.view(per_channel))
