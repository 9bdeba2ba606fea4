# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, and the names of images' files, in outputs and in messages."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import secrets
import socket
import time
import traceback
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import CommonKeys, ensure_tuple

from mgipt_monai.utils.pickles import check_pickle

__all__ = [
    "IMAGE_ENDINGS",
    "atomic_path",
    "check_zip",
    "clear_parts",
    "file_names",
    "first_cause",
    "is_own",
    "load_state",
    "plain_cell",
    "plain_text",
    "root_cause",
    "save_state",
    "stem",
    "with_file_name",
    "write_csv",
]

PACKAGE = Path(__file__).parents[1]
PART = re.compile(r"\.part-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<token>[0-9a-f]{8})-")
SEAL = b"sha256:"
SEAL_LENGTH = len(SEAL) + 64
ABANDONED = 3600.0  # seconds after which a part belongs to no run, wherever it comes from


@lru_cache(maxsize=1)
def _process(pid: int) -> str:
    """Return what the parts of this process begin with; by pid, as a fork is a process of its own."""
    return f"{_host()}-{pid}-{secrets.token_hex(4)}-"


@lru_cache(maxsize=1)
def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to that replaces ``path`` only if the block ends without an error.

    It has the same extension, as writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # of a long name only the end, so that the part's own name is not too long
    part = path.with_name(f".part-{_process(os.getpid())}{path.name[-48:]}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def clear_parts(folder: str | os.PathLike[str]) -> None:
    """Remove the half-written files that killed processes left below a folder; those of running ones stay.

    What a process on another machine left is removed when it is an hour old.
    """
    for part in Path(folder).rglob(".part-*"):
        with suppress(OSError):  # another process may clear the same folder
            if _is_abandoned(part):
                part.unlink()


def _is_abandoned(part: Path) -> bool:
    owner = PART.match(part.name)
    if owner is not None and owner["host"] == _host():
        if int(owner["pid"]) == os.getpid():
            # in a container each start may have the same number
            return not part.name.startswith(f".part-{_process(os.getpid())}")
        if not _is_running(int(owner["pid"])):
            return True
    return time.time() - part.lstat().st_mtime > ABANDONED


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # a signal would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def save_state(state: dict[str, Any], path: str | os.PathLike[str], sealed: bool = False) -> None:
    """Write a state of tensors and plain types atomically: a crash leaves the old file or the new one.

    Args:
        state: what to write.
        path: the file.
        sealed: whether to add a fingerprint of the whole file (SHA-256, the comment of the zip file), which
            :func:`load_state` verifies beside the check sums of its parts.
    """
    with atomic_path(path) as part, part.open("w+b") as file:
        torch.save(state, file)
        if sealed:
            file.seek(0)
            content = file.read()
            file.seek(len(content) - 2)
            file.write(SEAL_LENGTH.to_bytes(2, "little") + _seal(content))
        file.flush()
        os.fsync(file.fileno())


def load_state(path: str | os.PathLike[str], what: str = "adaptation state") -> dict[str, Any]:
    """Read a state written by :func:`save_state`, called ``what`` in messages; code in it is never executed.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a readable state, with the name of the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {what} at {path}")
    try:
        _check_seal(path)
        check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable {what} ({error}): remove it to start again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not the {what}: remove it to start again")
    return state


def _seal(content: bytes) -> bytes:
    return SEAL + hashlib.sha256(content).hexdigest().encode()


def _check_seal(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a file ends as torch.save writes it, or with the fingerprint of all before it."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 22))
        end = file.read()  # of a zip file without a comment
        if end.startswith(b"PK\5\6") and end.endswith(bytes(2)):
            return
        file.seek(0)
        content = file.read()
    own, seal = content[:-SEAL_LENGTH], content[-SEAL_LENGTH:]
    if own[-2:] != SEAL_LENGTH.to_bytes(2, "little") or seal != _seal(own[:-2] + bytes(2)):
        raise ValueError("the file is damaged")


def check_zip(path: str | os.PathLike[str]) -> None:
    """Verify the check sums of a file of ``torch.save``, which torch writes but does not verify when it reads.

    Raises:
        ValueError: if a part is damaged, or would take for ever to unfold.
        zipfile.BadZipFile: if it is no such file, or damaged as a whole.
    """
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("a part of it is compressed, which torch.save never does")
        if broken := archive.testzip():
            raise ValueError(f"{broken} in it is damaged")
        for entry in archive.infolist():
            if entry.filename.lower().endswith(".pkl"):  # torch finds it in capitals too
                check_pickle(archive.read(entry))


FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def plain_cell(value: Any) -> Any:
    """Return a cell that is no formula: a text that begins like one gets an apostrophe; all else stays as it is.

    Example:
        >>> plain_cell("=1+1"), plain_cell("eye"), plain_cell(-0.5)
        ("'=1+1", 'eye', -0.5)
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows (column to cell) as one table; cells that a row lacks are empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    # a file name that is not UTF-8 is written with question marks
    with Path(path).open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow([plain_cell(column) for column in columns])
        writer.writerows([[plain_cell(row.get(column)) for column in columns] for row in rows])


DICOM_ENDING = ".dcm"
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".nii", ".nii.gz", DICOM_ENDING)


