# SPDX-License-Identifier: Apache-2.0
"""ORIGA(-light), fundus photographs of the Singapore Eye Research Institute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .folders import files_by_name, pair
from .layout import Layout, Sample

__all__ = ["ORIGA"]


def _find(root: Path) -> list[Sample]:
    images = files_by_name(root, ["Images"])
    try:
        masks = files_by_name(root, ["Masks"])
    except FileNotFoundError:
        masks = files_by_name(root, ["Semi-automatic-annotations", "manual marking"], endings=[".mat"])
    return [Sample("origa", *files) for files in pair(images, masks)]


def _decode(mask: Image.Image) -> np.ndarray:
    indices = np.asarray(mask)
    if indices.ndim != 2 or indices.max() > 2:
        raise ValueError(f"the mask must be one channel of 0, 1 and 2, got {indices.shape} with {indices.max()}")
    return indices.astype(np.uint8)


ORIGA = Layout(
    name="origa",
    expected="a folder with Images/ (001.jpg) and either Masks/ (001.png of 0 background, 1 disc rim, 2 cup) or "
    "Semi-automatic-annotations/ or 'manual marking'/ (001.mat with such a variable mask; needs scipy)",
    counts={"origa": 650},
    find=_find,
    decode=_decode,
)
