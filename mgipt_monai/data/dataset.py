# SPDX-License-Identifier: Apache-2.0
"""The images of a stream, read: sizes checked before decoding, failures as items."""

from __future__ import annotations

import errno
import gzip
import math
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import IO, Any, cast

import nibabel
from monai.data import Dataset
from monai.utils import ensure_tuple
from nibabel.spatialimages import HeaderDataError
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from mgipt_monai.data.dicom import declared_shape, is_dicom
from mgipt_monai.data.photographs import open_photograph
from mgipt_monai.utils.files import root_cause, with_file_name
from mgipt_monai.utils.machine import behind, machine_failure, out_of_memory

__all__ = [
    "FAILURE",
    "KIND",
    "MACHINE",
    "MAX_VALUES",
    "MEMORY",
    "PLACE",
    "UNREADABLE",
    "StreamDataset",
    "check_declared_size",
]

MAX_VALUES = 2**28
"""Default limit: as many values as a volume of 512 x 512 x 1024, about 3 GB while it is read."""

BEST_COMPRESSION = 1100  # bytes that deflate can make of one, with some to spare
LONGEST_LOOK = 2**31  # bytes of a file that are read to find an I/O error
LARGEST_EXTENSIONS = 2**24  # bytes before the data of a NIfTI file


def check_declared_size(key: str, path: str | os.PathLike[str], max_values: int = MAX_VALUES) -> None:
    """Raise ValueError if a file declares more values than a limit, or more than a file of its length can hold.

    Only headers are read. A file that is no image by its content is refused, whatever its name: MONAI would try one
    reader after the other, and some have run code that is in a file.

    Args:
        key: what the file is, for the message.
        path: a photograph, a NIfTI or DICOM file, or a folder of DICOM slices; the content counts, not the name.
        max_values: limit on the number of pixels or voxels times channels.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "eye.png")
        >>> Image.new("RGB", (40, 50)).save(path)
        >>> check_declared_size("image", path)
        >>> check_declared_size("image", path, max_values=5999)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: image file ... declares 50 x 40 x 3 = 6,000 values, more than max_values=5,999: raise max_values ...
    """
    if is_dicom(path):
        _check_count(f"{key} file {path}", declared_shape(path), max_values)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = open_photograph(path)
    except UnidentifiedImageError:
        _check_volume(f"{key} file {path}", path, max_values)
        return
    except Image.DecompressionBombError as error:
        raise ValueError(f"{key} file {path} declares too many pixels to be read ({error})") from None
    except Exception as error:  # Pillow raises many kinds for a damaged header
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise _no_image(f"{key} file {path}") from None
    with picture:
        _check_photograph(f"{key} file {path}", path, picture, max_values)


