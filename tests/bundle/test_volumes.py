# SPDX-License-Identifier: Apache-2.0
"""NIfTI files: volumes and single slices come back in their geometry, and what cannot be used is named and harmless."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.data import DataLoader
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, ScaleIntensityd
from PIL import Image

from mgipt_monai import (
    MGIPT,
    AdaptationEvents,
    AdaptiveInferer,
    RecordFile,
    StreamFailedError,
    StreamingAdaptationEvaluator,
    find_stream,
    load_state,
    measure_source_statistics,
)
from mgipt_monai.data import CheckImaged, StreamDataset
from tests.bundle.conftest import BUNDLE, CONFIGS, run_bundle
from tests.bundle.threshold_network import ThresholdNetwork
from tests.conftest import same_state, stream, tiny_network

TILTED = np.array([[0, -1.6, 0.1, 3], [1.4, 0, 0.2, -40], [0, 0.3, 2.4, 5], [0, 0, 0, 1.0]])
FLIPPED = np.diag([-0.7, -0.9, 3.0, 1.0])


def ramp(*sides: int, seed: int = 0) -> np.ndarray:
    """Return an image that is brighter to the end of its first axis, and has no symmetry along the second."""
    noise = 0.1 * np.random.default_rng(seed).random(sides)
    slope = np.linspace(0, 1, sides[0]).reshape(-1, *[1] * (len(sides) - 1))
    return (slope + noise + 0.2 * np.linspace(0, 1, sides[1]).reshape(1, -1, *[1] * (len(sides) - 2))).astype("float32")


def save(path: Path, values: np.ndarray, affine: np.ndarray | None = TILTED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def run_threshold(tmp_path: Path, configs: list[Path], dims: int, **settings: object) -> None:
    """Run the bundle with a network that marks what is bright, in this process."""
    torch.save(ThresholdNetwork(1, dims).state_dict(), tmp_path / "w.pt")
    target = "tests.bundle.threshold_network.ThresholdNetwork"
    overlay = {
        "network_def": {"_target_": target, "in_channels": "@in_channels", "spatial_dims": "@spatial_dims"},
        **{"class_names": ["bright"], "mask_values": [1], "in_channels": 1, "spatial_dims": dims},
        **{"instance_prompt#steps": 1, "instance_prompt#lr": 0.0001, "global_prompts#lr": 0.0001},
    }
    (tmp_path / "threshold.yaml").write_text(yaml.safe_dump(overlay))
    flow = ConfigWorkflow(
        [str(path) for path in [CONFIGS / "inference.yaml", *configs, tmp_path / "threshold.yaml"]],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(BUNDLE),
        ckpt_path=str(tmp_path / "w.pt"),
        output_dir=str(tmp_path / "out"),
        **settings,
    )
    flow.initialize()
    flow.run()


def check_geometry(image: Path, mask: Path) -> None:
    """The mask lies where the image does, and marks its bright end."""
    source, written = nib.load(image), nib.load(mask)
    assert written.shape == source.shape[:3]
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)
    assert nib.aff2axcodes(written.affine) == nib.aff2axcodes(source.affine)
    values = np.asarray(written.dataobj)
    assert values[-len(values) // 5 :].mean() > 0.9
    assert values[: len(values) // 5].mean() < 0.1


@pytest.fixture
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI adds the bundle to Python's path."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.usefixtures("own_path")
def test_masks_of_volumes_lie_where_the_volumes_do(tmp_path: Path) -> None:
    save(tmp_path / "in" / "flipped.nii.gz", ramp(30, 22, 12), FLIPPED)
    save(tmp_path / "in" / "no_affine.nii.gz", ramp(20, 24, 16), None)
    save(tmp_path / "in" / "tilted.nii", ramp(26, 20, 14), TILTED)
    run_threshold(tmp_path, [], 3, dataset_dir=str(tmp_path / "in"), spatial_size=[24, 24, 16])
    for path in (tmp_path / "in").iterdir():
        check_geometry(path, tmp_path / "out" / f"{path.name.split('.')[0]}.nii.gz")


@pytest.mark.usefixtures("own_path")
@pytest.mark.parametrize(
    ("channels", "slices"),
    [(1, {"flat": (30, 22), "slice": (30, 22, 1), "channel": (30, 22, 1, 1)}), (3, {"colour": (30, 22, 1, 3)})],
)
def test_image_stored_as_one_slice_is_taken_by_a_2d_network_and_comes_back_as_one(
    channels: int, slices: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    for name, sides in slices.items():
        save(site / "images" / f"{name}.nii.gz", ramp(*sides))
        save(site / "masks" / f"{name}.nii.gz", (ramp(*sides[:3]) > 0.6).astype("uint8"))
    settings = {"dataset_dir": str(site), "spatial_size": [32, 32], "mask_ranges": [[1, 1]], "in_channels": channels}
    run_threshold(tmp_path, [CONFIGS / "evaluate.yaml"], 2, **settings)
    for name in slices:
        check_geometry(site / "images" / f"{name}.nii.gz", tmp_path / "out" / f"{name}.nii.gz")
    dice = [row["metrics"]["dsc"]["bright"] for row in RecordFile(tmp_path / "out" / "records.jsonl").read()]
    assert min(dice) > 0.9


def test_hippocampus_overlay_adapts_a_3d_network_and_gets_past_bad_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UNet(3, 1, 2, (4, 8, 8), (2, 2), num_res_units=2, norm="batch")
    torch.save(network.state_dict(), tmp_path / "w.pt")
    site = tmp_path / "site"
    for i, sides in enumerate([(24, 30, 20), (26, 28, 22)]):
        save(site / "images" / f"mr_{i}.nii.gz", 1000 * ramp(*sides, seed=i), TILTED)
        save(site / "masks" / f"mr_{i}.nii.gz", (2.9 * ramp(*sides).clip(0, 1)).astype("uint8"), TILTED)
    save(site / "images" / "a_time.nii.gz", ramp(12, 12, 12, 3))
    Image.fromarray((ramp(30, 30) * 100).astype("uint8")).save(site / "images" / "mr_00.png")
    settings = {"dataset_dir": site, "ckpt_path": tmp_path / "w.pt", "spatial_size": "[24,24,24]"}
    settings |= {"network_def#channels": "[4,8,8]", "network_def#strides": "[2,2]", "instance_prompt#steps": 1}
    configs = [CONFIGS / "inference.yaml", CONFIGS / "evaluate.yaml", "configs/hippocampus.yaml"]
    done = run_bundle(configs, check=False, output_dir=tmp_path / "out", **settings)
    assert done.returncode != 0
    assert "2 of 4 images failed, the others are done" in done.stderr
    rows = {row["name"]: row for row in RecordFile(tmp_path / "out" / "records.jsonl").read()}
    for name in ("mr_0", "mr_1"):
        mask = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert mask.shape == nib.load(site / "images" / f"{name}.nii.gz").shape
        np.testing.assert_allclose(mask.affine, TILTED, atol=1e-5)
        assert set(rows[name]["metrics"]["dsc"]) == {"anterior", "posterior"}
    assert load_state(tmp_path / "out" / "adaptation_state.pt")["adaptation"]["images_seen"] == 2


BAD = {
    "b_thin.nii.gz": "an image of 12x5x5 is smaller than a prompt of side 7: use a larger image or smaller",
    "c_time.nii.gz": "3 channels where the network expects 1: convert the file, or split it",
    "d_vector.nii.gz": "4 spatial dimensions where the network expects 3",
    "e_constant.nii.gz": "the image is constant, .* leave the file out",
    "f_flat.nii.gz": "2 spatial dimensions where the network expects 3",
    "g_photo.png": "2 spatial dimensions where the network expects 3",
    "h_cut_off.nii.gz": "is truncated: copy it again",
}


def test_bad_volumes_are_named_and_leave_the_state_bit_identical(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save(folder / "a_good.nii.gz", ramp(12, 14, 10))
    for name, sides in {"b_thin": (12, 5, 5), "c_time": (12, 14, 10, 3), "d_vector": (12, 14, 10, 1, 3)}.items():
        save(folder / f"{name}.nii.gz", ramp(*sides))
    save(folder / "e_constant.nii.gz", np.full((12, 14, 10), 7, "int16"))
    save(folder / "f_flat.nii.gz", ramp(12, 14))
    Image.fromarray((ramp(12, 14) * 100).astype("uint8")).save(folder / "g_photo.png")
    (folder / "h_cut_off.nii.gz").write_bytes((folder / "a_good.nii.gz").read_bytes()[:900])
    save(folder / "i_good.nii.gz", ramp(10, 10, 9, seed=1), None)

    items = find_stream(folder)
    alone, failed = run_volumes([items[0], items[-1]], checks=[])
    assert not failed
    # with the bundle's check on reading, and with the method's own where a pipeline has none
    for checks in ([CheckImaged("image", channels=1, spatial_dims=3)], []):
        mgipt, failed = run_volumes(items, checks)
        for row, (name, message) in zip(failed, BAD.items(), strict=True):
            assert name in row["reason"]
            if checks:
                assert re.search(message, row["reason"]), row["reason"]
        assert same_state(mgipt.adaptation_state(), alone.adaptation_state())


def run_volumes(items: list[dict], checks: list) -> tuple[MGIPT, list[dict]]:
    """Run a stream of files; return the method and the records of those that failed, each of which changed nothing."""
    network = tiny_network(3, in_channels=1)
    mgipt, failed = MGIPT(network, steps=1), []
    transforms = [LoadImaged("image"), EnsureChannelFirstd("image"), *checks, ScaleIntensityd("image")]
    loader = DataLoader(StreamDataset(items, Compose(transforms)), batch_size=1)
    engine = StreamingAdaptationEvaluator("cpu", loader, network, AdaptiveInferer(mgipt), progress=False)
    states = [mgipt.adaptation_state()]

    def note(engine: StreamingAdaptationEvaluator) -> None:
        states.append(mgipt.adaptation_state())
        if engine.state.record["status"] == "failed":
            failed.append(engine.state.record)
            assert same_state(*states[-2:])
        else:
            assert not same_state(*states[-2:])

    engine.add_event_handler(AdaptationEvents.IMAGE_FAILED, note)
    engine.add_event_handler(Events.ITERATION_COMPLETED, note)
    with contextlib.suppress(StreamFailedError):
        engine.run()
    return mgipt, failed


def test_statistics_of_other_weights_fail_every_volume_and_name_their_file(tmp_path: Path) -> None:
    images = stream(2, size=12, channels=1, dims=3)
    network, path = tiny_network(3, in_channels=1), tmp_path / "statistics.pt"
    measure_source_statistics(tiny_network(3, in_channels=1, seed=3), images).save(path)
    mgipt = MGIPT(network, statistics=path, steps=1)
    before = mgipt.adaptation_state()
    batches = [{"image": image, "name": [f"mr_{i}"]} for i, image in enumerate(images)]
    engine = StreamingAdaptationEvaluator("cpu", batches, network, AdaptiveInferer(mgipt), progress=False)
    with pytest.raises(
        StreamFailedError, match=rf"2 of 2 images failed(.|\n)*mr_1: the statistics file {path} was made"
    ):
        engine.run()
    assert same_state(before, mgipt.adaptation_state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aligned_layers": "decoder"}, "'decoder' matches no batch norm; there are: 1, 4"),
        ({"statistics": "absent.pt"}, "no statistics file at absent.pt: create it with"),
    ],
)
def test_wrong_settings_fail_at_construction(settings: dict[str, str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MGIPT(tiny_network(3, in_channels=1), **settings)
