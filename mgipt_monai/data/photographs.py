# SPDX-License-Identifier: Apache-2.0
"""Photographs, read as a viewer shows them and converted to the channels of the network."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import PILReader
from monai.utils import ensure_tuple
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile

__all__ = ["FORMATS", "PhotographReader", "converted", "open_photograph", "read_photograph"]

logger = logging.getLogger(__name__)

FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats of photographs that are read; Pillow starts other programs for some of the rest."""


def open_photograph(path: str | os.PathLike[str], **settings: Any) -> ImageFile:
    """Open a photograph with Pillow, without its pixels, if it is of one of the formats that are read."""
    Image.init()  # Pillow knows only a few formats before
    return Image.open(path, **{"formats": [kind for kind in FORMATS if kind in Image.OPEN], **settings})


DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")
"""Modes of one channel whose values may exceed 255."""

DEPTHS = (8, 10, 12, 14, 16)
LEAST_LEVELS = 64


class PhotographReader(PILReader):
    """MONAI's ``PILReader`` for photographs as a viewer shows them.

    The EXIF orientation is applied, so that masks have the geometry of the picture as it is displayed. Grey images of
    more than 8 bits keep their grey levels when they are converted: values are scaled to [0, 255] by the file's own
    depth, in floating point. A PNG file has its depth in the chunk ``sBIT``. Otherwise it is the smallest of 8, 10, 12,
    14 and 16 bits that holds the image's highest value, and a line in the log says so.

    Args:
        color_mode: ``RGB`` or ``L`` to convert to; None leaves the channels and values as they are, unless ``channels``
            makes plain what they should be.
        reverse_indexing: whether to read columns first.
        channels: of the network. For 3, grey is repeated, palettes are expanded and alpha is dropped. For 1, a picture
            whose three channels are equal becomes grey; a coloured one stays, to be refused. The log says so once for
            each kind of picture. None, or several files for one image: nothing is converted.
        kwargs: as for ``PIL.Image.open``.

    Raises:
        ValueError: when reading, for a colour image of 16 bits per channel that Pillow would cut to fewer than 64
            levels.
    """

    def __init__(
        self,
        color_mode: str | None = None,
        reverse_indexing: bool = True,
        channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(reverse_indexing=reverse_indexing, **kwargs)
        self.color_mode, self.channels = color_mode, channels
        self._told: set[str] = set()

    def read(self, data: Sequence[PathLike] | PathLike | np.ndarray, **kwargs: Any) -> Any:
        """Read one file, or several as channels; return what :meth:`get_data` takes."""
        settings = {**self.kwargs, **kwargs}
        names = ensure_tuple(data)
        channels = self.channels if len(names) == 1 else None
        images = [_Photograph(name, self.color_mode, settings, channels) for name in names]
        for image in images:
            if image.converted and image.converted not in self._told:
                self._told.add(image.converted)
                logger.info("%s: %s", image.path, image.converted)
        return images if len(images) > 1 else images[0]


class _Photograph:
    """The pixels of a photograph, rows first, with what ``PILReader`` makes metadata of."""

    def __init__(
        self, path: PathLike, color_mode: str | None, settings: Mapping[str, Any], channels: int | None = None
    ) -> None:
        self.path, self.settings = path, settings
        with open_photograph(path, **settings) as picture:
            self.format = picture.format
            self.depth = _significant_bits(path) if picture.format == "PNG" else None
            # of several channels with 16 bits, Pillow keeps the upper 8
            cut = any(";16" in str(tile[3]) for tile in picture.tile) and picture.mode not in DEEP
            upright = ImageOps.exif_transpose(picture)
        self.mode, (self.width, self.height) = upright.mode, upright.size
        pixels = np.asarray(upright)
        if cut and int(pixels.max()) < LEAST_LEVELS:
            raise ValueError(
                f"{path} uses only {int(pixels.max()) + 1} of the 256 levels that can be read of its 16 bits per "
                "channel: scale it to all 16 bits, or save it with 8"
            )
        self.converted = ""
        if color_mode is None and (color_mode := _plain_mode(upright, channels)) is not None:
            self.converted = conversion(self.mode, channels)
            upright = upright if self.mode in (*DEEP, "F") else upright.convert("RGB")
        if color_mode is not None:
            deep = self.mode in (*DEEP, "F")
            pixels = self._scaled(pixels, color_mode) if deep else np.asarray(upright.convert(color_mode))
        self.pixels = pixels

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.pixels if dtype is None else self.pixels.astype(dtype)

    def _scaled(self, pixels: np.ndarray, color_mode: str) -> np.ndarray:
        values = pixels.astype(np.float32)
        if self.mode != "F":  # floating-point numbers have no depth, and stay as they are
            values *= 255 / (2 ** self._depth(float(values.max())) - 1)
        channels = len(Image.new(color_mode, (1, 1)).getbands())
        return values if channels == 1 else np.stack([values] * channels, axis=-1)

    def _depth(self, highest: float) -> int:
        """Return the bits that the values take."""
        if self.depth is not None and highest < 2**self.depth:
            return self.depth
        depth = next((bits for bits in DEPTHS if highest < 2**bits), 32)
        logger.info("%s does not say how many bits it uses: %d, by its highest value %g", self.path, depth, highest)
        return depth


def _plain_mode(picture: Image.Image, channels: int | None) -> str | None:
    """Return the mode to convert a picture to where the network's channels make it plain; None for no conversion."""
    if channels == 3 and picture.mode != "RGB":
        return "RGB"
    if channels == 1 and picture.mode not in ("1", "L", "F", *DEEP):
        colours = np.asarray(picture.convert("RGB"))
        return "L" if (colours == colours[..., :1]).all() else None
    return None


def conversion(kind: str, channels: int | None) -> str:
    """Say in words to what pictures of a kind are converted."""
    to = "RGB" if channels == 3 else "grey, as its channels are equal"
    network = f"{channels} channel{'' if channels == 1 else 's'}"
    return f"a picture of the kind {kind} is converted to {to}, since the network has {network} (see color_mode)"


def converted(values: np.ndarray, color_mode: str | None, channels: int | None = None, bits: int = 8) -> np.ndarray:
    """Convert pixels (H, W) or (H, W, 3) that are not a photograph's as :class:`PhotographReader` does.

    Args:
        values: whole numbers of ``bits`` bits; other values, such as rescaled ones, keep their range.
        color_mode: see there.
        channels: see there.
        bits: that the values use.

    Example:
        >>> converted(np.array([[0, 4095]], dtype=np.uint16), None, channels=3, bits=12)[0, 1].tolist()
        [255.0, 255.0, 255.0]
    """
    grey = values.ndim == 2
    if color_mode is None and channels == 3 and grey:
        color_mode = "RGB"
    if color_mode is None and channels == 1 and not grey and (values == values[..., :1]).all():
        color_mode = "L"
    if color_mode is None:
        return values
    if values.dtype.kind == "u" and bits > 8:
        values = values.astype(np.float32) * (255 / (2**bits - 1))
    if grey:
        return values if color_mode == "L" else np.stack([values] * 3, axis=-1)
    if color_mode == "RGB":
        return values
    return np.asarray(Image.fromarray(np.round(values).astype(np.uint8)).convert(color_mode))


def read_photograph(path: PathLike, color_mode: str | None = None) -> np.ndarray:
    """Return the pixels of a photograph, rows first, as :class:`PhotographReader` reads them.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "grey.png")
        >>> Image.fromarray(np.array([[0, 4095]], dtype=np.uint16)).save(path)
        >>> read_photograph(path, "RGB").tolist()
        [[[0.0, 0.0, 0.0], [255.0, 255.0, 255.0]]]
    """
    return _Photograph(path, color_mode, {}).pixels


def _significant_bits(path: PathLike) -> int | None:
    """Return the bits per sample that a PNG file says are used; None if it does not."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            if head[4:] == b"sBIT":
                bits = file.read(1)
                return bits[0] if bits and 1 <= bits[0] <= 16 else None
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return None