def _check_photograph(what: str, path: str | os.PathLike[str], picture: ImageFile, max_values: int) -> None:
    length = os.path.getsize(path)
    width, height = picture.size
    channels = len(picture.getbands())
    _check_count(what, [height, width, *([channels] if channels > 1 else [])], max_values)
    if picture.format == "PNG":
        with open(path, "rb") as file:
            header = file.read(26)
        depth, samples = header[24], {2: 3, 4: 2, 6: 4}.get(header[25], 1)
        _check_length(what, width * height * depth * samples // 8, length, BEST_COMPRESSION)
    elif picture.tile and all(tile[0] == "raw" for tile in picture.tile):
        bits = 1 if picture.mode == "1" else 4 if picture.mode == "P" else 8
        _check_length(what, width * height * channels * bits // 8, length, 1)


def _check_volume(what: str, path: str | os.PathLike[str], max_values: int) -> None:
    length, packed = os.path.getsize(path), str(path).lower().endswith(".gz")
    try:
        with cast("IO[bytes]", gzip.open(path) if packed else open(path, "rb")) as file:
            block = file.read(540)
            if block[344:348] == b"n+1\0":
                header, size = nibabel.Nifti1Header(block[:348], check=False), 348
            elif block[4:8] == b"n+2\0" and len(block) == 540:
                header, size = nibabel.Nifti2Header(block, check=False), 540
            else:
                raise _no_image(what)
            offset, bits = float(header["vox_offset"]), int(header["bitpix"])
            dimensions = [int(side) for side in header["dim"][1 : 1 + max(0, min(7, int(header["dim"][0])))]]
            if not size <= offset <= LARGEST_EXTENSIONS or not offset.is_integer():
                offset_fix = "its data begin at a place that cannot be: copy it again, or convert it again"
                raise ValueError(f"{what} declares that {offset_fix} ({offset:g})")
            if not dimensions or min(dimensions) < 1 or bits < 1:
                raise ValueError(f"{what} declares an image without voxels, {dimensions}: copy it again")
            _check_count(what, dimensions, max_values)
            whole = int(offset) + math.prod(dimensions) * bits // 8
            _check_length(what, whole, length, BEST_COMPRESSION if packed else 1)
            _check_extensions(what, file, size, int(offset), header.endianness)
    except (OSError, EOFError, zlib.error, HeaderDataError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _no_image(what) from None


def _check_extensions(what: str, file: IO[bytes], size: int, offset: int, endianness: str) -> None:
    """Check the lengths of what lies between header and data, as nibabel reads it all at once."""
    file.seek(size)
    flag, place = file.read(4), size + 4
    while flag[:1] not in (b"", b"\0") and place + 16 <= offset:
        file.seek(place)
        length = int.from_bytes(file.read(4), "little" if endianness == "<" else "big", signed=True)
        if not 16 <= length <= offset - place:
            raise ValueError(
                f"{what} has a header extension of {length:,} bytes in {offset - place:,}: convert it again"
            )
        place += length


def _no_image(what: str) -> ValueError:
    return ValueError(f"{what} cannot be read as an image: copy it again, or convert it to PNG or NIfTI")


def _check_count(what: str, shape: list[int], max_values: int) -> None:
    count = math.prod(shape)
    if count > max_values:
        raise ValueError(
            f"{what} declares {' x '.join(map(str, shape))} = {count:,} values, more than max_values={max_values:,}: "
            "raise max_values if that is true, or make it smaller"
        )


def _check_length(what: str, declared: int, length: int, ratio: int) -> None:
    if declared > ratio * length:
        raise ValueError(
            f"{what} declares {declared:,} bytes, which cannot be in its {length:,}: it is truncated or damaged, copy "
            "it again or remove it"
        )


FAILURE = "failure"
MACHINE, MEMORY = "machine", "memory"
"""Keys of a failure of the machine: what failed, and whether memory ran out."""
KIND, UNREADABLE = "kind", "unreadable"
"""Key of the kind of a failure, and the kind of an image whose file gives an I/O error."""
PLACE = ("name", "site", "round")
"""The keys of an item that identify the image in the stream."""


class StreamDataset(Dataset):
    """A MONAI ``Dataset`` for streams that returns an item that cannot be read as a failure.

    A failure has the item's ``name``, ``site`` and ``round`` (those it has) and ``failure``, which names the file and
    the fix. :class:`mgipt_monai.StreamingAdaptationEvaluator` records it and continues, or stops if the machine failed
    (no memory, no space), which ``machine`` then says. A file that gives an I/O error is read a second time, and is
    then a failure of the ``kind`` ``unreadable``. Constructed like ``monai.data.Dataset``, from the items of
    :func:`mgipt_monai.find_stream`.

    Args:
        data: the items.
        transform: as for ``monai.data.Dataset``.
        max_values: limit on the pixels or voxels times channels that a file may declare, checked before it is read (see
            :func:`mgipt_monai.data.check_declared_size`). None allows any file, for transforms with other readers.

    Example:
        >>> dataset = StreamDataset([{"image": "absent.png", "site": "A", "name": "A/absent"}])
        >>> dataset[0]["failure"]
        'image file absent.png does not exist'
    """

    def __init__(
        self,
        data: Sequence[Any],
        transform: Sequence[Callable] | Callable | None = None,
        max_values: int | None = MAX_VALUES,
    ) -> None:
        super().__init__(data, transform)
        self.max_values = max_values

    def _transform(self, index: int) -> Any:
        item = self.data[index]
        try:
            return self._load(item, index)
        except Exception as error:
            if not gives_io_error(error, item):
                return self._failure(error, item)
        try:  # it may have been the cable
            return self._load(item, index)
        except Exception as error:
            failure = self._failure(error, item)
            if not gives_io_error(error, item):
                return failure
            reason = "gives an I/O error where it is read: copy it again from another place, or look at the disk"
            own = {key: value for key, value in failure.items() if key not in (MACHINE, MEMORY)}
            return {**own, FAILURE: with_file_name(reason, files_of(item)), KIND: UNREADABLE}

    def _load(self, item: Any, index: int) -> Any:
        files = [(key, path) for key in ("image", "label") for path in ensure_tuple(item.get(key, ()))]
        for limit in (None, self.max_values):  # a missing mask before anything is looked into
            for key, path in files:
                check_file(key, path, limit)
        return super()._transform(index)

    def _failure(self, error: Exception, item: Any) -> dict[str, Any]:
        place = {key: item[key] for key in PLACE if key in item}
        failure = {"name": next(iter(files_of(item)), ""), **place, FAILURE: explain(error, item)}
        if (what := machine_failure(error, writing=False)) is not None:
            # as text: an exception of a worker process would arrive with that process's traceback as its message
            failure |= {MACHINE: what, MEMORY: out_of_memory(error)}
        return failure


def check_file(key: str, path: str | os.PathLike[str], max_values: int | None = MAX_VALUES) -> None:
    """Raise an error that names the file if it does not exist, is empty, or cannot be read within the limit."""
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise
        raise FileNotFoundError(f"{key} file {path} does not exist") from None
    if size == 0 and not os.path.isdir(path):
        raise ValueError(f"{key} file {path} is empty: copy it again or remove it")
    if max_values is not None:
        check_declared_size(key, path, max_values)


def gives_io_error(error: BaseException, item: dict[str, Any]) -> bool:
    """Whether an item failed since one of its files gives an I/O error, which readers may hide in other errors."""
    files = files_of(item)
    for one in behind(error) if files else ():
        # one of another file, such as a cache, is the machine's failure
        if isinstance(one, OSError) and one.errno == errno.EIO:
            return one.filename is None or os.fspath(one.filename) in files
    try:
        for path in filter(os.path.isfile, files):  # a pipe would have to be waited for
            with open(path, "rb") as file:
                while file.tell() < LONGEST_LOOK and file.read(1 << 20):
                    pass
    except (OSError, ValueError) as found:
        return isinstance(found, OSError) and found.errno == errno.EIO
    return False


def explain(error: BaseException, item: dict[str, Any]) -> str:
    """Return the message of the error's root cause, with a file name."""
    text = root_cause(error)
    if "cannot find a suitable reader" in text:
        text = "cannot be read as an image: copy it again, or convert it to PNG or NIfTI"
    if "Compressed file ended" in text:
        text = "is truncated: copy it again or remove it"
    return with_file_name(text, files_of(item) or [str(item.get("name"))])


def files_of(item: dict[str, Any]) -> list[str]:
    """Return the paths of an item's image and label files."""
    return [str(path) for key in ("image", "label") for path in ensure_tuple(item.get(key, ()))]
