# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mgipt_monai import RecordFile
from mgipt_monai.benchmark.comparison import load_results, markdown


def write(folder: Path, scores: dict[str, float], cost: int) -> Path:
    records = RecordFile(folder / "records.jsonl")
    for name, score in scores.items():
        row = {"name": name, "site": name[0], "seconds": 1.0, "forwards": cost, "backwards": 1, "status": "ok"}
        records.append({**row, "metrics": {"dsc": {"disc": score, "cup": score - 0.2}, "hd95": {"disc": 2.5}}})
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_show_sites_and_the_whole_stream(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"B1": 0.5, "A1": 0.8, "A2": 0.9}, cost=0)
    other = write(tmp_path / "other", {"B1": 0.495, "A1": 0.9, "A2": 0.88}, cost=4)
    sites, overall = markdown(load_results([source, other])).split("\n\n")
    sites, overall = sites.splitlines(), overall.splitlines()
    assert cells(sites[0]) == ["site", "images", "method", "disc", "cup", "mean", "worst tenth"]
    # site after site in stream order, the methods side by side
    assert [cells(line)[:3] for line in sites[2:]] == [
        ["B", "1", "source"],
        ["B", "1", "other"],
        ["A", "2", "source"],
        ["A", "2", "other"],
    ]
    assert cells(sites[-1])[3:] == ["89.00", "69.00", "79.00", "78.00"]
    shown = dict(zip(cells(overall[0]), cells(overall[3]), strict=True))
    assert shown["method"] == "other"
    assert shown["gain [95 %]"].startswith("+2.50 [-2.00, ")
    assert (shown["worse"], shown["hd95"], shown["F"]) == ("33 %", "2.50", "5.0")
    assert "degradation" not in shown
    assert dict(zip(cells(overall[0]), cells(overall[2]), strict=True))["gain [95 %]"] == ""


def test_distances_are_not_in_percent(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, {"A1": 0.8}, cost=1) for name in ("source", "other")]
    _, overall = markdown(load_results(folders), "hd95").split("\n\n")
    shown = dict(zip(cells(overall.splitlines()[0]), cells(overall.splitlines()[3]), strict=True))
    assert (shown["mean [95 %]"], shown["dsc"], shown["p"]) == ("2.50", "70.00", "")


def test_runs_over_other_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other ran over other images than one"):
        load_results([write(tmp_path / "one", {"A1": 0.5}, 1), write(tmp_path / "other", {"A2": 0.5}, 1)])


def test_command_prints_the_tables_of_runs_and_of_a_benchmark(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, {"A1": 0.8}, 1) for name in ("source", "other")]
    (tmp_path / "results.json").write_text(json.dumps(load_results(folders)))
    printed = [
        subprocess.run(
            [sys.executable, "-m", "mgipt_monai.benchmark.comparison", *map(str, paths)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for paths in (folders, [tmp_path])
    ]
    assert printed[0] == printed[1]
    assert "| A | 1 | source | 80.00 | 60.00 | 70.00 | 70.00 |" in printed[0]