def stem(path: str | os.PathLike[str]) -> str:
    """Return a file name without its extension (``.nii.gz`` is one extension)."""
    name = os.path.basename(path)
    return next((name[: -len(ending)] for ending in (".nii.gz", *IMAGE_ENDINGS) if name.lower().endswith(ending)), name)


def file_names(batch: Any) -> list[str]:
    """Return the file names of the images of a batch, if their metadata have them.

    Args:
        batch: images, or a dict with images under ``image``, as from an evaluator or a ``DataLoader``.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> file_names({"image": MetaTensor(torch.rand(1, 3, 8, 8), meta={"filename_or_obj": ["eye.png"]})})
        ['eye.png']
    """
    images = batch.get(CommonKeys.IMAGE) if isinstance(batch, Mapping) else batch
    return [str(name) for name in ensure_tuple(getattr(images, "meta", {}).get("filename_or_obj", ()))]


def with_file_name(message: str, files: Sequence[str]) -> str:
    """Return a message that names one of the files: unchanged if it does, otherwise with the first name in front.

    Example:
        >>> with_file_name("too dark", ["eye.png"]), with_file_name("eye.png is too dark", ["eye.png"])
        ('eye.png: too dark', 'eye.png is too dark')
    """
    return message if not files or any(file in message for file in files) else f"{files[0]}: {message}"


def plain_text(text: str) -> str:
    """Return a text that matplotlib draws as it is, instead of setting what lies between dollars as a formula.

    Example:
        >>> plain_text("A$x_{$")
        'A\\\\$x_{\\\\$'
    """
    return text.replace("$", r"\$")


BARE = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)
"""Kinds of errors whose messages name neither what is wrong nor a fix."""


def first_cause(error: BaseException) -> BaseException:
    """Return the error that a user is told of: the outermost one in this package's words, or else the first cause.

    MONAI wraps the errors of transforms and config entries in errors of its own.

    Example:
        >>> try:
        ...     try:
        ...         with_file_name("too dark", files=3)
        ...     except TypeError as cause:
        ...         raise RuntimeError("applying transform") from cause
        ... except RuntimeError as error:
        ...     type(first_cause(error))
        <class 'TypeError'>
    """
    while not is_own(error) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_own(error: BaseException) -> bool:
    """Whether a ``raise`` of this package made the error, whose message then says what is wrong and what to do."""
    last = traceback.extract_tb(error.__traceback__, limit=-1)
    return bool(last) and Path(last[0].filename).is_relative_to(PACKAGE) and str(last[0].line).startswith("raise ")


def root_cause(error: BaseException) -> str:
    """Return the message of :func:`first_cause`.

    One of Python's own that only says what could not be done becomes a sentence.

    Example:
        >>> try:
        ...     try:
        ...         raise ValueError("too dark")
        ...     except ValueError as cause:
        ...         raise RuntimeError("applying transform") from cause
        ... except RuntimeError as error:
        ...     root_cause(error)
        'too dark'
    """
    error = first_cause(error)
    text = str(error).strip() or type(error).__name__
    if isinstance(error, np.linalg.LinAlgError):
        return f"the header has no valid affine ({text}): repair sform, qform and pixdim, or convert the file again"
    if isinstance(error, BARE) and type(error).__module__ == "builtins" and not is_own(error):
        kind = type(error).__name__
        return f"it is not of a kind that can be processed ({kind}: {text}): look at its shape and type, or convert it"
    return text
