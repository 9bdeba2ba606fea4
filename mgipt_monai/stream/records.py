# SPDX-License-Identifier: Apache-2.0
"""The per-image records of a stream, and beside them which run made them, with names hidden on request."""

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
    """A JSON Lines file that grows by one line per image.

    Each line has ``name``, ``site``, ``round`` where the stream has rounds, ``status`` (``ok`` or ``failed``),
    ``reason`` if it failed, ``seconds``, the metrics where there is a label, and what the method did (see the method's
    ``last``).

    Args:
        path: the file; it is made with the first line.

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
        """Write one line; values that JSON does not know (NaN, infinite) become null."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(json_types(row), allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines; a last line cut off by a crash is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def keep(self, count: int) -> list[dict[str, Any]]:
        """Cut the file to its first ``count`` lines and return them.

        Raises:
            ValueError: if there are fewer.
        """
        rows = self.read()[:count]
        if len(rows) < count:
            raise ValueError(f"{self.path} has {len(rows)} of the {count} records of the stream to resume: start anew")
        with atomic_path(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return rows


def in_words(row: dict[str, Any]) -> str:
    """Say one record in a line for the log.

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
    """Return nested dicts and lists as JSON has them: keys are texts, numbers that JSON does not know are null.

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
    """Writes the records of a stream, and beside them what its runs were.

    Each record gets ``time`` (UTC, when the image was done) and ``run``, a number from 1. ``<records>.runs.json`` says
    of each run ``started``, ``first`` (place in the stream of its first image, from 0), ``identifiers``, ``weights``
    (fingerprint of the source network), ``settings`` of the method and ``versions``. A run without images is not
    in it.

    Args:
        path: the record file, see :class:`mgipt_monai.RecordFile`.
        identifiers: ``names`` writes the images' names, ``hashed`` writes 16 hexadecimal digits instead, also in the
            reasons of failed images, from a random key in ``<records>.key`` (see
            :class:`mgipt_monai.stream.pseudonyms.Pseudonyms`). Names of sites stay.

    Raises:
        ValueError: at construction, for other identifiers.
    """

    def __init__(self, path: str | os.PathLike, identifiers: Identifiers = "names") -> None:
        if identifiers not in get_args(Identifiers):
            raise ValueError(f"identifiers must be one of {', '.join(get_args(Identifiers))}; got {identifiers!r}")
        self.file, self.identifiers = RecordFile(path), identifiers
        self.runs_path = self.file.path.with_suffix(".runs.json")
        self._pseudonyms = Pseudonyms(self.file.path.with_suffix(".key"))
        self._run: int | None = None

    def keep(self, count: int) -> list[dict[str, Any]]:
        """Cut the file to the records of the first ``count`` images and return them; 0 forgets the runs too.

        Raises:
            ValueError: if there are fewer, or names were written in the other way.
        """
        if count == 0:
            self.runs_path.unlink(missing_ok=True)
        for run in self._runs().values():
            if run["identifiers"] != self.identifiers:
                raise ValueError(
                    f"{self.file.path} was begun with identifiers={run['identifiers']!r}: resume with the same, or "
                    "start anew"
                )
        return self.file.keep(count)

    def begin(self, method: AdaptationMethod, first: int) -> None:
        """Begin a run of ``method`` at the image with the place ``first`` in the stream; 0 starts the files anew."""
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
            names: other names of the image, such as its files, that a reason could hold.
        """
        run = self._note_run() if self._run is None else self._run
        if self.identifiers == "hashed":
            row = self._hidden(row, names)
        self.file.append({**row, "time": now(), "run": run})

    def shown(self, name: str) -> str:
        """Return a name as the records have it."""
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
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
