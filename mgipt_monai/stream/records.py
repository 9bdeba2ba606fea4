# SPDX-License-Identifier: Apache-2.0
"""The per-image records of a stream and the runs that wrote them, optionally with hidden names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.stream.pseudonyms import Pseudonyms, without_names
from mgipt_monai.utils.files import atomic_path
from mgipt_monai.utils.provenance import fingerprint, versions

__all__ = ["AuditTrail", "Identifiers", "RecordFile", "in_words", "json_types"]


class RecordFile:
    """A JSON Lines file with one line per image.

    Each line has ``name``, ``site``, ``round`` if the stream has rounds, ``status`` (``ok`` or ``failed``), ``reason``
    if it failed, ``seconds``, the metrics if there is a label, and what the method did (see the method's ``last``).

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
        """Write one line; values that JSON cannot represent (NaN, infinity) become null."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(json_types(row), allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines; a last line cut off by a crash is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def keep(self, count: int) -> list[dict[str, Any]]:
        """Truncate the file to its first ``count`` lines and return them.

        Raises:
            ValueError: if there are fewer.
        """
        rows = self.read()[:count]
        if len(rows) < count:
            raise ValueError(
                f"{self.path} has only {len(rows)} of the {count} records of the stream to resume: start a new stream"
            )
        with atomic_path(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return rows


def in_words(row: dict[str, Any]) -> str:
    """Describe one record in a line for the log.

    Example:
        >>> in_words({"name": "A/eye", "status": "ok", "seconds": 0.5, "forwards": 25, "backwards": 17})
        'A/eye, 42 F, 0.50 s'
    """
    if row["status"] != "ok":
        return f"{row['name']} failed: {row['reason']}"
    words = [row["name"]]
    if row.get("instance_size"):
        words.append(f"size {row['instance_size']}, loss {row['loss_before']:.4g} -> {row['loss_after']:.4g}")
    if row.get("decision") == "unadapted":
        words.append(f"unadapted: {row['reasons'][0]}")
    words.append(f"{row.get('forwards', 0) + row.get('backwards', 0)} F")
    return ", ".join([*words, f"{row['seconds']:.2f} s"])


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
            the reasons of failed images, using a random key in ``<records>.key`` (see
            :class:`mgipt_monai.stream.pseudonyms.Pseudonyms`). Site names are kept.

    Raises:
        ValueError: at construction, for unknown ``identifiers``.
    """

    def __init__(self, path: str | os.PathLike, identifiers: Identifiers = "names") -> None:
        if identifiers not in get_args(Identifiers):
            raise ValueError(f"identifiers must be one of {', '.join(get_args(Identifiers))}; got {identifiers!r}")
        self.file, self.identifiers = RecordFile(path), identifiers
        self.runs_path = self.file.path.with_suffix(".runs.json")
        self._pseudonyms = Pseudonyms(self.file.path.with_suffix(".key"))
        self._run: int | None = None

    def keep(self, count: int) -> list[dict[str, Any]]:
        """Truncate the file to the records of the first ``count`` images and return them; 0 removes the runs too.

        Raises:
            ValueError: if there are fewer, or the names were written with other ``identifiers``.
        """
        if count == 0:
            self.runs_path.unlink(missing_ok=True)
        for run in self._runs().values():
            if run["identifiers"] != self.identifiers:
                raise ValueError(
                    f"{self.file.path} was started with identifiers={run['identifiers']!r}: resume with the same, or "
                    "start a new stream"
                )
        return self.file.keep(count)

    def begin(self, method: AdaptationMethod, first: int) -> None:
        """Start a run of ``method`` at position ``first`` of the stream; 0 starts new files."""
        if first == 0:
            self.keep(0)
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
        return self._pseudonyms.of(name) if self.identifiers == "hashed" else name

    def _hidden(self, row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        shown = self.shown(row["name"])
        reason = {"reason": without_names(row["reason"], [row["name"], *names], shown)} if "reason" in row else {}
        return {**row, "name": shown, **reason}

    def _note_run(self) -> int:
        runs = self._runs()
        self._run = len(runs) + 1
        with atomic_path(self.runs_path) as part:
            part.write_text(json.dumps({**runs, str(self._run): self._about}, indent=2) + "\n", encoding="utf-8")
        return self._run

    def _runs(self) -> dict[str, Any]:
        return json.loads(self.runs_path.read_text(encoding="utf-8")) if self.runs_path.is_file() else {}


def now() -> str:
    """Return the current time in UTC, as ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
