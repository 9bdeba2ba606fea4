# SPDX-License-Identifier: Apache-2.0
"""Read the masks of published datasets and decode them to class indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from monai.utils import optional_import
from PIL import Image, ImageOps

from mgipt_monai.data.photographs import open_photograph

__all__ = ["disc_and_cup", "grey_disc_and_cup", "open_mask", "two_masks"]

scipy_io, _ = optional_import("scipy.io", descriptor="{}: pip install mgipt_monai[published]")


def open_mask(path: Path) -> Image.Image:
    """Open an image file, or the variable ``mask`` of a MATLAB file (needs scipy)."""
    if path.suffix.lower() != ".mat":
        with open_photograph(path) as file:
            return ImageOps.exif_transpose(file)
    content = scipy_io.loadmat(path)
    if "mask" not in content:
        raise ValueError(f"{path.name} has no variable mask")
    return Image.fromarray(content["mask"].astype(np.uint8))


def disc_and_cup(disc: np.ndarray, cup: np.ndarray) -> np.ndarray:
    """Merge disc and cup, boolean (H, W), into 0 background, 1 disc rim, 2 cup. The cup is clipped to the disc.

    Example:
        >>> disc_and_cup(np.array([[True, True, False]]), np.array([[False, True, True]]))
        array([[1, 2, 0]], dtype=uint8)
    """
    return disc.astype(np.uint8) + (disc & cup)


def two_masks(disc: Image.Image, cup: Image.Image) -> np.ndarray:
    """Decode a file of the disc and one of the cup, in which everything but black is the structure.

    Raises:
        ValueError: if they differ in size.
    """
    if disc.size != cup.size:
        raise ValueError(f"the disc's mask has {disc.size} columns and rows, the cup's {cup.size}")
    return disc_and_cup(*(np.asarray(mask.convert("L")) > 0 for mask in (disc, cup)))


def grey_disc_and_cup(mask: Image.Image) -> np.ndarray:
    """Decode one file in which 0 is cup, 255 background, and everything in between disc rim.

    Example:
        >>> grey_disc_and_cup(Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8)))
        array([[2, 1, 0]], dtype=uint8)
    """
    grey = np.asarray(mask.convert("L"))
    return disc_and_cup(grey < 255, grey == 0)
