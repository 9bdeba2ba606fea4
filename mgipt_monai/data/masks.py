# SPDX-License-Identifier: Apache-2.0
"""Write masks and uncertainty maps in the geometry and format of their images."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelWriter, PILWriter
from monai.transforms import MapTransform, Transform
from torch import Tensor

from mgipt_monai.data.streams import stem
from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.utils.files import atomic_path

__all__ = [
    "AddUncertaintyd",
    "LabelMapd",
    "SaveMaskd",
    "SaveUncertaintyd",
    "draw_label_map",
    "is_nifti",
    "output_path",
    "write_image",
]


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


def draw_label_map(masks: Tensor, values: Sequence[int]) -> Tensor:
    """Draw masks over each other, later channels over earlier ones: (C, \\*spatial) of 0 and 1 to (1, \\*spatial).

    Raises:
        ValueError: if there are not as many channels as values.

    Example:
        >>> draw_label_map(torch.tensor([[[1, 1, 0]], [[0, 1, 0]]]), values=[1, 2])
        tensor([[[1, 2, 0]]])
    """
    if masks.shape[0] != len(values):
        raise ValueError(f"the prediction has {masks.shape[0]} channels, mask_values has {len(values)}")
    drawn = torch.zeros_like(masks[:1])
    for channel, value in zip(masks, values, strict=True):
        drawn[0][channel > 0] = value
    return drawn


class LabelMapd(MapTransform):
    """Turn masks into the array that a MONAI Label server writes: unsigned bytes without a channel axis.

    Its writer takes axes as MONAI's readers give them by default: photographs columns first (W, H), and volumes with
    all axes of the file, that of a single slice included.

    Args:
        keys: masks of 0 and 1 in the input's geometry, one channel per structure (C, \\*spatial), with its meta data.
        values: the value that each channel's structure gets; a later channel is drawn over an earlier one.
        reverse_indexing: whether photographs were read columns first already.

    Raises:
        ValueError: when called, if there are not as many channels as values.

    Example:
        >>> from monai.data import MetaTensor
        >>> masks = MetaTensor(torch.ones(2, 4, 6), meta={"filename_or_obj": "eye.png"})  # four rows
        >>> drawn = LabelMapd("pred", values=[1, 2])({"pred": masks})["pred"]
        >>> drawn.shape, drawn.dtype
        (torch.Size([6, 4]), torch.uint8)
    """

    def __init__(self, keys: KeysCollection, values: Sequence[int] = (1,), reverse_indexing: bool = False) -> None:
        super().__init__(keys)
        self.values = values
        self.reverse_indexing = reverse_indexing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw each key's masks."""
        result = dict(data)
        for key in self.keys:
            masks = data[key]
            drawn = draw_label_map(masks, self.values)[0].to(torch.uint8)
            if str(masks.meta["filename_or_obj"]).lower().endswith((".nii", ".nii.gz")):
                missing = len(masks.meta.get("spatial_shape", ())) - drawn.ndim
                result[key] = drawn.reshape(*drawn.shape, *[1] * missing)
            else:
                result[key] = drawn if self.reverse_indexing else drawn.T
        return result


class SaveMaskd(MapTransform):
    """Save masks as one image each: PNG for photographs, NIfTI (same affine) for NIfTI.

    The file is ``<output_dir>/<name><ending>`` with the item's ``name`` (see :func:`mgipt_monai.find_stream`), or the
    input's own name. It is written whole or not at all. The mask must be in the input's geometry already (``Invertd``);
    only the last axis of a NIfTI file of one slice may be missing, and is put back.

    Args:
        keys: masks of 0 and 1, one channel per structure (C, \\*spatial).
        output_dir: folder to write to; it must be possible to write there.
        values: the value that each channel's structure gets; a later channel is drawn over an earlier one.
        reverse_indexing: whether photographs were read columns first, as MONAI's ``PILReader`` does by default.

    Raises:
        OSError: at construction, if the folder cannot be made or written to.
        ValueError: when called, if there are not as many channels as values.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | os.PathLike,
        values: Sequence[int] = (1,),
        reverse_indexing: bool = False,
    ) -> None:
        super().__init__(keys)
        self.reverse_indexing = reverse_indexing
        self.output_dir = Path(output_dir)
        self.values = values
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.output_dir / "write_test") as part:
                part.touch()
        except OSError as error:
            raise OSError(
                f"cannot write to the output folder {self.output_dir} ({error.strerror}): choose another output_dir"
            ) from error
        (self.output_dir / "write_test").unlink(missing_ok=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save each key's mask; the data pass unchanged."""
        for key in self.keys:
            path = output_path(self.output_dir, data, data[key])
            write_image(draw_label_map(data[key], self.values), path, columns_first=self.reverse_indexing)
        return dict(data)


class AddUncertaintyd(Transform):
    """Put the map of the views' disagreement (1, \\*spatial) beside the prediction that it belongs to.

    Args:
        inferer: what made the prediction, with a method that has an ``uncertainty``, such as MGIPT.
        prediction: key of the latest prediction, untransformed; its meta data are taken over.
        key: the map's key.

    Raises:
        ValueError: at construction, for a method without views that could disagree, or slices adapted to one by one.
    """

    def __init__(self, inferer: AdaptiveInferer, prediction: str = "pred", key: str = "uncertainty") -> None:
        if not hasattr(inferer.method, "uncertainty"):
            raise ValueError(
                f"{type(inferer.method).__name__} has one view of an image, so none disagree: use MGIPT, or set "
                "save_uncertainty to false"
            )
        if inferer.slices == "own":
            raise ValueError("slices='own' has an uncertainty for each slice, none for the volume: use slices='shared'")
        self.inferer, self.prediction, self.key = inferer, prediction, key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the map."""
        uncertainty = MetaTensor(self.inferer.method.uncertainty[0])
        return {**data, self.key: uncertainty.copy_meta_from(data[self.prediction])}


class SaveUncertaintyd(MapTransform):
    """Save maps in [0, 1] as ``<output_dir>/<name>_uncertainty``: 8-bit PNG (255 is 1), or NIfTI of 32-bit numbers.

    Format, names and geometry are those of :class:`SaveMaskd`, which makes sure that the folder can be written to.

    Args:
        keys: maps (1, \\*spatial).
        output_dir: folder to write to.
        reverse_indexing: whether photographs were read columns first, as MONAI's ``PILReader`` does by default.
    """

    def __init__(self, keys: KeysCollection, output_dir: str | os.PathLike, reverse_indexing: bool = False) -> None:
        super().__init__(keys)
        self.output_dir, self.reverse_indexing = Path(output_dir), reverse_indexing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save each key's map; the data pass unchanged."""
        for key in self.keys:
            values = data[key].clamp(0, 1)
            if not is_nifti(values):
                values = (255 * values).round()
            path = output_path(self.output_dir, data, values, "_uncertainty")
            write_image(values, path, np.float32, self.reverse_indexing)
        return dict(data)
