# SPDX-License-Identifier: Apache-2.0
"""The rule of site correction in the bundle: learnt once from labelled source images, used by the preset steady."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mgipt_monai import RecordFile
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from mgipt_monai.networks import SiteRule
from tests.bundle.conftest import BUNDLE, CONFIGS, QUICK, ROOT, run_bundle

INFERENCE, TRAIN, RULE = (CONFIGS / f"{name}.yaml" for name in ("inference", "train", "site_rule"))
STEADY = ROOT / "configs" / "presets" / "steady.yaml"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_demo_stream(folder, [CAMERAS["warm_vignetted"]], count=13, size=64)
    return folder


def test_a_rule_is_learnt_and_used(site: Path, demo_sites: Path, tmp_path: Path) -> None:
    path = tmp_path / "rule.pt"
    done = run_bundle([INFERENCE, TRAIN, RULE], dataset_dir=site, rule_path=path, **QUICK)
    assert "largest structures 1: evidence" in done.stdout + done.stderr
    rule = SiteRule.load(path)
    assert rule.images == 13
    assert 0 < rule.trust <= 2

    weights = {}
    for name, settings in (("with", {"rule_path": path}), ("without", {})):
        out = tmp_path / name
        run_bundle([INFERENCE, STEADY], dataset_dir=demo_sites, output_dir=out, **settings, **QUICK)
        weights[name] = [row["adapted_weight"] for row in RecordFile(out / "records.jsonl").read()]
    assert len(weights["with"]) == len(weights["without"]) == 6
    assert weights["with"] != weights["without"]

    other = torch.load(BUNDLE / "models" / "model.pt", weights_only=True)
    other[next(iter(other))] *= 1.5
    torch.save(other, tmp_path / "other.pt")
    settings = {"ckpt_path": tmp_path / "other.pt", "rule_path": path, "stop_on_failure": True}
    done = run_bundle(
        [INFERENCE, STEADY], check=False, dataset_dir=demo_sites, output_dir=tmp_path / "x", **settings, **QUICK
    )
    assert "was made with other weights" in done.stderr
