# SPDX-License-Identifier: Apache-2.0
"""Uncertainty maps from the command line."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from mgipt_monai import RecordFile
from tests.bundle.conftest import CONFIGS, QUICK, ROOT, run_bundle

INFERENCE = CONFIGS / "inference.yaml"


def test_maps_lie_beside_unchanged_masks_in_their_geometry(tmp_path: Path) -> None:
    rng, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    rows, columns = np.mgrid[0:50, 0:70]
    blob = np.exp(-((rows - 25) ** 2 + (columns - 20) ** 2) / 200)
    picture = (0.7 * blob[..., None] + 0.3 * rng.random((50, 70, 3))) * [0.9, 0.6, 0.3]
    Image.fromarray((255 * picture).astype("uint8")).save(images / "eye.png")
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(picture[:, :, None].astype("float32"), affine), images / "slice.nii.gz")
    for out, settings in (("plain", {}), ("mapped", {"save_uncertainty": True})):
        run_bundle([INFERENCE], dataset_dir=images, output_dir=tmp_path / out, **QUICK, **settings)
    assert not list((tmp_path / "plain").glob("*_uncertainty*"))
    masks = [np.asarray(Image.open(tmp_path / out / "eye.png")) for out in ("plain", "mapped")]
    assert np.array_equal(*masks)
    uncertainty = Image.open(tmp_path / "mapped" / "eye_uncertainty.png")
    assert (uncertainty.mode, uncertainty.size) == ("L", (70, 50))
    assert np.asarray(uncertainty).max() > 0
    volume = nibabel.load(tmp_path / "mapped" / "slice_uncertainty.nii.gz")
    assert volume.get_data_dtype() == np.float32
    assert volume.shape == (50, 70, 1)
    assert np.allclose(volume.affine, affine)
    assert 0 < volume.get_fdata().max() <= 1
    assert all(0 <= row["disagreement"] <= 1 for row in RecordFile(tmp_path / "mapped" / "records.jsonl").read())


def test_method_without_views_is_refused_before_the_first_image(tmp_path: Path, demo_sites: Path) -> None:
    source = ROOT / "configs" / "methods" / "source.yaml"
    settings = {"dataset_dir": demo_sites, "output_dir": tmp_path, "save_uncertainty": True}
    done = run_bundle([INFERENCE, source], check=False, **settings, **QUICK)
    assert done.returncode
    assert "Source, as it is set, has no uncertainty" in done.stdout + done.stderr
    assert not (tmp_path / "records.jsonl").exists()
