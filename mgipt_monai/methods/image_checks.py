# SPDX-License-Identifier: Apache-2.0
"""What makes an image unfit for adaptation, said in words a user can act on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_image"]


def check_image(image: Tensor) -> None:
    """Check a batch of images (B, C, \\*spatial) before anything is adapted to it.

    Raises:
        ValueError: if it has no spatial axis, holds NaN or infinite values, or an image of it is constant.
    """
    if image.ndim < 3:
        raise ValueError(f"expected a batch of images (B, C, *spatial), got shape {tuple(image.shape)}")
    if not torch.isfinite(image).all():
        bad = int((~torch.isfinite(image)).sum())
        raise ValueError(f"the image has {bad} NaN or infinite values: repair or leave out the file")
    values = image.flatten(1)
    if (values.amax(dim=1) == values.amin(dim=1)).any():
        raise ValueError("the image is constant, there is nothing to adapt to: leave out the file")
