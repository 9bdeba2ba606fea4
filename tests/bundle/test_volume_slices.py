# SPDX-License-Identifier: Apache-2.0
"""NIfTI volumes through the bundle's 2D network."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet

from tests.bundle.conftest import run_bundle

SMALL = {"network_def#channels": "[4,8]", "network_def#strides": "[2]", "spatial_size": "[32,32,-1]"}


@pytest.mark.parametrize("slices", ["shared", "own"])
def test_volumes_come_back_as_volumes(tmp_path: Path, slices: str) -> None:
    affine = np.diag([0.7, 0.8, 3.0, 1.0])
    affine[:3, 3] = [10, -20, 30]
    images = np.random.default_rng(0).normal(100, 20, (30, 24, 9)).astype(np.float32)
    (tmp_path / "images").mkdir()
    nib.save(nib.Nifti1Image(images, affine), tmp_path / "images" / "case.nii.gz")
    torch.manual_seed(0)
    torch.save(UNet(2, 1, 2, (4, 8), (2,), num_res_units=2, norm="batch").state_dict(), tmp_path / "model.pt")
    run_bundle(
        ["bundle/configs/inference.yaml", "configs/volume_slices.yaml"],
        dataset_dir=tmp_path / "images",
        output_dir=tmp_path / "masks",
        ckpt_path=tmp_path / "model.pt",
        **SMALL,
        **{"inferer#slices": slices, "instance_prompt#steps": 1},
    )
    mask = nib.load(tmp_path / "masks" / "case.nii.gz")
    assert mask.shape == images.shape
    np.testing.assert_allclose(mask.affine, affine, atol=1e-5)
    (record,) = map(json.loads, (tmp_path / "masks" / "records.jsonl").read_text().splitlines())
    assert record["status"] == "ok"
    assert ("adapted_slices" in record) == (slices == "own")
    state = torch.load(tmp_path / "masks" / "adaptation_state.pt", weights_only=True)["adaptation"]
    # one prompt for the volume, or one for its slices
    assert state["teachers"][0].ndim == (5 if slices == "shared" else 4)
