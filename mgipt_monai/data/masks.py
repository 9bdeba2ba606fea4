# SPDX-License-Identifier: Apache-2.0
"""Write masks and uncertainty maps in the geometry and format of their images."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelWriter, PILWriter
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_tensor
from PIL import Image
from torch import Tensor

from mgipt_monai.data.dicom import DICOM_VOLUME
from mgipt_monai.data.outputs import MASK_ENDINGS, UNCERTAINTY
from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.metrics import UNADAPTED, expected_dice
from mgipt_monai.networks.prompts.early_stop import Head, check_head
from mgipt_monai.utils.files import stem
from mgipt_monai.utils.outputs import OutputFolder, check_output_name

__all__ = [
    "AddUnadaptedd",
    "AddUncertaintyd",
    "EstimateQualityd",
    "LabelMapd",
    "SaveMaskd",
    "SaveUncertaintyd",
    "draw_label_map",
    "is_nifti",
    "output_name",
    "write_image",
]


AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def is_nifti(image: MetaTensor) -> bool:
    """Return whether an image was read from NIfTI, or is a volume of DICOM slices; masks of both are NIfTI."""
    volume = str(image.meta["filename_or_obj"]).lower().endswith((".nii", ".nii.gz"))
    return volume or bool(image.meta.get(DICOM_VOLUME, False))


def output_name(data: Mapping[Hashable, Any], image: MetaTensor, ending: str = "") -> str:
    """Return ``<name><ending>`` plus the extension; the name is the item's, or else the input file's."""
    name = data.get("name", stem(str(image.meta["filename_or_obj"])))
    check_output_name(name)
    return f"{name}{ending}{MASK_ENDINGS[is_nifti(image)]}"


PALETTE = np.array(
    [
        [0, 0, 0],
        [86, 180, 233],
        [230, 159, 0],
        [0, 158, 115],
        [240, 228, 66],
        [204, 121, 167],
        [213, 94, 0],
        [0, 114, 178],
    ],
    dtype=np.uint8,
)
"""Colours of the values 0 to 7, distinct for all kinds of colour vision; further values begin again at 1."""


def write_image(
    image: MetaTensor,
    path: str | os.PathLike[str],
    dtype: type = np.uint8,
    columns_first: bool = False,
    palette: bool = False,
) -> None:
    """Write an image: NIfTI (same affine) if its file was NIfTI, otherwise PNG.

    Args:
        image: (1, \\*spatial), in the input's geometry; the last axis of a NIfTI file with one slice may be missing.
        path: the file, with the extension of the format.
        dtype: data type of a NIfTI file; PNG is 8-bit.
        columns_first: whether photographs were read columns first.
        palette: whether a PNG shows its values in colours; they stay the same values.
    """
    if is_nifti(image):
        # a file with one slice (H, W, 1) was flattened for a 2D network; its last axis is restored
        missing = len(image.meta.get("spatial_shape", ())) - (image.ndim - 1)
        nifti = NibabelWriter(output_dtype=dtype)
        values = image[0].reshape(*image.shape[1:], *[1] * missing)
        nifti.set_data_array(values, channel_dim=-1, squeeze_end_dims=False, spatial_ndim=None)
        nifti.set_metadata(image.meta, resample=False)
        nifti.write(path)
    else:
        png = PILWriter(output_dtype=np.uint8, scale=None)
        png.set_data_array(image)
        png.set_metadata(image.meta, resample=False)
        png.write(path, reverse_indexing=columns_first)
        if palette:
            colours = PALETTE[[0, *(1 + value % (len(PALETTE) - 1) for value in range(255))]]
            with Image.open(path) as plain:
                coloured = plain.convert("L")
            coloured.putpalette(colours.tobytes())
            coloured.save(path, format="PNG")


def draw_label_map(masks: AnyTensor, values: Sequence[int]) -> AnyTensor:
    """Merge masks of 0 and 1 (C, \\*spatial) into a label map (1, \\*spatial); later channels override earlier ones.

    Raises:
        ValueError: if the number of channels differs from that of values.

    Example:
        >>> draw_label_map(torch.tensor([[[1, 1, 0]], [[0, 1, 0]]]), values=[1, 2])
        tensor([[[1, 2, 0]]])
    """
    if masks.shape[0] != len(values):
        raise ValueError(f"the prediction has {masks.shape[0]} channels, mask_values has {len(values)}")
    drawn = torch.zeros_like(masks[:1])
    for channel, value in zip(masks, values, strict=True):
        drawn[0][channel > 0] = value
    return cast("AnyTensor", drawn)


class LabelMapd(MapTransform):
    """Convert masks to the array that a MONAI Label server writes: unsigned bytes without a channel axis.

    The server's writer expects axes as MONAI's readers return them by default: photographs columns first (W, H), and
    volumes with all axes of the file, including that of a single slice.

    Args:
        keys: masks of 0 and 1 in the input's geometry, one channel per structure (C, \\*spatial), with metadata.
        values: value of each channel's structure in the label map; later channels override earlier ones.
        reverse_indexing: whether photographs were read columns first already.

    Raises:
        ValueError: when called, if the number of channels differs from that of values.

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
        """Convert the masks of each key."""
        result = dict(data)
        for key in self.keys:
            masks = data[key]
            drawn = draw_label_map(masks, self.values)[0].to(torch.uint8)
            if is_nifti(masks):
                missing = len(masks.meta.get("spatial_shape", ())) - drawn.ndim
                result[key] = drawn.reshape(*drawn.shape, *[1] * missing)
            else:
                result[key] = drawn if self.reverse_indexing else drawn.T
        return result


