# SPDX-License-Identifier: Apache-2.0
"""The study of calibrations prints its tables on any stream that the bundle reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bundle.conftest import BUNDLE, ROOT
from tests.conftest import load_benchmark


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
