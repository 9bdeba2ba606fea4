# SPDX-License-Identifier: Apache-2.0
"""Calibration (Eq. 6): with which mean and variance a frozen norm layer normalises one image."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Normalization", "calibrate"]

Normalization = Literal["instance", "calibrated", "source"]
"""``instance``: the image's own statistics; ``calibrated``: a blend of the source's and the image's;
``source``: the stored ones (plain evaluation)."""


def check_normalization(name: str, value: str) -> None:
    """Raise ValueError unless ``value`` is one of the three ways to normalise."""
    if value not in get_args(Normalization):
        raise ValueError(f"{name} must be one of {', '.join(get_args(Normalization))}; got {value!r}")


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
