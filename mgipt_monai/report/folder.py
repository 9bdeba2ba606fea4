# SPDX-License-Identifier: Apache-2.0
"""The output folder of a benchmark: the results and per-image records of several methods over one stream."""

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
from mgipt_monai.stream.summary import image_means, image_of

__all__ = ["SCHEMA", "SCHEMA_VERSION", "BenchmarkFolder", "dsc_of"]

SCHEMA, SCHEMA_VERSION = "mgipt_monai.results", 1
"""Schema and version of ``results.json``."""


@dataclass(frozen=True)
class BenchmarkFolder:
    """The output of a benchmark.

    Attributes:
        path: the folder.
        results: content of ``results.json``.
        timing: content of ``timing.json``; empty if there is no such file.
        records: method to the records of its stream, in stream order.
    """

    path: Path
    results: dict[str, Any]
    timing: dict[str, Any]
    records: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> BenchmarkFolder:
        """Read a folder.

        Raises:
            FileNotFoundError: if it has no ``results.json``.
            ValueError: if that file has another schema or version.
        """
        path = Path(folder)
        if not (path / "results.json").is_file():
            raise FileNotFoundError(f"there is no results.json in {path}: give the output folder of a benchmark")
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        found = (results.get("schema"), results.get("version"))
        if found != (SCHEMA, SCHEMA_VERSION):
            raise ValueError(f"{path / 'results.json'} is {found}, this report reads {(SCHEMA, SCHEMA_VERSION)}")
        timing = path / "timing.json"
        return cls(
            path,
            results,
            json.loads(timing.read_text(encoding="utf-8")) if timing.is_file() else {},
            {method: RecordFile(path / method / "records.jsonl").read() for method in results["methods"]},
        )

    @property
    def methods(self) -> list[str]:
        """All methods, in the order in which they were run."""
        return list(self.results["methods"])

    @property
    def baseline(self) -> str | None:
        """The method that the others are compared with; None if there is none."""
        return self.results["baseline"]

    @property
    def required_baseline(self) -> str:
        """The method that the others are compared with; ValueError if there is none."""
        if self.baseline is None:
            raise ValueError(f"the benchmark in {self.path} has no baseline to compare with")
        return self.baseline

    @property
    def adapting(self) -> list[str]:
        """The methods that are compared with the baseline."""
        return [method for method in self.methods if method != self.baseline]

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """Mean DSC over classes by method and record name, without images that failed with any method."""
        failed = {image_of(row) for rows in self.records.values() for row in rows if row["status"] != "ok"}
        return {
            method: {row["name"]: dsc_of(row) for row in rows if image_of(row) not in failed}
            for method, rows in self.records.items()
        }

    def changes(self, method: str) -> dict[str, float]:
        """Return the DSC of the method minus that of the baseline by record name, where both are defined."""
        before = self.scores[self.required_baseline]
        changes = {name: score - before.get(name, math.nan) for name, score in self.scores[method].items()}
        return {name: change for name, change in changes.items() if math.isfinite(change)}

    def image_changes(self, method: str) -> list[float]:
        """Return the change of each image, averaged over the rounds."""
        changes = self.changes(method)
        rounds: dict[str, list[float]] = {}
        for row in self.records[method]:
            if row["name"] in changes:
                rounds.setdefault(image_of(row), []).append(changes[row["name"]])
        return [float(np.mean(values)) for values in rounds.values()]


def dsc_of(row: dict[str, Any]) -> float:
    """Return a record's mean DSC over classes; NaN if none is defined."""
    return image_means(row).get("dsc", math.nan)
