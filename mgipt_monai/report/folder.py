# SPDX-License-Identifier: Apache-2.0
"""Reads a benchmark folder: several methods over one stream, with their figures and per-image records."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mgipt_monai.stream.records import RecordFile
from mgipt_monai.stream.summary import image_means

__all__ = ["BenchmarkFolder", "dsc_of", "image_of"]

SCHEMA, VERSION = "mgipt_monai.results", 1


@dataclass(frozen=True)
class BenchmarkFolder:
    """What a benchmark left behind.

    Attributes:
        path: the folder.
        results: what ``results.json`` holds.
        timing: what ``timing.json`` holds; empty where there is none.
        records: per method the records of its stream, in the order of the images.
    """

    path: Path
    results: dict[str, Any]
    timing: dict[str, Any]
    records: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, folder: str | os.PathLike) -> BenchmarkFolder:
        """Read a folder.

        Raises:
            FileNotFoundError: if it has no ``results.json``.
            ValueError: if that file is not of the schema and version that this code reads.
        """
        path = Path(folder)
        if not (path / "results.json").is_file():
            raise FileNotFoundError(f"there is no results.json in {path}: give the output folder of a benchmark")
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        found = (results.get("schema"), results.get("version"))
        if found != (SCHEMA, VERSION):
            raise ValueError(f"{path / 'results.json'} is {found}, this report reads {(SCHEMA, VERSION)}")
        timing = path / "timing.json"
        return cls(
            path,
            results,
            json.loads(timing.read_text(encoding="utf-8")) if timing.is_file() else {},
            {method: RecordFile(path / method / "records.jsonl").read() for method in results["methods"]},
        )

    @property
    def methods(self) -> list[str]:
        """All methods, in the order in which they ran."""
        return list(self.results["methods"])

    @property
    def baseline(self) -> str | None:
        """The method that the others are held against."""
        return self.results["baseline"]

    @property
    def adapting(self) -> list[str]:
        """The methods that are held against the baseline."""
        return [method for method in self.methods if method != self.baseline]

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """Per method and record name the mean DSC over classes; an image that failed anywhere is in none."""
        failed = {image_of(row) for rows in self.records.values() for row in rows if row["status"] != "ok"}
        return {
            method: {row["name"]: dsc_of(row) for row in rows if image_of(row) not in failed}
            for method, rows in self.records.items()
        }

    def changes(self, method: str) -> dict[str, float]:
        """Return per record name the method's DSC less the baseline's, where both are defined."""
        before = self.scores[self.baseline]
        changes = {name: score - before.get(name, math.nan) for name, score in self.scores[method].items()}
        return {name: change for name, change in changes.items() if math.isfinite(change)}

    def image_changes(self, method: str) -> list[float]:
        """Return per image the change, averaged over the rounds."""
        changes = self.changes(method)
        rounds: dict[str, list[float]] = {}
        for row in self.records[method]:
            if row["name"] in changes:
                rounds.setdefault(image_of(row), []).append(changes[row["name"]])
        return [float(np.mean(values)) for values in rounds.values()]


def image_of(row: dict[str, Any]) -> str:
    """Return the image's own name, whatever the round.

    Example:
        >>> image_of({"name": "round_2/A/eye", "round": 2})
        'A/eye'
    """
    return row["name"].removeprefix(f"round_{row['round']}/")


def dsc_of(row: dict[str, Any]) -> float:
    """Return a record's mean DSC over classes, NaN where none is defined."""
    return image_means(row).get("dsc", math.nan)
