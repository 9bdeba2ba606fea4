# SPDX-License-Identifier: Apache-2.0
"""Write an image of one channel in the format and geometry of the file that it belongs to."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor, NibabelWriter, PILWriter

from mgipt_monai.state_file import atomic_path

from .streams import stem

__all__ = ["is_nifti", "output_path", "write_image"]


def is_nifti(image: MetaTensor) -> bool:
    """Whether the file that an image was read from is NIfTI."""
    return str(image.meta["filename_or_obj"]).lower().endswith((".nii", ".nii.gz"))


def output_path(folder: Path, data: Mapping[Hashable, Any], image: MetaTensor, ending: str = "") -> Path:
    """Return ``<folder>/<name><ending>`` with the item's ``name``, or the input's own name, and the format's ending."""
    name = data.get("name", stem(str(image.meta["filename_or_obj"])))
    return folder / f"{name}{ending}{'.nii.gz' if is_nifti(image) else '.png'}"


def write_image(
    image: MetaTensor, path: str | os.PathLike, dtype: type = np.uint8, columns_first: bool = False
) -> None:
    """Write an image, whole or not at all: NIfTI (same affine) where its file was, else PNG.

    Args:
        image: (1, \\*spatial), in the input's geometry; only the last axis of a NIfTI file of one slice may be missing.
        path: the file, whose ending is the format's.
        dtype: of the values in a NIfTI file; those of a PNG are 8-bit.
        columns_first: whether photographs were read columns first.
    """
    with atomic_path(path) as part:
        if is_nifti(image):
            # a file of one slice (H, W, 1) was flattened for a 2D network, and comes back as one
            missing = len(image.meta.get("spatial_shape", ())) - (image.ndim - 1)
            writer = NibabelWriter(output_dtype=dtype)
            values = image[0].reshape(*image.shape[1:], *[1] * missing)
            writer.set_data_array(values, channel_dim=-1, squeeze_end_dims=False, spatial_ndim=None)
            writer.set_metadata(image.meta, resample=False)
            writer.write(part)
        else:
            writer = PILWriter(output_dtype=np.uint8, scale=None)
            writer.set_data_array(image)
            writer.set_metadata(image.meta, resample=False)
            writer.write(part, reverse_indexing=columns_first)