class SaveMaskd(MapTransform):
    """Save each mask as one image: PNG for photographs, NIfTI (same affine) for NIfTI.

    The file is ``<output_dir>/<name>`` plus the extension, with the item's ``name`` (see
    :func:`mgipt_monai.find_stream`), or else the name of the input file. It is written atomically, and no file is
    overwritten that no run wrote (see :class:`mgipt_monai.utils.outputs.OutputFolder`). The mask must already be in the
    input's geometry (``Invertd``); only the last axis of a NIfTI file with one slice may be missing, and is restored.

    Args:
        keys: masks of 0 and 1, one channel per structure (C, \\*spatial).
        output_dir: folder to write to; it must be writable.
        values: value of each channel's structure in the file; later channels override earlier ones.
        reverse_indexing: whether photographs were read columns first, as MONAI's ``PILReader`` does by default.
        palette: whether PNG files show their values in colours; a reader of palettes' indices gets the same values.

    Raises:
        FileExistsError: when called, if a file stands there that no run wrote.
        OSError: at construction, if the folder cannot be created or written to.
        ValueError: when called, if the name leaves the folder, or the number of channels differs from that of values.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | os.PathLike[str],
        values: Sequence[int] = (1,),
        reverse_indexing: bool = False,
        palette: bool = False,
    ) -> None:
        super().__init__(keys)
        self.reverse_indexing, self.palette = reverse_indexing, palette
        self.folder = OutputFolder(output_dir)
        self.values = values
        self.folder.prepare()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save the mask of each key; the data are returned unchanged."""
        for key in self.keys:
            drawn = draw_label_map(data[key], self.values)
            with self.folder.writing(output_name(data, data[key])) as part:
                write_image(drawn, part, columns_first=self.reverse_indexing, palette=self.palette)
        return dict(data)


class AddUncertaintyd(Transform):
    """Add the disagreement map (1, \\*spatial) of a prediction's views to the data.

    Args:
        inferer: the inferer of the prediction, whose method has an ``uncertainty``, such as MGIPT.
        prediction: key of the latest prediction, not transformed yet; the map gets its metadata.
        key: key of the map.

    Raises:
        ValueError: at construction, if the method has no uncertainty or the inferer adapts to each slice on its own.
        RuntimeError: when called, if the inferer has not predicted an image yet.
    """

    def __init__(self, inferer: AdaptiveInferer, prediction: str = "pred", key: str = "uncertainty") -> None:
        if not inferer.method.has_uncertainty:
            raise ValueError(
                f"{type(inferer.method).__name__}, as it is set, has no uncertainty: use MGIPT, or set "
                "save_uncertainty to false"
            )
        if inferer.slices == "own":
            raise ValueError("slices='own' has an uncertainty per slice but none for the volume: use slices='shared'")
        self.inferer, self.prediction, self.key = inferer, prediction, key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the map."""
        maps = self.inferer.method.uncertainty
        if maps is None:
            raise RuntimeError("there is no uncertainty map: predict the image with this inferer first")
        return {**data, self.key: MetaTensor(maps[0]).copy_meta_from(data[self.prediction])}


class AddUnadaptedd(Transform):
    """Add the logits without adaptation (K, \\*spatial) of a prediction to the data.

    Args:
        inferer: the inferer of the prediction, with ``side_by_side``.
        prediction: key of the latest prediction, not transformed yet; the logits get its metadata.
        key: key of the logits without adaptation.

    Raises:
        ValueError: at construction, if the inferer predicts only with adaptation.
        RuntimeError: when called, if the inferer has not predicted an image yet.
    """

    def __init__(self, inferer: AdaptiveInferer, prediction: str = "pred", key: str = UNADAPTED) -> None:
        if not inferer.side_by_side:
            raise ValueError("the inferer predicts only with adaptation: give it side_by_side=True")
        self.inferer, self.prediction, self.key = inferer, prediction, key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the logits."""
        logits = self.inferer.method.unadapted
        if logits is None:
            raise RuntimeError("there is no prediction without adaptation: predict the image with this inferer first")
        return {**data, self.key: MetaTensor(logits[0]).copy_meta_from(data[self.prediction])}


