# SPDX-License-Identifier: Apache-2.0
"""A few real fundus photographs, where MGIPT_TEST_DATA names a folder with data/ and weights/."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from PIL import Image

from mgipt_monai import RecordFile
from tests.bundle.conftest import CONFIGS, run_bundle

FOLDER = Path(os.environ.get("MGIPT_TEST_DATA", "absent"))
SITES = FOLDER / "data" / "fundus_odoc"
WEIGHTS = FOLDER / "weights" / "unet_rimone_r3.pt"
EVALUATION = [CONFIGS / "inference.yaml", CONFIGS / "evaluate.yaml", "configs/fundus_odoc.yaml"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SITES.is_dir() and WEIGHTS.is_file()), reason="MGIPT_TEST_DATA names no real images"),
]


def run(tmp_path: Path, *overlays: str, limit: int) -> list[dict]:
    settings = {"dataset_dir": SITES, "ckpt_path": WEIGHTS, "sites": "['rimone_r2','drishti_gs']", "limit": limit}
    run_bundle([*EVALUATION, *overlays], output_dir=tmp_path, **settings)
    return RecordFile(tmp_path / "records.jsonl").read()


def test_bundle_gives_the_dice_that_plain_torch_gives(tmp_path: Path) -> None:
    # photographs read columns first, MONAI's default, would cost the cup eight points here
    network = UNet(2, 3, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch").eval()
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    for row in run(tmp_path, "configs/methods/source.yaml", limit=4):
        site, name = row["name"].split("/")
        image = np.asarray(Image.open(SITES / site / "images" / f"{name}.png")).astype("float32")
        mask = torch.from_numpy(np.array(Image.open(SITES / site / "masks" / f"{name}.png")))
        image = (image - image.min()) / (image.max() - image.min())
        with torch.no_grad():
            pred = network(torch.from_numpy(image).permute(2, 0, 1)[None])[0] > 0
        label = torch.stack([mask > 0, mask == 2])
        dice = 2 * (pred & label).sum((1, 2)) / (pred.sum((1, 2)) + label.sum((1, 2)))
        assert list(row["metrics"]["dsc"].values()) == pytest.approx(dice.tolist(), abs=2e-3)


@pytest.mark.parametrize("overlays", [(), ("configs/presets/released.yaml",)], ids=["paper", "released"])
def test_adaptation_runs_and_lowers_the_loss(overlays: tuple, tmp_path: Path) -> None:
    rows = run(tmp_path, *overlays, limit=2)
    assert len(rows) == 4
    for row in rows:
        assert row["loss_after"] < row["loss_before"]
        assert row["forwards"] + row["backwards"] in (43, 59)  # one of them without adaptation
        assert row["metrics"]["dsc"]["disc"] > 0.8
    assert json.loads((tmp_path / "summary.json").read_text())["all"]["images"] == 4
