# SPDX-License-Identifier: Apache-2.0
"""What a run needs to be safe from its machine: noted attempts, watched folders, its pipeline's settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import ImageReader
from monai.inferers import Inferer
from monai.transforms import Transform

from mgipt_monai.utils.machine import MachineFailureError

__all__ = ["Attempts", "WatchedFolders", "describe", "file_text"]


class Attempts:
    """Counts how often a process began with an image and did not come to its end.

    Args:
        path: the note's file; it is there only while a run is under way, and after one that died.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "state.pt.attempt")
        >>> Attempts(path).begin(7)  # and the process dies
        >>> again = Attempts(path)
        >>> again.read()
        >>> again.count(7), again.count(8)
        (1, 0)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._counts: dict[int, int] = {}
        self._begun: int | None = None

    def read(self) -> None:
        """Read what an earlier run left; a damaged note counts as none."""
        self._begun = None
        try:
            found = json.loads(self.path.read_bytes())
            self._counts = {int(position): int(count) for position, count in found.items()}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            self._counts = {}

    def count(self, position: int) -> int:
        """Return how often a process died at the image at this position."""
        return self._counts.get(position, 0)

    @property
    def latest(self) -> int | None:
        """The last position at which a process died and which is not done yet."""
        return max(self._counts, default=None)

    def move(self, old: int, new: int) -> None:
        """Move the note of an image to its new position."""
        if old in self._counts:
            self._counts[new] = self._counts.pop(old)

    def begin(self, position: int) -> None:
        """Note that an image is begun; those before it are done."""
        later = {other: count for other, count in self._counts.items() if other > position}
        self._counts = {position: self.count(position) + 1, **later}
        self._begun = position
        self._write()

    def forgive(self) -> None:
        """Do not count the image that was begun: the run ended in an orderly way."""
        if self._begun is not None:
            self._counts[self._begun] -= 1
            self._counts = {position: count for position, count in self._counts.items() if count > 0}
            self._begun = None
        self._write()

    def clear(self) -> None:
        """Forget everything, at the start or the end of a stream."""
        self._counts, self._begun = {}, None
        self._write()

    def _write(self) -> None:
        # not synchronised to the disk: it is for a process that dies, not for a machine that loses its power
        if self._counts:
            self.path.write_text(json.dumps(self._counts), encoding="ascii")
        else:
            self.path.unlink(missing_ok=True)


class WatchedFolders:
    """Folders that must stay the same ones.

    Args:
        files: files in these folders; a folder is created if there is none.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._descriptors: dict[Path, int] = {}
        for folder in dict.fromkeys(file.parent for file in files):
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # a folder cannot be opened on every system
                # held open, so that the system gives its number to no other folder
                self._descriptors[folder] = os.open(folder, os.O_RDONLY)

    def check(self) -> None:
        """Raise MachineFailureError if a folder was removed, moved or replaced."""
        for folder, descriptor in self._descriptors.items():
            found = False
            with suppress(OSError):
                found = os.path.samestat(os.fstat(descriptor), os.stat(folder))
            if not found:
                raise MachineFailureError(
                    f"the folder {folder} was removed or replaced during the run, with all that was written there: put "
                    "it back and resume, or start again"
                )

    def close(self) -> None:
        """Watch no more."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}


DEEPEST, LARGEST = 8, 1000
PLACES = ("dir", "path", "folder", "root")
"""Ends of the names of attributes that say where files are, which may change between two runs."""
CHANGING = {"_do_transform", "_lazy", "_tracing", "method"}


def describe(**parts: Any) -> dict[str, Any]:
    """Return the plain settings of transforms, readers and inferers, flat: dotted name to value.

    Example:
        >>> from monai.transforms import ScaleIntensityd
        >>> describe(intensity=ScaleIntensityd("image", minv=0.5))["intensity.scaler.minv"]
        0.5
    """
    found: dict[str, Any] = {}
    for name, part in parts.items():
        _add(found, name, part, DEEPEST)
    return found


def _add(found: dict[str, Any], name: str, value: Any, depth: int) -> None:
    plain = _plain(value)
    if plain is not None:
        found[name] = plain
    elif depth and isinstance(value, Mapping):
        for key, item in value.items():
            _add(found, f"{name}.{key}", item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _add(found, f"{name}.{number}", item, depth - 1)
    elif depth and isinstance(value, (Transform, ImageReader, Inferer)):
        found[name] = type(value).__name__
        for key, item in vars(value).items():
            if not key.endswith(PLACES) and key not in CHANGING:
                _add(found, f"{name}.{key}", item, depth - 1)
    elif isinstance(value, Callable) and hasattr(value, "__qualname__"):  # type: ignore[arg-type]
        found[name] = f"{value.__module__}.{value.__qualname__}"


def _plain(value: Any) -> Any:
    """Return a setting as a plain value; None for what is none."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # a NaN would differ from itself
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (torch.dtype, np.dtype)):
        return str(value)
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return str(value.tolist()) if np.prod(value.shape) <= LARGEST else None
    if isinstance(value, (list, tuple)) and 0 < len(value) <= LARGEST:
        values = [_plain(one) for one in value]
        return values if all(isinstance(one, (bool, int, float, str)) for one in values) else None
    return None


def file_text(item: Any) -> str | None:
    """Return the names and sizes of an item's files in one text; None if it has none, or one is not there.

    Example:
        >>> file_text({"image": "absent.png"})
    """
    if not isinstance(item, Mapping):
        return None
    files = []
    for key in ("image", "label"):
        value = item.get(key)
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(path, (str, os.PathLike)):
                try:
                    files.append([key, Path(path).name, os.stat(path).st_size])
                except (OSError, ValueError):
                    return None
    return json.dumps(files) if files else None
