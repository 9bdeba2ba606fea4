# SPDX-License-Identifier: Apache-2.0
"""The benchmark overlay from the command line: every method, and a method of the user's."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import yaml

from tests.bundle.conftest import QUICK, run_bundle

METHODS = ["source", "bn", "tent", "sar", "cotta", "grata", "vptta", "steady", "released", "mgipt"]
CONFIGS = [f"bundle/configs/{name}.yaml" for name in ("inference", "evaluate", "benchmark")]


def test_every_method_runs_over_the_stream(demo_sites: Path, tmp_path: Path) -> None:
    done = run_bundle(CONFIGS, dataset_dir=demo_sites, output_dir=tmp_path, order="shuffled", limit=1, **QUICK)
    assert "report:" in done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == METHODS
    assert results["settings"]["order"] == "shuffled"
    with (tmp_path / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 * 2
    assert all(row["status"] == "ok" and float(row["hd95_mean"]) >= 0 for row in rows)
    assert not list(tmp_path.glob("*/*/eye_*.png")), "no masks but the report's pictures are written"


def test_a_method_is_added_by_an_overlay(demo_sites: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "mine.yaml"
    mine = {"_target_": "mgipt_monai.VPTTA", "_mode_": "callable", "network": "@network", "lr": 0.01}
    overlay.write_text(yaml.safe_dump({"methods#mine": mine, "compare": ["source", "mine"]}))
    run_bundle([*CONFIGS, overlay], dataset_dir=demo_sites, output_dir=tmp_path / "out", limit=1, **QUICK)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["methods"]) == ["source", "mine"]
    assert results["settings"]["methods"]["mine"]["lr"] == 0.01


def test_a_single_image_has_a_report_without_intervals(demo_sites: Path, tmp_path: Path) -> None:
    one = {"sites": "['cold_noisy']", "limit": 1, "compare": "['source','bn']"}
    run_bundle(CONFIGS, dataset_dir=demo_sites, output_dir=tmp_path, **one, **QUICK)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["methods"]["bn"]["against_baseline"]["dsc"]["interval"] is None
    assert "not defined" in (tmp_path / "report.html").read_text()