class EstimateQualityd(MapTransform):
    """Add ``quality``, for each class the Dice to expect of the mask, without a label.

    See :func:`mgipt_monai.metrics.expected_dice` for what it is. With ``calibration``, the line through the Dice of
    labelled images, it is an estimate of the Dice; without, it is a score that says which masks to look at first.

    Args:
        keys: the map of probabilities (channels, \\*spatial), one key.
        head: ``sigmoid``, each channel a structure, or ``softmax``, where channel 0 is background and gets no quality.
        calibration: intercept and slope for each structure, as commissioning writes them; None leaves the score.
        result: key of a dict, such as MONAI Label's response, that gets the ``quality`` too; None: none.

    Raises:
        ValueError: at construction, for several keys or an unknown head; when called, if there are not as many lines as
            structures.

    Example:
        >>> EstimateQualityd("pred")({"pred": torch.tensor([[[0.75, 0.75, 0.0]]])})["quality"]
        [0.8571428571428571]
    """

    def __init__(
        self,
        keys: KeysCollection,
        head: Head = "sigmoid",
        calibration: Sequence[Sequence[float]] | None = None,
        result: str | None = None,
    ) -> None:
        super().__init__(keys)
        if len(self.keys) != 1:
            raise ValueError(f"the quality is that of one prediction, got the keys {', '.join(map(str, self.keys))}")
        check_head(head)
        self.head, self.calibration, self.result = head, calibration, result

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the quality."""
        likely = convert_to_tensor(data[self.keys[0]], track_meta=False).clamp(0, 1)  # interpolation may leave [0, 1]
        if self.head == "sigmoid":
            masks = likely > 0.5
        else:
            labels, likely = likely.argmax(dim=0), likely[1:]
            masks = torch.stack([labels == channel for channel in range(1, len(likely) + 1)])
        quality = expected_dice(likely, masks)
        if self.calibration is not None:
            if len(self.calibration) != len(quality):
                raise ValueError(f"the calibration has {len(self.calibration)} lines for {len(quality)} structures")
            lines = zip(quality, self.calibration, strict=True)
            quality = [min(1.0, max(0.0, start + slope * value)) for value, (start, slope) in lines]
        found = {**data, "quality": quality}
        if self.result is not None:
            found[self.result] = {**data.get(self.result, {}), "quality": quality}
        return found


class SaveUncertaintyd(MapTransform):
    """Save maps in [0, 1] as ``<output_dir>/<name>_uncertainty``: 8-bit PNG (255 is 1), or NIfTI of 32-bit numbers.

    Format, names and geometry are as for :class:`SaveMaskd`, which checks that the folder is writable.

    Args:
        keys: maps (1, \\*spatial).
        output_dir: folder to write to.
        reverse_indexing: whether photographs were read columns first, as MONAI's ``PILReader`` does by default.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | os.PathLike[str], reverse_indexing: bool = False
    ) -> None:
        super().__init__(keys)
        self.folder, self.reverse_indexing = OutputFolder(output_dir), reverse_indexing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save the map of each key; the data are returned unchanged."""
        for key in self.keys:
            values = data[key].clamp(0, 1)
            if not is_nifti(values):
                values = (255 * values).round()
            with self.folder.writing(output_name(data, values, UNCERTAINTY)) as part:
                write_image(values, part, np.float32, self.reverse_indexing)
        return dict(data)
