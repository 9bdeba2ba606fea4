# SPDX-License-Identifier: Apache-2.0
"""The guard's overlay from the command line."""

from __future__ import annotations

from pathlib import Path

import yaml

from mgipt_monai import RecordFile
from mgipt_monai.methods import Guard
from mgipt_monai.methods.parts import plain_settings
from tests.bundle.conftest import CONFIGS, QUICK, ROOT, run_bundle

INFERENCE, OVERLAY = CONFIGS / "inference.yaml", ROOT / "configs" / "guard.yaml"


def test_guarded_run_records_decisions_with_their_reasons(tmp_path: Path, demo_sites: Path) -> None:
    run_bundle([INFERENCE, OVERLAY], dataset_dir=demo_sites, output_dir=tmp_path, limit=2, **QUICK)
    rows = RecordFile(tmp_path / "records.jsonl").read()
    assert len(rows) == 4
    for row in rows:
        assert row["status"] == "ok"
        assert row["decision"] in ("adapted", "unadapted")
        assert row["learned"] == (not row["reasons"])
        assert 0 <= row["signals"]["agreement"] <= 1 <= row["signals"]["area_change"]


def test_fallback_writes_the_mask_of_a_run_without_adaptation_and_says_so(tmp_path: Path, demo_sites: Path) -> None:
    source = ROOT / "configs" / "methods" / "source.yaml"
    settings = {"dataset_dir": demo_sites, "limit": 1, **QUICK}
    run_bundle([INFERENCE, source], output_dir=tmp_path / "source", **settings)
    limits = {"guard#max_area_change": 1.0, "guard#min_agreement": "$None"}
    done = run_bundle([INFERENCE, OVERLAY], output_dir=tmp_path / "guarded", **settings, **limits)
    assert "predicted without adaptation since a class's area changed by a factor of " in done.stdout + done.stderr
    masks = sorted(path.relative_to(tmp_path / "source") for path in (tmp_path / "source").rglob("*.png"))
    assert len(masks) == 2
    for row, mask in zip(RecordFile(tmp_path / "guarded" / "records.jsonl").read(), masks, strict=True):
        assert row["decision"] == "unadapted"
        assert (tmp_path / "guarded" / mask).read_bytes() == (tmp_path / "source" / mask).read_bytes()


def test_overlay_has_the_guards_defaults() -> None:
    overlay = yaml.safe_load(OVERLAY.read_text())["guard"]
    assert overlay.pop("_target_") == "mgipt_monai.methods.Guard"
    assert overlay == plain_settings(Guard())
