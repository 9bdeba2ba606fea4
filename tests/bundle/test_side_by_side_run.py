# SPDX-License-Identifier: Apache-2.0
"""What a user sees of a stream: with and without adaptation, quality, what to look at first, and pictures."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from PIL import Image

from mgipt_monai import RecordFile
from mgipt_monai.report.overlays import contour_picture, plane_pictures
from tests.bundle.conftest import CONFIGS, QUICK, ROOT, run_bundle

INFERENCE, EVALUATE = CONFIGS / "inference.yaml", CONFIGS / "evaluate.yaml"
STEADY = ROOT / "configs" / "presets" / "steady.yaml"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_labelled_stream_says_what_adaptation_changed(tmp_path: Path, demo_sites: Path) -> None:
    done = run_bundle([INFERENCE, EVALUATE], dataset_dir=demo_sites, output_dir=tmp_path / "out", **QUICK)
    assert re.search(r"adaptation changed the mean DSC by [+-]\d", done.stdout)
    assert "unadapted" in done.stdout
    assert "review.csv" in done.stdout
    rows = RecordFile(tmp_path / "out" / "records.jsonl").read()
    for row in rows:
        assert row["unadapted_metrics"]["dsc"].keys() == row["quality"].keys() == {"disc", "cup"}
        assert all(0 <= value <= 1 for key in ("agreement", "quality") for value in row[key].values())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["all"]
    alone = [np.mean(list(row["unadapted_metrics"]["dsc"].values())) for row in rows]
    assert summary["unadapted_metrics"]["dsc"]["mean"] == pytest.approx(np.mean(alone))
    gain = summary["metrics"]["dsc"]["mean"] - summary["unadapted_metrics"]["dsc"]["mean"]
    assert summary["gain"]["dsc"]["mean"] == pytest.approx(gain)
    with (tmp_path / "out" / "review.csv").open() as file:
        qualities = [float(row["quality"]) for row in csv.DictReader(file) if not row["look"]]
    assert qualities == sorted(qualities)

    run_bundle(
        [INFERENCE, EVALUATE], dataset_dir=demo_sites, output_dir=tmp_path / "alone", side_by_side=False, **QUICK
    )
    plain = RecordFile(tmp_path / "alone" / "records.jsonl").read()
    for row, one in zip(rows, plain, strict=True):
        assert "unadapted_metrics" not in one
        assert row["metrics"] == one["metrics"]
        assert row["forwards"] == one["forwards"] + 1
    for path in (tmp_path / "alone").rglob("*.png"):
        assert np.array_equal(pixels(path), pixels(tmp_path / "out" / path.relative_to(tmp_path / "alone")))


def test_an_unlabelled_stream_says_what_can_be_said(tmp_path: Path, demo_sites: Path) -> None:
    images = demo_sites / "cold_noisy" / "images"
    done = run_bundle([INFERENCE, STEADY], dataset_dir=images, output_dir=tmp_path / "out", **QUICK)
    for words in ("agree to", "mgipt commission", "evidence that the site differs", "look first at"):
        assert words in done.stdout


def test_overlays_of_photographs_have_a_page_and_masks_keep_their_values(tmp_path: Path, demo_sites: Path) -> None:
    settings = {"dataset_dir": demo_sites, **QUICK}
    more = {"save_overlay": True, "mask_palette": True}
    run_bundle([INFERENCE, EVALUATE, STEADY], output_dir=tmp_path / "plain", **settings)
    run_bundle([INFERENCE, EVALUATE, STEADY], output_dir=tmp_path / "out", **settings, **more)
    page = (tmp_path / "out" / "overlays" / "index.html").read_text()
    for path in sorted((demo_sites / "cold_noisy" / "images").iterdir()):
        name = f"cold_noisy/{path.stem}"
        assert name in page
        assert Image.open(tmp_path / "out" / "overlays" / f"{name}.png").size == (640, 640)
        coloured = Image.open(tmp_path / "out" / f"{name}.png")
        assert coloured.mode == "P"
        assert np.array_equal(np.asarray(coloured), pixels(tmp_path / "plain" / f"{name}.png"))
        assert set(np.unique(np.asarray(coloured.convert("RGB")).reshape(-1, 3), axis=0)[:, 0]) > {0}
    # a resumed run rewrites the page with all images
    (tmp_path / "out" / "overlays" / "index.html").unlink()
    run_bundle([INFERENCE, EVALUATE, STEADY], output_dir=tmp_path / "out", **settings, **more, resume=True)
    assert (tmp_path / "out" / "overlays" / "index.html").read_text() == page


def test_hidden_names_hold_for_overlays_and_review(tmp_path: Path, demo_sites: Path) -> None:
    images = demo_sites / "cold_noisy" / "images"
    settings = {"dataset_dir": images, "output_dir": tmp_path / "out", "save_overlay": True, "identifiers": "hashed"}
    run_bundle([INFERENCE, STEADY], **settings, **QUICK)
    names = [path.stem for path in images.iterdir()]
    texts = [(tmp_path / "out" / name).read_text() for name in ("review.csv", "overlays/index.html", "records.jsonl")]
    pictures = [path.stem for path in (tmp_path / "out" / "overlays").glob("*.png")]
    assert len(pictures) == len(names)
    assert not [name for name in names if name in pictures or any(name in text for text in texts)]


def corner(letter: str) -> np.ndarray:
    """A volume (1, R, A, S) that is bright at one end of an axis."""
    volume = np.zeros((1, 20, 20, 20))
    axis, end = {"L": (1, 0), "R": (1, 19), "P": (2, 0), "A": (2, 19), "I": (3, 0), "S": (3, 19)}[letter]
    np.moveaxis(volume, axis, 0)[max(0, end - 4) : end + 5] = 1
    return volume


@pytest.mark.parametrize(
    ("letter", "plane", "side"),
    [("R", 0, "left"), ("L", 1, "right"), ("A", 0, "top"), ("A", 2, "left"), ("S", 1, "top"), ("I", 2, "bottom")],
)
def test_planes_of_a_volume_are_in_radiological_orientation(letter: str, plane: int, side: str, tmp_path: Path) -> None:
    for flips in ([1, 1, 1], [-1, 1, -1]):
        affine = np.diag([*flips, 1.0])
        stored = corner(letter)[:, :: flips[0], :: flips[1], :: flips[2]]
        (tmp_path / "planes.png").write_bytes(plane_pictures(stored, {}, affine, side=64))
        drawn = pixels(tmp_path / "planes.png")[..., 0].astype(float)
        assert drawn.shape == (64, 3 * 64 + 16)
        one = drawn[:, plane * 72 : plane * 72 + 64]
        ends = {"left": one[:, :8], "right": one[:, -8:], "top": one[:8], "bottom": one[-8:]}
        assert max(ends, key=lambda name: ends[name].mean()) == side


def test_pictures_keep_the_proportions_of_anisotropic_volumes(tmp_path: Path) -> None:
    volume, mask = np.random.default_rng(0).random((1, 40, 20, 10)), np.zeros((1, 40, 20, 10))
    mask[:, 10:20, 5:10, 2:6] = 1
    path = tmp_path / "planes.png"
    path.write_bytes(plane_pictures(volume, {"before": mask}, np.diag([1.0, 1.0, 4.0, 1.0]), side=80))
    # axial 40 x 20, coronal and sagittal 40 high
    assert Image.open(path).size == (80 + 80 + 40 + 16, 80)
    assert contour_picture(volume[..., 3], {"before": mask[..., 3]}, 80, (1, 2))[1:4] == b"PNG"


def test_overlay_of_a_volume(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        values = rng.random((24, 32, 24)).astype("float32") + np.linspace(0, 1, 24)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 1.0, 1.0, 1.0])), images / f"brain_{number}.nii.gz")
    config = ROOT / "configs" / "hippocampus.yaml"
    network = {"spatial_size": "[32,32,32]", "network_def#channels": "[4,8]", "network_def#strides": "[2]"}
    weights = tmp_path / "weights.pt"
    torch.save(UNet(3, 1, 2, [4, 8], [2], num_res_units=2, norm="batch").state_dict(), weights)
    run_bundle(
        [INFERENCE, config, STEADY],
        dataset_dir=images,
        output_dir=tmp_path / "out",
        ckpt_path=weights,
        save_overlay=True,
        **network,
    )
    # 48 x 32 x 24 mm
    assert Image.open(tmp_path / "out" / "overlays" / "brain_0.png").size == (3 * 640 + 16, 480)
