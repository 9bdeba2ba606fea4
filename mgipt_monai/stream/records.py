# SPDX-License-Identifier: Apache-2.0
"""The per-image records of a stream and the runs that wrote them, optionally with hidden names."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.stream.pseudonyms import Pseudonyms, without_names
from mgipt_monai.utils.files import atomic_path
from mgipt_monai.utils.provenance import fingerprint, versions

__all__ = [
    "AuditTrail",
    "Identifiers",
    "RecordFile",
    "check_figures",
    "check_identifiers",
    "hidden_name",
    "is_number",
    "json_types",
]


class RecordFile:
    """A JSON Lines file with one line per image.

    Each line has ``name``, ``site``, ``round`` if the stream has rounds, ``status`` (``ok`` or ``failed``), ``reason``
    if it failed, ``seconds``, the metrics if there is a label, and what the method did (see the method's ``last``).
    ``source``, if the image has files, is a fingerprint of their names and sizes.

    Args:
        path: the file; created with the first line.

    Example:
        >>> import tempfile
        >>> records = RecordFile(os.path.join(tempfile.mkdtemp(), "records.jsonl"))
        >>> records.append({"name": "eye_000", "status": "ok"})
        >>> records.read()
        [{'name': 'eye_000', 'status': 'ok'}]
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def append(self, row: dict[str, Any]) -> None:
        """Write one line; values that JSON cannot represent (NaN, infinity) become null.

        A last line that a crash cut off is removed before, and one that a full disk cuts off is removed again.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(json_types(row), allow_nan=False).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            end = self.complete_size()
            file.truncate(end)
            left = memoryview(line)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(end)
                raise

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines; a last line cut off by a crash is left out.

        Raises:
            ValueError: if a complete line is no record; the message names it.
        """
        return list(self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
            if line:
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"it holds a {type(row).__name__}")
                except (ValueError, RecursionError) as error:
                    raise self._damaged(number, error) from error
                yield row

    def _damaged(self, number: int, error: Exception) -> ValueError:
        return ValueError(
            f"line {number} of {self.path} is damaged ({error}): restore the file from a copy, or move it away and "
            "start a new stream, without resume"
        )

    def keep(self, count: int, failed: bool = True) -> list[dict[str, Any]]:
        """Truncate the file to its first ``count`` lines and return them; what stands behind them may be damaged.

        Args:
            count: number of lines.
            failed: False removes the lines of failed images first.

        Raises:
            ValueError: if there are fewer, or one of them is no image's record.
        """
        rows: list[dict[str, Any]] = []
        for number, row in enumerate(self._rows() if count else (), start=1):
            try:
                check_row(row)
            except ValueError as error:
                raise self._damaged(number, error) from error
            if failed or row["status"] == "ok":
                rows.append(row)
            if len(rows) == count:
                break
        if len(rows) < count:
            raise ValueError(
                f"{self.path} has only {len(rows)} of the {count} records of the stream to resume: restore the file "
                "from a copy, or start a new stream, without resume"
            )
        with atomic_path(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return rows

    def complete_size(self) -> int:
        """Return the number of bytes up to the end of the last complete line."""
        if not self.path.is_file():
            return 0
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - BLOCK)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                if found >= 0:
                    return start + found + 1
                end = start
        return 0

    def mark(self) -> dict[str, Any]:
        """Return what tells the end of the file's last line: the file's name, a size, and a check sum of the latest."""
        size = self.complete_size()
        return {"file": self.path.name, "size": size, "sum": self._sum(size)}

    def cut(self, mark: dict[str, Any]) -> None:
        """Truncate the file to an earlier :meth:`mark`; another file, or one that was shortened since, stays."""
        size = mark.get("size")
        if size is None or mark.get("file") != self.path.name or self.complete_size() <= size:
            return
        if self._sum(size) == mark.get("sum"):
            os.truncate(self.path, size)

    def _sum(self, size: int) -> int:
        """Return the check sum of the last bytes before ``size``."""
        if not self.path.is_file():
            return 0
        with self.path.open("rb") as file:
            file.seek(max(0, size - BLOCK))
            return zlib.crc32(file.read(min(size, BLOCK)))


BLOCK = 1 << 16
LARGEST = 1e300


def check_row(row: dict[str, Any]) -> None:
    """Raise ValueError for a dict that is no image's record.

    Example:
        >>> check_row({"name": "A/eye", "status": "ok", "site": "A", "seconds": 0.5})
        >>> check_row({"name": "A/eye", "status": "done"})
        Traceback (most recent call last):
        ValueError: status is 'done'
    """
    status = row.get("status")
    if status not in ("ok", "failed"):
        raise ValueError(f"status is {status!r}")
    texts = ["name", *(["reason"] if status == "failed" else [])]
    if wrong := [key for key in texts if not isinstance(row.get(key), str)]:
        raise ValueError(f"{wrong[0]} is no text")
    if not isinstance(row.get("site"), (str, int, type(None))):
        raise ValueError("site is neither a text nor a number")
    seconds = row.get("seconds")
    if seconds is None and status == "failed":
        seconds = 0.0
    if not is_number(seconds):
        raise ValueError("seconds is no number")
    check_figures(row)


def check_figures(row: dict[str, Any]) -> None:
    """Raise ValueError unless a record's figures are as :class:`RecordFile` writes them, or absent.

    Metrics are numbers (None where undefined) by metric and class, agreement and quality numbers by class.
    """
    for key in ("metrics", "unadapted_metrics", "agreement", "quality"):
        found, is_metric = row.get(key), key.endswith("metrics")
        tables = list(found.values()) if is_metric and isinstance(found, dict) else [found] if found is not None else []
        if not all(isinstance(table, dict) for table in tables):
            raise ValueError(f"{key} is no table")
        values = [value for table in tables for value in table.values()]
        if not all(is_number(value) or (is_metric and value is None) for value in values):
            raise ValueError(f"{key} has values that are no numbers")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that can be computed with, so no truth value and not of hundreds of digits."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and not abs(value) > LARGEST


def json_types(value: Any) -> Any:
    """Convert nested dicts and lists to JSON types: keys become strings, NaN and infinity become None.

    Example:
        >>> json_types({"consistency": {1: float("nan"), 3: 0.5}})
        {'consistency': {'1': None, '3': 0.5}}
    """
    if isinstance(value, dict):
        return {str(key): json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_types(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


Identifiers = Literal["names", "hashed"]


class AuditTrail:
    """Writes the records of a stream and, in a second file, information about its runs.

    Each record gets ``time`` (UTC, when the image was done) and ``run``, a number from 1. For each run,
    ``<records>.runs.json`` holds ``started``, ``first`` (position in the stream of its first image, from 0),
    ``identifiers``, ``weights`` (fingerprint of the source network), the method's ``settings`` and ``versions``. A run
    without images is not listed.

    Args:
        path: the record file, see :class:`mgipt_monai.RecordFile`.
        identifiers: ``names`` writes the images' names; ``hashed`` replaces them with 16 hexadecimal digits, also in
            the reasons of failed images, using a random key (see
            :class:`mgipt_monai.stream.pseudonyms.Pseudonyms`). Site names are kept, and the ``round_2/`` of a name.
        key_path: the key's file; None uses ``<records>.key``. Streams with the same key have the same pseudonyms.

    Raises:
        ValueError: at construction, for unknown ``identifiers``.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        identifiers: Identifiers = "names",
        key_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.file, self.identifiers = RecordFile(path), check_identifiers(identifiers)
        self.runs_path = self.file.path.with_suffix(".runs.json")
        self._pseudonyms = Pseudonyms(self.file.path.with_suffix(".key") if key_path is None else key_path)
        self._run: int | None = None
        self._runs_before = 0

    def keep(self, count: int, failed: bool = True) -> list[dict[str, Any]]:
        """Truncate the file to the records of the first ``count`` images and return them; 0 removes the runs too.

        Args:
            count: number of images.
            failed: False removes the records of failed images first.

        Raises:
            ValueError: if there are fewer, the names were written with other ``identifiers``, or a file is damaged.
        """
        if count == 0:
            self.runs_path.unlink(missing_ok=True)
        runs = self._runs()
        for run in runs.values():
            if run["identifiers"] != self.identifiers:
                raise ValueError(
                    f"{self.file.path} was started with identifiers={run['identifiers']!r}: resume with the same, or "
                    "start a new stream"
                )
        rows = self.file.keep(count, failed)
        numbers = [row.get("run") for row in rows]
        self._runs_before = max([len(runs), *(number for number in numbers if isinstance(number, int))])
        return rows

    def set_aside(self) -> None:
        """Rename both files of an earlier run, ``records.jsonl`` to the first free ``records.1.jsonl``, and so on."""
        path = self.file.path
        for number in itertools.count(1):
            names = [path.with_suffix(f".{number}{end}") for end in (path.suffix, ".runs.json")]
            if not any(os.path.lexists(name) for name in names):
                break
        for file, name in zip((path, self.runs_path), names, strict=True):
            if file.exists():
                file.rename(name)

    def begin(self, method: AdaptationMethod, first: int) -> None:
        """Start a run of ``method`` at position ``first`` of the stream, after :meth:`keep`."""
        self._run = None
        self._about = {
            "started": now(),
            "first": first,
            "identifiers": self.identifiers,
            "weights": fingerprint(method.network),
            "settings": method.settings(),
            "versions": versions(),
        }

    def append(self, row: dict[str, Any], names: Iterable[str] = ()) -> None:
        """Write one image's record.

        Args:
            row: the record, with the image's name.
            names: other names of the image, such as its file names, that the reason may contain.
        """
        run = self._note_run() if self._run is None else self._run
        if self.identifiers == "hashed":
            row = self._hidden(row, names)
        self.file.append({**row, "time": now(), "run": run})

    def shown(self, name: str) -> str:
        """Return a name as it appears in the records."""
        return hidden_name(name, self._pseudonyms) if self.identifiers == "hashed" else name

    def sealed(self, text: str) -> str:
        """Return 16 hexadecimal digits for a text, which tell nothing about it without the key if names are hidden."""
        if self.identifiers == "hashed":
            return self._pseudonyms.of(text)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _hidden(self, row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        shown = self.shown(row["name"])
        reason = {"reason": without_names(row["reason"], [row["name"], *names], shown)} if "reason" in row else {}
        return {**row, "name": shown, **reason}

    def _note_run(self) -> int:
        runs = self._runs()
        self._run = max(len(runs), self._runs_before) + 1
        with atomic_path(self.runs_path) as part:
            part.write_text(json.dumps({**runs, str(self._run): self._about}, indent=2) + "\n", encoding="utf-8")
        return self._run

    def _runs(self) -> dict[str, Any]:
        if not self.runs_path.is_file():
            return {}
        try:
            runs = json.loads(self.runs_path.read_bytes())
            if not isinstance(runs, dict) or not all(isinstance(run.get("identifiers"), str) for run in runs.values()):
                raise ValueError("it does not describe runs")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.runs_path} is damaged ({error}): restore it from a copy, or remove it to resume without what "
                "it says of the runs before"
            ) from error
        return runs


def check_identifiers(identifiers: Identifiers) -> Identifiers:
    """Return ``identifiers``; raise ValueError if they are unknown."""
    if identifiers not in get_args(Identifiers):
        raise ValueError(f"identifiers must be one of {', '.join(get_args(Identifiers))}; got {identifiers!r}")
    return identifiers


def hidden_name(name: str, pseudonyms: Pseudonyms) -> str:
    """Return a name's pseudonym; the same for an image in all rounds, with the round in front."""
    found = re.match(r"round_\d+/(?=.)", name)
    front = found[0] if found else ""
    return front + pseudonyms.of(name[len(front) :])


def now() -> str:
    """Return the current time in UTC, as ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
