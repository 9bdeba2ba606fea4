# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the drift monitor, of evidence and of suggested images measure what they say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from mgipt_monai import SiteCorrection
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from mgipt_monai.networks import SiteNorms
from tests.conftest import load_benchmark, stream, tiny_network


@pytest.fixture(scope="module")
def drift() -> ModuleType:
    return load_benchmark("drift")


@pytest.fixture(scope="module")
def evidence(drift: ModuleType) -> ModuleType:
    return load_benchmark("evidence")  # it imports from drift


@pytest.fixture(scope="module")
def suggestion() -> ModuleType:
    return load_benchmark("suggestion")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    write_demo_stream(folder, [CAMERAS["warm_vignetted"], CAMERAS["cold_noisy"]], count=6, size=128)
    return folder


def test_alarms_are_counted_from_the_change(drift: ModuleType) -> None:
    alarms = drift.simulated(k=10, before=20, after=30, shift=8.0, signals=2, repeats=3, false_alarms=0.05)
    assert ((alarms > 0) & (alarms < 20)).all()
    assert np.isinf(drift.simulated(10, 0, 30, 0.0, 1, 3, 0.05)).all()
    assert drift.cells(np.array([-3.0, 2.0, 4.0, np.inf])) == "25.0 | 67 | 4 | -"


def test_drift_prints_its_tables(drift: ModuleType, sites: Path, capsys: pytest.CaptureFixture) -> None:
    drift.main(["--k", "5", "--images", "10", "--repeats", "4"])
    assert len(capsys.readouterr().out.splitlines()) == 3 + 1 + 2 + 6
    drift.main(["--sites", str(sites), "--k", "3", "--repeats", "4"])
    assert len(capsys.readouterr().out.splitlines()) == 4 + 1 + 2 + 4


def test_signals_of_both_heads(drift: ModuleType) -> None:
    logits = torch.tensor([[[5.0, -5.0]], [[-5.0, 5.0]], [[-9.0, -9.0]]])  # two pixels
    sigmoid = drift.signals_of(torch.zeros(1, 1, 2), logits, "sigmoid")
    softmax = drift.signals_of(torch.zeros(1, 1, 2), logits, "softmax")
    assert [sigmoid[f"area {i}"] for i in (1, 2, 3)] == [0.5, 0.5, 0.0]
    assert [softmax[f"area {i}"] for i in (1, 2)] == [0.5, 0.0]


def test_evidence_along_a_stream_is_that_of_site_correction(evidence: ModuleType) -> None:
    method, images = SiteCorrection(tiny_network(), memory=None), stream(5)
    expected = [method(image) is not None and method.last[0]["evidence"] for image in images]
    with torch.no_grad():
        found = evidence.evidence_along(SiteNorms(tiny_network().eval()), images)
    assert found == pytest.approx(expected)


def test_evidence_prints_its_table(
    evidence: ModuleType, sites: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path(evidence.__file__).parents[1] / "bundle" / "models" / "model.pt"
    words = ["--dataset_dir", str(sites), "--source", "warm_vignetted", "--others", "cold_noisy", "--repeats", "2"]
    monkeypatch.setitem(evidence.EVIDENCE, "evidence from image 11", 1)  # these streams are shorter
    evidence.main([*words, "--ckpt_path", str(weights), "--before", "2"])
    first, _, _, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("reference: 3 images; limit of evidence: 0.")
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    detectors = [*evidence.EVIDENCE, *evidence.MARTINGALES]
    streams = ("the source's other half", "cold_noisy", "cold_noisy later")
    assert cells == [[stream, name] for stream in streams for name in detectors]


def test_dice_of_an_offset_is_that_of_the_mask(suggestion: ModuleType) -> None:
    logits, label = 3 * torch.randn(2, 8, 8), (torch.rand(2, 8, 8) > 0.5).float()
    curves = suggestion.curve(logits, label)
    for i, offset in enumerate(suggestion.OFFSETS):
        mask = (logits + offset > 0).float()
        dice = 2 * (mask * label).sum((1, 2)) / (mask.sum((1, 2)) + label.sum((1, 2)))
        assert curves[:, i] == pytest.approx(dice.numpy())
    # labelled images like the others: the offset fits both
    assert suggestion.gain(np.stack([curves] * 3), [0]) == pytest.approx(
        100 * (curves.max(1) - curves[:, suggestion.NONE]).mean()
    )


def test_suggestion_prints_its_table(suggestion: ModuleType, sites: Path, capsys: pytest.CaptureFixture) -> None:
    suggestion.main(["--sites", str(sites), "--k", "3", "--draws", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["random", "suggested"] * 2
