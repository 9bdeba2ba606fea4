# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mgipt_monai import RecordFile
from mgipt_monai.report.comparison import compare_runs


def write(folder: Path, scores: dict[str, float | None], cost: int) -> Path:
    records = RecordFile(folder / "records.jsonl")
    for name, score in scores.items():
        row = {"name": name, "site": name[0], "seconds": 1.0, "forwards": cost, "backwards": 1}
        if score is None:
            records.append({**row, "status": "failed", "reason": "broken"})
        else:
            records.append({**row, "status": "ok", "metrics": {"dsc": {"disc": score, "cup": score - 0.2}}})
    return folder


def test_runs_are_compared_by_hand(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"A1": 0.8, "A2": 0.9, "B1": 0.5, "B2": 0.7}, cost=0)
    other = write(tmp_path / "other", {"A1": 0.9, "A2": 0.88, "B1": 0.495, "B2": None}, cost=4)
    table = {(row["site"], row["run"]): row for row in compare_runs([source, other])}
    assert list(table) == [(site, run) for site in ("A", "B", "all") for run in ("source", "other")]
    # the image that failed in one run is left out of both
    assert table["B", "source"]["images"] == 1
    assert table["B", "source"]["disc"] == pytest.approx(0.5)
    assert table["A", "other"]["disc"] == pytest.approx(0.89)
    assert table["A", "other"]["mean"] == pytest.approx(0.79)
    assert table["A", "other"]["worse"] == pytest.approx(0.5)  # A2 by two points; B1 by half a point is no harm
    assert table["B", "other"]["worse"] == 0
    assert table["all", "source"]["worse"] is None
    assert (table["all", "source"]["cost"], table["all", "other"]["cost"]) == (1, 5)


def test_runs_without_a_common_image_are_refused(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", {"A1": 0.5}, 1), write(tmp_path / "other", {"A2": 0.5}, 1)
    with pytest.raises(ValueError, match="one, other have no image in common"):
        compare_runs([one, other])


def test_command_prints_a_table(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, {"A1": 0.8}, 1) for name in ("source", "other")]
    command = [sys.executable, "-m", "mgipt_monai.report.comparison", *map(str, folders)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "| site | images | run | disc | cup | mean | worst tenth | worse | cost |"
    assert lines[2] == "| A | 1 | source | 80.00 | 60.00 | 70.00 | 70.00 |  | 2.0 |"
