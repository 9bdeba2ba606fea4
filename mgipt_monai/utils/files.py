# SPDX-License-Identifier: Apache-2.0
"""Atomic writing of files, and saving and loading of tensor states."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["atomic_path", "load_state", "save_state"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to that replaces ``path`` only if the block ends without an error.

    It has the same extension, as writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_state(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state of tensors and plain types atomically: a crash leaves the old file or the new one."""
    with atomic_path(path) as part, part.open("wb") as file:
        torch.save(state, file)
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
        # torch does not verify the checksums that it writes, and would read a flipped bit as another number
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"{broken} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable {what} ({error}): remove it to start again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not the {what}: remove it to start again")
    return state
