# SPDX-License-Identifier: Apache-2.0
"""The studies of site correction print their tables on any stream that the bundle reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.networks.nets import UNet

from mgipt_monai import measure_source_statistics
from tests.bundle.conftest import BUNDLE, ROOT
from tests.conftest import load_benchmark, stream


def test_tables_of_a_stream(
    demo_sites: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    load_benchmark("site_study").main(
        [
            "configs/shifts/cameras.yaml",
            *("--dataset_dir", str(demo_sites), "--ckpt_path", str(BUNDLE / "models" / "model.pt")),
            *("--limit", "2", "--severity", "0.5", "--prompts", "--site_prompts"),
        ]
    )
    rows = {
        row.split("|")[1].strip(): row.split("|")[2:-1] for row in capsys.readouterr().out.splitlines() if "|" in row
    }
    assert rows["source"][1:3] == [" +0.00 ", " 0 % "]
    prompted = "fused, prompts of side 5, lr 0.05, steps: high, loss: site"
    for name in (
        *("image, source weight 0.0", "site", "site, prompt of side 3", "fused, trust 2.5, power 2"),
        *(prompted, f"{prompted}, a third view", "MGIPT", "fast"),
    ):
        assert 0 < float(rows[name][0]) <= 100
    assert -1 <= float(rows["entropy falls"][0]) <= 1


def test_table_of_the_look(
    demo_sites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    network = UNet(2, 3, 2, (4, 8, 16, 16, 16), (2, 2, 2, 2), num_res_units=2, norm="instance")
    torch.save(network.state_dict(), tmp_path / "w.pt")
    measure_source_statistics(network, stream(12, size=64)).save(tmp_path / "s.pt")
    overlay = tmp_path / "small.yaml"
    overlay.write_text("spatial_size: [64, 64]\nnetwork_def#channels: [4, 8, 16, 16, 16]\n")
    load_benchmark("site_study")  # which the other one takes its parts from
    load_benchmark("look_study").main(
        [
            *(str(overlay), "--norm", "instance", "--dataset_dir", str(demo_sites), "--sites", "warm_vignetted"),
            *("--limit", "2", "--ckpt_path", str(tmp_path / "w.pt"), "--statistics", str(tmp_path / "s.pt")),
        ]
    )
    printed = capsys.readouterr().out
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in printed.splitlines() if "|" in row}
    assert "2 images, no adaptation" in printed
    gains = [float(rows[f"both, fused by {share} of the evidence"][0]) for share in ("0.25", "0.5", "1")]
    # noise was the source, so the photographs' look is corrected, the more the larger the share
    assert float(rows["both"][0]) != 0
    assert len(set(gains)) > 1
