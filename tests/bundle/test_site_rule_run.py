# SPDX-License-Identifier: Apache-2.0
"""The rule of site correction in the bundle: learnt once from labelled source images, used by the preset steady."""

from __future__ import annotations

import re
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


SHORT = {"sites": "['warm_vignetted']", "max_epochs": 1, "val_interval": 1, "spatial_size": "[64,64]"}


def test_a_training_learns_the_rule_of_its_best_weights_at_its_end(site: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again.pt"
    run_bundle([INFERENCE, TRAIN], dataset_dir=site, output_dir=out, site_rule=True, **SHORT)
    rule = SiteRule.load(out / "site_rule.pt")
    run_bundle([INFERENCE, TRAIN, RULE], dataset_dir=site, ckpt_path=out / "model.pt", rule_path=again, **QUICK)
    assert rule.fingerprint == SiteRule.load(again).fingerprint
    assert rule.digest == SiteRule.load(again).digest

    # switched on afterwards, for a training that has ended
    later = tmp_path / "later"
    run_bundle([INFERENCE, TRAIN], dataset_dir=site, output_dir=later, **SHORT)
    assert not (later / "site_rule.pt").exists()
    run_bundle([INFERENCE, TRAIN], dataset_dir=site, output_dir=later, site_rule=True, resume=True, **SHORT)
    assert SiteRule.load(later / "site_rule.pt").digest == rule.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_def#norm": "instance"}, "needs batch norm .*: train without it .in the bundle: site_rule false"),
        ({"limit": 5}, "at least 12 labelled source images, got 5: train without it"),
    ],
)
def test_a_rule_that_cannot_be_learnt_is_refused_before_the_training(
    change: dict, message: str, site: Path, tmp_path: Path
) -> None:
    settings = {"output_dir": tmp_path / "out", "site_rule": True, **SHORT, **change}
    done = run_bundle([INFERENCE, TRAIN], check=False, dataset_dir=site, **settings)
    assert done.returncode
    assert re.search(message, done.stderr)
    assert not (tmp_path / "out" / "training.pt").exists()
