# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, and states of tensors that survive a crash."""

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
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a name to write to that takes the place of ``path`` only after the block has ended without an error.

    The name has the same ending, since writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_state(state: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a state of tensors and plain types; a crash leaves the old file or the new one, never a broken one."""
    with atomic_path(path) as part, part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load_state(path: str | os.PathLike, what: str = "adaptation state") -> dict[str, Any]:
    """Read a state that :func:`save_state` wrote, called ``what`` in messages; no code in it is ever run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a readable state, naming the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {what} at {path}")
    try:
        # torch does not look at the check sums that it writes, and would take a flipped bit for a number
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"{broken} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable {what} ({error}): remove it to start anew") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not the {what}: remove it to start anew")
    return state
