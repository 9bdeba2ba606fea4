# SPDX-License-Identifier: Apache-2.0
"""Every config runs through ``python -m monai.bundle run`` on image files."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mgipt_monai
from mgipt_monai import RecordFile
from mgipt_monai.networks import PraNet, ResUNet
from tests.bundle.conftest import BUNDLE, CONFIGS, QUICK, ROOT, run_bundle
from tests.conftest import without_times

INFERENCE, EVALUATE, TRAIN = (CONFIGS / f"{name}.yaml" for name in ("inference", "evaluate", "train"))
SMALL = {**QUICK, "network_def#channels": "[4,8,16,16,16]"}


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small network of three channels in, two out."""
    return weights(tmp_path_factory.mktemp("weights") / "w.pt", classes=2)


def weights(path: Path, classes: int, channels: int = 3) -> Path:
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    network = UNet(2, channels, classes, (4, 8, 16, 16, 16), (2, 2, 2, 2), num_res_units=2, norm="batch")
    torch.save(network.state_dict(), path)
    return path


def photograph(path: Path, size: tuple[int, int] = (52, 75), mode: str = "RGB", seed: int = 0) -> Path:
    """A photograph of ``size`` (height, width) that is brighter to the right and has no symmetry."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(20, 200, size[1])[None, :, None] + rng.integers(0, 50, (*size, 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(slope.astype("uint8")[..., :3]).convert(mode).save(path)
    return path


def test_inference_writes_a_mask_per_image_and_the_records(tmp_path: Path, demo_sites: Path) -> None:
    run_bundle([INFERENCE], dataset_dir=demo_sites, output_dir=tmp_path, **QUICK)
    for site in ("cold_noisy", "warm_vignetted"):
        for i in range(3):
            mask = np.asarray(Image.open(tmp_path / site / f"eye_00{i}.png"))
            assert mask.shape == (64, 64)
            assert set(np.unique(mask)) <= {0, 1, 2}
    rows = RecordFile(tmp_path / "records.jsonl").read()
    assert [row["name"] for row in rows] == [
        f"{s}/eye_00{i}" for s in ("cold_noisy", "warm_vignetted") for i in range(3)
    ]
    needed = {
        "name",
        "site",
        "status",
        "instance_size",
        "loss_before",
        "loss_after",
        "consistency",
        "forwards",
        "seconds",
    }
    assert all(needed <= set(row) for row in rows)
    assert not list(tmp_path.rglob(".part-*"))


def test_inference_takes_a_glob_pattern_and_a_datalist(tmp_path: Path, demo_sites: Path) -> None:
    image = demo_sites / "cold_noisy" / "images" / "eye_001.png"
    (tmp_path / "list.json").write_text(json.dumps({"testing": [{"image": str(image), "site": "clinic"}]}))
    for source, mask in ((f"{image.parent}/*1.png", "eye_001.png"), (tmp_path / "list.json", "clinic/eye_001.png")):
        output = tmp_path / "out"
        run_bundle([INFERENCE], dataset_dir=source, output_dir=output, overwrite=True, **QUICK)
        assert [row["name"] for row in RecordFile(output / "records.jsonl").read()] == [mask.removesuffix(".png")]
        assert (output / mask).is_file()


def test_shuffled_rounds_write_masks_and_records_of_each_round(tmp_path: Path, demo_sites: Path) -> None:
    settings = {"dataset_dir": demo_sites, "order": "shuffled", "rounds": 2, "limit": 2, "reset_at_site": True}
    run_bundle([INFERENCE], output_dir=tmp_path, **settings, **QUICK)
    images = [f"{site}/eye_00{i}" for site in ("cold_noisy", "warm_vignetted") for i in range(2)]
    masks = sorted(str(path.relative_to(tmp_path).with_suffix("")) for path in tmp_path.rglob("*.png"))
    assert masks == [*images[:2], *(f"round_2/{name}" for name in images), *images[2:]]
    rows = RecordFile(tmp_path / "records.jsonl").read()
    ordered = mgipt_monai.data.order_stream(mgipt_monai.data.find_stream(demo_sites, limit=2), "shuffled", rounds=2)
    assert [(row["name"], row["site"], row["round"]) for row in rows] == [
        (item["name"], item["site"], item["round"]) for item in ordered
    ]
    # the count of images since the latest reset starts anew with each change of site
    borders = [i for i, (one, other) in enumerate(pairwise(rows), 1) if one["site"] != other["site"]]
    assert [i for i, row in enumerate(rows) if row["index"] == 0] == [0, *borders]


def test_evaluation_reports_the_figures_per_site(tmp_path: Path, demo_sites: Path) -> None:
    done = run_bundle([INFERENCE, EVALUATE], dataset_dir=demo_sites, output_dir=tmp_path, **QUICK)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["cold_noisy", "warm_vignetted", "all"]
    assert set(summary["all"]["metrics"]["dsc"]) == {"disc", "cup", "mean", "worst_tenth"}
    assert "worst tenth" in done.stdout
    # the figures are those of the written masks
    mask = np.asarray(Image.open(tmp_path / "cold_noisy" / "eye_000.png"))
    label = np.asarray(Image.open(demo_sites / "cold_noisy" / "masks" / "eye_000.png"))
    disc = 2 * ((mask > 0) & (label > 0)).sum() / ((mask > 0).sum() + (label > 0).sum())
    row = RecordFile(tmp_path / "records.jsonl").read()[0]
    # a cup outside the disc is drawn over the background, so the written disc may be a little larger
    assert row["metrics"]["dsc"]["disc"] == pytest.approx(disc, abs=0.02)


WITHOUT_A_FILE = [path for path in sorted(ROOT.glob("configs/methods/*.yaml")) if path.stem != "ttn"]  # see test_cli


@pytest.mark.parametrize("overlay", WITHOUT_A_FILE, ids=lambda path: path.stem)
def test_every_method_runs_by_adding_its_overlay(overlay: Path, tmp_path: Path, demo_sites: Path) -> None:
    settings = {"dataset_dir": demo_sites, "output_dir": tmp_path, "limit": 1, "spatial_size": "[64,64]"}
    run_bundle([INFERENCE, EVALUATE, overlay], **settings)
    rows = RecordFile(tmp_path / "records.jsonl").read()
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert "instance_size" not in rows[0]
    assert rows[0]["forwards"] >= 1


def test_working_ahead_writes_the_same_files(tmp_path: Path, demo_sites: Path) -> None:
    settings = {"dataset_dir": demo_sites, "limit": 2, "num_workers": 1, **QUICK}
    for name, overlays in (("plain", []), ("ahead", ["configs/work_ahead.yaml"])):
        run_bundle([INFERENCE, EVALUATE, *overlays], output_dir=tmp_path / name, **settings)
    masks = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").glob("*/*.png"))
    assert len(masks) == 4
    for mask in masks:
        assert (tmp_path / "plain" / mask).read_bytes() == (tmp_path / "ahead" / mask).read_bytes()
    assert without_times(tmp_path / "plain" / "records.jsonl") == without_times(tmp_path / "ahead" / "records.jsonl")


def test_released_preset_runs(tmp_path: Path, demo_sites: Path) -> None:
    overlay = "configs/presets/released.yaml"
    run_bundle([INFERENCE, EVALUATE, overlay], dataset_dir=demo_sites, output_dir=tmp_path, limit=1, **QUICK)
    assert "instance_size" in RecordFile(tmp_path / "records.jsonl").read()[0]


@pytest.mark.parametrize("coding", ["index", "grey"])
def test_fundus_overlay_takes_both_codings(coding: str, tmp_path: Path, small_weights: Path, demo_sites: Path) -> None:
    sites = tmp_path / "sites"
    shutil.copytree(demo_sites, sites)
    if coding == "grey":
        for path in sites.glob("*/masks/*.png"):
            Image.fromarray(np.array([255, 128, 0], "uint8")[np.asarray(Image.open(path))]).save(path)
    run_bundle(
        [INFERENCE, EVALUATE, "configs/fundus_odoc.yaml"],
        dataset_dir=sites,
        output_dir=tmp_path / "out",
        ckpt_path=small_weights,
        mask_coding=coding,
        limit=1,
        **SMALL,
    )
    dice = RecordFile(tmp_path / "out" / "records.jsonl").read()[0]["metrics"]["dsc"]
    assert 0 < dice["cup"] < dice["disc"] < 1


@pytest.mark.parametrize("winner", [0, 1, 2])
def test_softmax_head_leaves_the_background_out(winner: int, tmp_path: Path, demo_sites: Path) -> None:
    path = weights(tmp_path / "w.pt", classes=3)
    state = torch.load(path, weights_only=True)
    last = [key for key in state if key.endswith("bias") and len(state[key]) == 3][-1]
    state[last][winner] += 100
    torch.save(state, path)
    run_bundle(
        [INFERENCE, EVALUATE],
        dataset_dir=demo_sites,
        output_dir=tmp_path / "out",
        ckpt_path=path,
        head="softmax",
        limit=1,
        **SMALL,
    )
    rows = RecordFile(tmp_path / "out" / "records.jsonl").read()
    assert list(rows[0]["metrics"]["dsc"]) == ["disc", "cup"]
    mask = np.asarray(Image.open(tmp_path / "out" / "cold_noisy" / "eye_000.png"))
    assert np.unique(mask).tolist() == [winner]


def test_vessels_overlay(tmp_path: Path) -> None:
    site = tmp_path / "vessels"
    photograph(site / "images" / "a.tif", size=(40, 64))
    mask = np.zeros((40, 64), "uint8")
    mask[10:20] = 255
    (site / "masks").mkdir()
    Image.fromarray(mask).save(site / "masks" / "a.png")
    run_bundle(
        [INFERENCE, EVALUATE, "configs/vessels.yaml"],
        dataset_dir=site,
        output_dir=tmp_path / "out",
        ckpt_path=weights(tmp_path / "w.pt", classes=1),
        **SMALL,
    )
    written = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert written.shape == (40, 64)
    assert set(np.unique(written)) <= {0, 255}
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())["all"]["metrics"]["dsc"]) >= {"vessel"}


def test_folder_overlay_with_the_paths_set(tmp_path: Path, small_weights: Path) -> None:
    photograph(tmp_path / "mine" / "a.png")
    run_bundle(
        [INFERENCE, "configs/folder.yaml"],
        dataset_dir=tmp_path / "mine",
        output_dir=tmp_path / "out",
        ckpt_path=small_weights,
        **SMALL,
    )
    assert Image.open(tmp_path / "out" / "a.png").size == (75, 52)


@pytest.mark.parametrize(("network", "protocol"), [(ResUNet, "odoc"), (PraNet, "polyp")])
def test_the_published_source_network_takes_the_place_of_the_unet(
    network: type[nn.Module], protocol: str, tmp_path: Path, demo_sites: Path
) -> None:
    torch.manual_seed(0)
    torch.save(network().state_dict(), tmp_path / "w.pt")
    run_bundle(
        [INFERENCE, f"configs/protocols/{protocol}.yaml"],
        dataset_dir=demo_sites,
        sites="['cold_noisy','warm_vignetted']",
        output_dir=tmp_path / "out",
        ckpt_path=tmp_path / "w.pt",
        limit=1,
        **QUICK,
    )
    assert RecordFile(tmp_path / "out" / "records.jsonl").read()[1]["status"] == "ok"


def test_training_writes_weights_that_inference_takes(tmp_path: Path, demo_sites: Path) -> None:
    settings = {"network_def#channels": "[4,8,16,16,16]", "spatial_size": "[64,64]", "dataset_dir": demo_sites}
    done = run_bundle(
        [INFERENCE, TRAIN], output_dir=tmp_path / "model", max_epochs=2, val_interval=1, batch_size=2, **settings
    )
    assert "val_mean_dice" in done.stdout
    written = {path.name for path in (tmp_path / "model").iterdir()}
    assert written == {"model.pt", "model.pt.sha256", "training.pt", ".mgipt_written"}
    run_bundle(
        [INFERENCE],
        output_dir=tmp_path / "out",
        ckpt_path=tmp_path / "model" / "model.pt",
        limit=1,
        **{**settings, **QUICK},
    )


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "tif", "tiff", "bmp"])
def test_mask_of_a_photograph_has_its_name_size_and_orientation(
    ending: str, tmp_path: Path, threshold_bundle: tuple
) -> None:
    path = photograph(tmp_path / "in" / f"eye.one.{ending}")
    configs, settings = threshold_bundle
    run_bundle(configs, dataset_dir=path.parent, output_dir=tmp_path / "out", **settings)
    mask = np.asarray(Image.open(tmp_path / "out" / "eye.one.png"))
    assert mask.shape == (52, 75)
    # the network marks what is bright, and the photograph is bright on its right
    assert mask[:, 60:].mean() > 0.9
    assert mask[:, :15].mean() < 0.1


def test_mask_of_a_nifti_has_its_affine_and_orientation(tmp_path: Path, threshold_bundle: tuple) -> None:
    affine = np.array([[0, -0.5, 0, 3], [0.7, 0, 0, -4], [0, 0, 2.0, 5], [0, 0, 0, 1]])
    data = np.linspace(0, 1, 40)[:, None].repeat(56, 1).astype("float32")
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "in" / "slice.nii.gz")
    configs, settings = threshold_bundle
    run_bundle(configs, dataset_dir=tmp_path / "in", output_dir=tmp_path / "out", in_channels=1, **settings)
    mask = nib.load(tmp_path / "out" / "slice.nii.gz")
    np.testing.assert_allclose(mask.affine, affine)
    values = np.asarray(mask.dataobj).squeeze()
    assert values.shape == (40, 56)
    assert values[32:].mean() > 0.9
    assert values[:8].mean() < 0.1


@pytest.fixture
def threshold_bundle(tmp_path: Path) -> tuple[list, dict]:
    """Configs whose network marks every voxel above the middle of its range, so that geometry can be seen."""
    overlay = tmp_path / "threshold.yaml"
    overlay.write_text(
        "network_def: {_target_: tests.bundle.threshold_network.ThresholdNetwork, in_channels: '@in_channels'}\n"
        "class_names: [bright]\nmask_values: [1]\n"
        "instance_prompt#steps: 1\ninstance_prompt#lr: 0.0001\nglobal_prompts#lr: 0.0001\n"
    )
    from tests.bundle.threshold_network import ThresholdNetwork

    torch.save({}, tmp_path / "none.pt")
    network = ThresholdNetwork(1)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    return [INFERENCE, overlay], {"ckpt_path": tmp_path / "w.pt", "spatial_size": "[64,64]"}


def test_columns_first_reading_gives_the_same_geometry(tmp_path: Path, threshold_bundle: tuple) -> None:
    path = photograph(tmp_path / "in" / "eye.png")
    configs, settings = threshold_bundle
    run_bundle(configs, dataset_dir=path.parent, output_dir=tmp_path / "out", reverse_indexing=True, **settings)
    mask = np.asarray(Image.open(tmp_path / "out" / "eye.png"))
    assert mask.shape == (52, 75)
    assert mask[:, 60:].mean() > 0.9
    assert mask[:, :15].mean() < 0.1


def test_same_command_twice_is_bit_identical(tmp_path: Path, demo_sites: Path) -> None:
    for name in ("one", "other"):
        run_bundle([INFERENCE], dataset_dir=demo_sites, output_dir=tmp_path / name, limit=2, **QUICK)
    masks = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(masks) == 4
    for mask in masks:
        assert (tmp_path / "one" / mask).read_bytes() == (tmp_path / "other" / mask).read_bytes()
    one, other = (torch.load(tmp_path / name / "adaptation_state.pt", weights_only=True) for name in ("one", "other"))
    assert str(one) == str(other)


def test_workflow_run_twice_goes_on_with_the_adaptation(tmp_path: Path, demo_sites: Path) -> None:
    from monai.bundle import ConfigWorkflow

    flow = ConfigWorkflow(
        config_file=str(INFERENCE),
        workflow_type="infer",
        bundle_root=str(BUNDLE),
        dataset_dir=str(demo_sites),
        output_dir=str(tmp_path),
        limit=1,
        spatial_size=[64, 64],
        overwrite=True,
        **{"instance_prompt#steps": 1},
    )
    flow.initialize()
    flow.run()
    flow.run()
    assert flow.inferer.method.images_seen == 4
    # initialize builds everything anew, so the adaptation must be handed over by its file
    shutil.move(tmp_path / "adaptation_state.pt", tmp_path / "earlier.pt")
    flow.parser["start_from"] = str(tmp_path / "earlier.pt")
    flow.initialize()
    assert flow.inferer.method.images_seen == 0
    flow.run()
    assert flow.inferer.method.images_seen == 6


def test_project_root_has_what_the_readme_says() -> None:
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "setup.cfg", "constraints.txt"):
        assert (ROOT / name).is_file(), name


def test_names_are_hidden_and_cost_is_limited_on_request(tmp_path: Path, demo_sites: Path) -> None:
    run_bundle([INFERENCE], dataset_dir=demo_sites, output_dir=tmp_path, identifiers="hashed", max_forwards=9, **QUICK)
    for row in RecordFile(tmp_path / "records.jsonl").read():
        assert len(row["name"]) == 16
        assert row["forwards"] + row["backwards"] <= 9
        assert row["dropped"]
    assert (tmp_path / "records.key").is_file()
