# SPDX-License-Identifier: Apache-2.0
"""What users really have: each bad input gives a message that names the file and the fix, and harms nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from PIL import Image

from mgipt_monai import RecordFile, load_state
from tests.bundle.conftest import BUNDLE, CONFIGS, ONE_THREAD, QUICK, ROOT, run_bundle
from tests.conftest import without_times

INFERENCE, EVALUATE = CONFIGS / "inference.yaml", CONFIGS / "evaluate.yaml"


@pytest.fixture
def site(tmp_path: Path, demo_sites: Path) -> Path:
    """A folder of images/ and masks/ with three good photographs."""
    return Path(shutil.copytree(demo_sites / "cold_noisy", tmp_path / "site"))


BAD = {
    "b_constant.png": "constant",
    "c_corrupt.png": "cannot be read as an image",
    "d_empty.png": "is empty",
    "g_nan.nii.gz": "NaN or infinite",
    "h_truncated.jpg": "cannot be read as an image",
    "i_volume.nii.gz": "3 spatial dimensions where the network expects 2",
}


def add_bad_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (64, 64, 4), dtype="uint8")
    Image.new("RGB", (64, 64), (9, 9, 9)).save(folder / "b_constant.png")
    (folder / "c_corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"junk" * 20)
    (folder / "d_empty.png").touch()
    nan = rng.random((64, 64, 1, 3)).astype("float32")
    nan[3, 3] = np.nan
    nib.save(nib.Nifti1Image(nan, np.eye(4)), folder / "g_nan.nii.gz")
    Image.fromarray(noise[..., :3]).save(folder / "whole.jpg")
    (folder / "h_truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:600])
    (folder / "whole.jpg").unlink()
    volume = rng.random((20, 20, 20, 3)).astype("float32")
    nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / "i_volume.nii.gz")


def test_bad_images_are_named_recorded_and_leave_the_stream_as_without_them(tmp_path: Path, site: Path) -> None:
    run_bundle([INFERENCE], dataset_dir=site, output_dir=tmp_path / "clean", **QUICK)
    add_bad_images(site / "images")
    done = run_bundle([INFERENCE], check=False, dataset_dir=site, output_dir=tmp_path / "out", **QUICK)
    assert done.returncode != 0
    assert f"{len(BAD)} of {len(BAD) + 3} images failed, the others are done" in done.stderr
    rows = {row["name"]: row for row in RecordFile(tmp_path / "out" / "records.jsonl").read()}
    for name, message in BAD.items():
        reason = rows[name.split(".")[0]]["reason"]
        assert rows[name.split(".")[0]]["status"] == "failed"
        assert name in reason
        assert re.search(message, reason), reason
    for i in range(3):
        mask = f"eye_00{i}.png"
        assert (tmp_path / "out" / mask).read_bytes() == (tmp_path / "clean" / mask).read_bytes()
    one, other = (load_state(tmp_path / name / "adaptation_state.pt")["adaptation"] for name in ("clean", "out"))
    assert str(one) == str(other)


def test_grey_and_rgba_are_converted_with_a_line_that_says_so(tmp_path: Path, site: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 4), dtype="uint8")
    for path in (site / "images").iterdir():
        path.unlink()
    Image.fromarray(noise[..., 0]).save(site / "images" / "grey.png")
    Image.fromarray(noise).save(site / "images" / "rgba.png")
    done = run_bundle([INFERENCE], dataset_dir=site, output_dir=tmp_path / "out", **QUICK)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert "grey" in done.stdout


def test_missing_masks_and_masks_that_do_not_fit_are_named(tmp_path: Path, site: Path) -> None:
    (site / "masks" / "eye_000.png").unlink()
    mask = np.asarray(Image.open(site / "masks" / "eye_001.png"))
    Image.fromarray(mask[:50]).save(site / "masks" / "eye_001.png")
    Image.fromarray(mask * 100).save(site / "masks" / "eye_002.png")
    done = run_bundle([INFERENCE, EVALUATE], check=False, dataset_dir=site, output_dir=tmp_path / "out", **QUICK)
    assert done.returncode != 0
    assert f"label file {site / 'masks' / 'eye_000.png'} does not exist" in done.stderr
    assert "the mask has shape (2, 50, 64) but the prediction (2, 64, 64)" in done.stderr
    assert "set mask_ranges and mask_background" in done.stderr
    assert load_state(tmp_path / "out" / "adaptation_state.pt")["adaptation"]["images_seen"] == 0


def test_stop_on_failure_stops_at_once(tmp_path: Path, site: Path) -> None:
    Image.new("RGB", (64, 64)).save(site / "images" / "eye_001.png")
    done = run_bundle(
        [INFERENCE], check=False, dataset_dir=site, output_dir=tmp_path / "out", stop_on_failure=True, **QUICK
    )
    assert done.returncode != 0
    assert "eye_001.png" in done.stderr
    assert "constant" in done.stderr
    assert len(RecordFile(tmp_path / "out" / "records.jsonl").read()) == 1
    assert not (tmp_path / "out" / "eye_002.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_dir": "{tmp}/empty"}, "no image found at '{tmp}/empty'"),
        ({"dataset_dir": "{tmp}/absent"}, "no image found at '{tmp}/absent'"),
        ({"ckpt_path": "{tmp}/absent.pt"}, "there is no checkpoint at {tmp}/absent.pt"),
        ({"ckpt_path": "{tmp}/other.pt"}, "the checkpoint {tmp}/other.pt does not fit the network UNet (missing: "),
        ({"output_dir": "/proc/none"}, "cannot write to the output folder /proc/none"),
        (
            {"network_def#norm": "instance", "ckpt_path": "{tmp}/instance.pt"},
            "UNet stores no source statistics to align with (found 17 x InstanceNorm2d): measure them once",
        ),
        ({"spatial_size": "[5,5]"}, "smaller than a prompt of side 7"),
        ({"sites": "['west']"}, "no image of site west"),
        ({"instance_prompt#steps": "0"}, "steps must be at least 1, got 0"),
        ({"start_from": "{tmp}/absent.pt"}, "there is no adaptation state at {tmp}/absent.pt"),
    ],
)
def test_what_concerns_the_whole_run_fails_with_the_name_and_the_fix(
    change: dict[str, str], message: str, tmp_path: Path, site: Path
) -> None:
    (tmp_path / "empty").mkdir()
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    network = UNet(2, 3, 2, (8, 16, 32, 64, 128), (2, 2, 2, 2), num_res_units=2, norm="instance")
    torch.save(network.state_dict(), tmp_path / "instance.pt")
    settings = {"dataset_dir": str(site), "output_dir": str(tmp_path / "out"), **QUICK}
    settings |= {key: value.format(tmp=tmp_path) for key, value in change.items()}
    done = run_bundle([INFERENCE], check=False, **settings)
    assert done.returncode != 0
    assert message.format(tmp=tmp_path) in done.stderr


def test_two_inputs_of_one_output_name_are_named(tmp_path: Path, site: Path) -> None:
    Image.open(site / "images" / "eye_000.png").save(site / "images" / "eye_000.bmp")
    done = run_bundle([INFERENCE], check=False, dataset_dir=site, output_dir=tmp_path / "out", **QUICK)
    assert done.returncode != 0
    assert "eye_000.bmp" in done.stderr
    assert "would both be written as eye_000" in done.stderr


def test_killed_run_resumes_to_what_an_uninterrupted_run_gives(tmp_path: Path, demo_sites: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_bundle([INFERENCE, EVALUATE], dataset_dir=demo_sites, output_dir=whole, **QUICK)
    command = [
        sys.executable, "-m", "monai.bundle", "run", "--config_file", f"['{INFERENCE}','{EVALUATE}']",
        "--bundle_root", str(BUNDLE), "--dataset_dir", str(demo_sites), "--output_dir", str(parts),
        *[part for key, value in QUICK.items() for part in (f"--{key}", value)],
    ]  # fmt: skip
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, **silent) as process:
        records = RecordFile(parts / "records.jsonl")
        deadline = time.monotonic() + 120
        while len(records.read()) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    done_before = len(records.read())
    assert 2 <= done_before < 6
    run_bundle([INFERENCE, EVALUATE], dataset_dir=demo_sites, output_dir=parts, resume=True, **QUICK)

    assert without_times(parts / "records.jsonl") == without_times(whole / "records.jsonl")
    one, other = (load_state(folder / "adaptation_state.pt") for folder in (whole, parts))
    assert str(one) == str(other)
    for mask in whole.rglob("*.png"):
        assert mask.read_bytes() == (parts / mask.relative_to(whole)).read_bytes()
    summaries = [json.loads((folder / "summary.json").read_text())["all"]["metrics"] for folder in (whole, parts)]
    assert summaries[0] == summaries[1]
