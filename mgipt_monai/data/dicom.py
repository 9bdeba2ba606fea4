# SPDX-License-Identifier: Apache-2.0
"""DICOM as input: a folder of slices is a volume, a file of its own a picture (needs pydicom)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader, PydicomReader
from monai.utils import ensure_tuple

from mgipt_monai.data.photographs import converted
from mgipt_monai.utils.files import DICOM_ENDING
from mgipt_monai.utils.machine import behind

__all__ = ["DICOM_VOLUME", "DicomReader", "declared_shape", "is_dicom", "is_series", "read_picture", "slices_of"]

POSITION, ORIENTATION = "ImagePositionPatient", "ImageOrientationPatient"
LARGEST_GAP = 0.1  # of the usual distance between slices
DICOM_VOLUME = "dicom_volume"
"""Key of the metadata of a volume that was read from DICOM slices."""
DEFLATED = "1.2.840.10008.1.2.1.99"


def _pydicom() -> Any:
    try:
        import pydicom
    except ModuleNotFoundError:
        raise ModuleNotFoundError('DICOM needs pydicom: pip install "mgipt_monai[dicom]"') from None
    return pydicom


def is_dicom(path: PathLike) -> bool:
    """Return whether a file is DICOM by its content, or a folder has DICOM files by their names."""
    if os.path.isdir(path):
        return bool(slices_of(path))
    with open(path, "rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def slices_of(folder: PathLike) -> list[str]:
    """Return the DICOM files of a folder, sorted by name."""
    return sorted(str(path) for path in Path(folder).iterdir() if path.name.lower().endswith(DICOM_ENDING))


def is_series(folder: PathLike) -> bool:
    """Return whether a folder is one volume: at least two DICOM files, of which the first has a place in space.

    Photographs, such as those of eyes, have none: a folder of these is as many images.

    Raises:
        ModuleNotFoundError: if pydicom is not installed.
        ValueError: if the first file cannot be read.
    """
    files = slices_of(folder)
    return len(files) > 1 and POSITION in _header(files[0])


def declared_shape(path: PathLike) -> list[int]:
    """Return how many values a DICOM file, or a folder of slices, declares: sides, then channels if several.

    Only headers are read.

    Raises:
        ModuleNotFoundError: if pydicom is not installed.
        ValueError: if a header cannot be read, has no pixels, or declares more bytes than the file has.
    """
    if os.path.isdir(path):
        files = slices_of(path)
        shapes = [declared_shape(file) for file in files]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"{path} has slices of several sizes: put each series into a folder of its own")
        return [*shapes[0], len(files)]
    header = _header(path)
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ValueError(f"{path} has {frames} frames: convert it to NIfTI, such as with dcm2niix")
    sides = [int(header.get(side) or 0) for side in ("Rows", "Columns")]
    samples, bits = int(header.get("SamplesPerPixel") or 1), int(header.get("BitsAllocated") or 8)
    if min(sides) < 1:
        raise ValueError(f"{path} has no pixels: leave out DICOM files that are no images")
    size, syntax = os.path.getsize(path), header.file_meta.TransferSyntaxUID
    if not syntax.is_compressed and sides[0] * sides[1] * samples * bits // 8 > size:
        raise ValueError(f"{path} declares more pixels than can be in its {size:,} bytes: copy it again or remove it")
    return [*sides, samples] if samples > 1 else sides


def _header(path: PathLike) -> Any:
    """Read all before the pixels; a compressed header is refused, as it could unfold to any size."""
    pydicom = _pydicom()
    try:
        syntax = pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID")
        if syntax == DEFLATED:
            raise ValueError(f"{path} is a deflated DICOM file: save it without compression of the whole file")
        return pydicom.dcmread(path, stop_before_pixels=True)
    except OSError:
        raise
    except Exception as error:  # pydicom raises many kinds for a damaged header
        if any(isinstance(one, MemoryError) for one in behind(error)) or "deflated" in str(error):
            raise
        raise ValueError(f"{path} cannot be read as DICOM ({error}): copy it again or remove it") from None


class _File:
    """A DICOM file or folder whose pixels are not read yet."""

    def __init__(self, path: str) -> None:
        self.path = path


class DicomReader(ImageReader):
    """MONAI's ``PydicomReader`` for streams: volumes of checked slices, pictures as a viewer shows them.

    A folder of slices is a volume with the axes and the affine of the patient, as NIfTI is read. Slices are sorted by
    their place. A file of its own is a picture, read rows first (see :func:`read_picture`). Values are rescaled by the
    files' slope and intercept. No window is applied.

    Args:
        color_mode: ``RGB`` or ``L`` for pictures; see :class:`mgipt_monai.data.PhotographReader`.
        channels: of the network; see there.
        reverse_indexing: whether to read pictures columns first.

    Raises:
        ModuleNotFoundError: when reading, if pydicom is not installed.
        ValueError: when reading, if slices are of several series, sizes or orientations, are in colour, lie at one
            place or have gaps between them, or a file has several frames.
    """

    def __init__(self, color_mode: str | None = None, channels: int | None = None, reverse_indexing: bool = False):
        super().__init__()
        self.color_mode, self.channels, self.reverse_indexing = color_mode, channels, reverse_indexing

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether the files are DICOM."""
        return all(os.path.exists(name) and is_dicom(name) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        """Return the files of an image; ValueError if they are not DICOM, so that the next reader has its turn."""
        if not self.verify_suffix(data):
            raise ValueError(f"{data} is not DICOM")
        return [_File(str(name)) for name in ensure_tuple(data)]

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return values and metadata; several files are channels."""
        # read here and not in read, whose errors MONAI replaces with those of its other readers
        parts = [self._volume(file.path) if os.path.isdir(file.path) else self._picture(file.path) for file in img]
        arrays, (meta, *_) = [array for array, _ in parts], [meta for _, meta in parts]
        if len(arrays) == 1:
            return arrays[0], meta
        return np.stack(arrays), {**meta, "original_channel_dim": 0}

    def _picture(self, path: str) -> tuple[np.ndarray, dict[str, Any]]:
        values, bits = read_picture(path)
        values = converted(values, self.color_mode, self.channels, bits)
        if self.reverse_indexing:
            values = np.swapaxes(values, 0, 1)
        meta = {"affine": np.eye(4), "original_affine": np.eye(4), "spatial_shape": np.array(values.shape[:2])}
        return values, {**meta, "original_channel_dim": -1 if values.ndim == 3 else float("nan"), "space": "RAS"}

    def _volume(self, path: str) -> tuple[np.ndarray, dict[str, Any]]:
        declared_shape(path)
        slices = _sorted_slices(path)
        reader = PydicomReader()
        # as its own reading of a folder leaves it, whose pattern fails for brackets in names
        names: list[Any] = [[path] * len(slices)]
        reader.has_series, reader.filenames = True, names
        values, meta = reader.get_data(slices)
        if slices[0].get("PhotometricInterpretation") == "MONOCHROME1":
            values = values.max() + values.min() - values
        kept = ("affine", "original_affine", "spatial_shape", "original_channel_dim", "space")
        return values, {key: meta[key] for key in kept} | {DICOM_VOLUME: True}


def _sorted_slices(path: str) -> list[Any]:
    """Return the slices of a series in the order of their places, numbered from 1."""
    slices = [_pydicom().dcmread(file) for file in slices_of(path)]
    own = "put each series into a folder of its own, or convert it to NIfTI, such as with dcm2niix"
    if any(POSITION not in one or ORIENTATION not in one for one in slices):
        raise ValueError(f"{path} has slices without a place in space: {own}")
    if (count := len({one.get("SeriesInstanceUID") for one in slices})) > 1:
        raise ValueError(f"{path} has slices of {count} series: {own}")
    axes = np.array([one[ORIENTATION].value for one in slices], dtype=float)
    if not np.allclose(axes, axes[0], atol=1e-3):
        raise ValueError(f"{path} has slices of several orientations: {own}")
    if any(int(one.get("SamplesPerPixel") or 1) > 1 for one in slices):
        raise ValueError(f"{path} has slices in colour: convert them to pictures, such as PNG")
    normal = np.cross(axes[0][:3], axes[0][3:])
    places = np.array([one[POSITION].value for one in slices], dtype=float) @ normal
    slices = [slices[i] for i in np.argsort(places)]
    gaps = np.diff(np.sort(places))
    usual = float(np.median(gaps))
    if usual <= 0 or gaps.min() <= LARGEST_GAP * usual:
        raise ValueError(f"{path} has several slices at one place, such as phases or echoes: {own}")
    if np.abs(gaps - usual).max() > LARGEST_GAP * usual:
        raise ValueError(
            f"{path} has slices {gaps.min():.2f} to {gaps.max():.2f} mm apart: copy it again if one is missing, or "
            "convert it to NIfTI, such as with dcm2niix"
        )
    for number, one in enumerate(slices, start=1):
        one.InstanceNumber = number  # by which MONAI's reader sorts
    return slices


def read_picture(path: PathLike) -> tuple[np.ndarray, int]:
    """Return the pixels of a DICOM file of one frame, rows first, and the bits per sample that they use.

    Palettes and YBR colours become RGB, MONOCHROME1 (white is low) is inverted, and grey values are rescaled.

    Raises:
        ModuleNotFoundError: if pydicom is not installed.
        ValueError: if the file has several frames, or pixels that cannot be decoded; the message names the file.
    """
    declared_shape(path)
    pydicom = _pydicom()
    picture = pydicom.dcmread(path)
    bits, kind = int(picture.get("BitsStored") or 8), str(picture.get("PhotometricInterpretation"))
    try:
        values = picture.pixel_array
        if kind == "PALETTE COLOR":
            values = pydicom.pixels.apply_color_lut(values, picture)
            bits = 8 * values.dtype.itemsize
        elif kind.startswith("YBR_FULL") and not picture.file_meta.TransferSyntaxUID.is_compressed:
            values = pydicom.pixels.convert_color_space(values, kind, "RGB")
        elif kind.startswith("MONOCHROME"):
            values = pydicom.pixels.apply_modality_lut(values, picture)
    except MemoryError:
        raise
    except Exception as error:  # of decoders that are not installed, or damaged pixels
        raise ValueError(f"{path} has pixels that cannot be decoded: {error}") from error
    if kind == "MONOCHROME1":
        # in the range that the file can hold, so that the images of a stream stay comparable
        signed, top = int(picture.get("PixelRepresentation") or 0), 2**bits - 1
        ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]) if signed else np.array([0, top])
        ends = np.asarray(pydicom.pixels.apply_modality_lut(ends, picture), dtype=np.float64)
        values = (ends.sum() - values).astype(np.float32)
    return np.asarray(values), bits
