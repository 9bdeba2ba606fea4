# SPDX-License-Identifier: Apache-2.0
"""Crop a square around the optic disc, and resize image and mask."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["disc_window", "resize"]


def disc_window(mask: np.ndarray, side: int) -> tuple[slice, slice]:
    """Return a square centred on the bounding box of the disc.

    At the border it is shifted to stay inside the image. If the image is smaller than the square, the side is the
    image's shorter side.

    Args:
        mask: (H, W), above 0 in the disc.
        side: side of the square in pixels.

    Returns:
        Rows and columns.

    Raises:
        ValueError: if the disc is larger than the square.

    Example:
        >>> mask = np.zeros((9, 9))
        >>> mask[4:7, 1:3] = 1
        >>> disc_window(mask, 5)
        (slice(3, 8, None), slice(0, 5, None))
    """
    side = min(side, *mask.shape)
    window = []
    for axis, length in enumerate(mask.shape):
        inside = np.flatnonzero(mask.any(axis=1 - axis))
        first, end = int(inside[0]), int(inside[-1]) + 1
        if end - first > side:
            raise ValueError(f"a crop of {side} pixels cuts off the disc of {end - first}: use a larger one")
        start = min(max((first + end - side) // 2, 0), length - side)
        window.append(slice(start, start + side))
    return window[0], window[1]


def resize(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize both to ``size`` x ``size`` pixels: the image bilinear with antialiasing, the mask nearest-neighbour."""
    sides = (size, size)
    resized = Image.fromarray(image).resize(sides, Image.Resampling.BILINEAR)
    return np.asarray(resized), np.asarray(Image.fromarray(mask).resize(sides, Image.Resampling.NEAREST))
