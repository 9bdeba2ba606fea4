# SPDX-License-Identifier: Apache-2.0
"""A stream's records, with when and by which run each image was done, and its name hidden on request."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any, Literal, get_args

from .fingerprint import fingerprint
from .methods.base import AdaptationMethod
from .pseudonyms import Pseudonyms, without_names
from .records import RecordFile
from .state_file import atomic_path
from .versions import versions

__all__ = ["AuditTrail", "Identifiers"]

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
            :class:`mgipt_monai.pseudonyms.Pseudonyms`). Names of sites stay.

    Raises:
        ValueError: at construction, for other identifiers.
    """

    def __init__(self, path: str | os.PathLike, identifiers: Identifiers = "names") -> None:
        if identifiers not in get_args(Identifiers):
            raise ValueError(f"identifiers must be one of {', '.join(get_args(Identifiers))}; got {identifiers!r}")
        self.file, self.identifiers = RecordFile(path), identifiers
        self.runs_path = self.file.path.with_suffix(".runs.json")
        self._pseudonyms = Pseudonyms(self.file.path.with_suffix(".key"))
        self._run: str | None = None

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
        if self._run is None:
            self._note_run()
        if self.identifiers == "hashed":
            row = self._hidden(row, names)
        self.file.append({**row, "time": now(), "run": int(self._run)})

    def shown(self, name: str) -> str:
        """Return a name as the records have it."""
        return self._pseudonyms.of(name) if self.identifiers == "hashed" else name

    def _hidden(self, row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        shown = self.shown(row["name"])
        reason = {"reason": without_names(row["reason"], [row["name"], *names], shown)} if "reason" in row else {}
        return {**row, "name": shown, **reason}

    def _note_run(self) -> None:
        runs = self._runs()
        self._run = str(len(runs) + 1)
        with atomic_path(self.runs_path) as part:
            part.write_text(json.dumps({**runs, self._run: self._about}, indent=2) + "\n", encoding="utf-8")

    def _runs(self) -> dict[str, Any]:
        return json.loads(self.runs_path.read_text(encoding="utf-8")) if self.runs_path.is_file() else {}


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
