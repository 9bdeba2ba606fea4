# SPDX-License-Identifier: Apache-2.0
"""Bundles of the shapes that people have: calibrated and adapted by laying one overlay over their own config."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.engines import EnsembleEvaluator
from PIL import Image
from torch.nn.functional import interpolate
from torch.optim.swa_utils import update_bn

from mgipt_monai import MGIPT, RecordFile, SourceStatistics, load_state
from mgipt_monai.utils.files import root_cause
from tests.bundle.conftest import ROOT, run_bundle
from tests.conftest import tiny_network

ZOO = Path(__file__).parent / "zoo"
ADAPT, MEASURE = (ROOT / "configs" / f"existing_{name}.yaml" for name in ("bundle", "source_statistics"))
# voxels of unequal sides, turned and tilted: nothing that a transform may forget goes unnoticed
AFFINE = np.array([[0, -1.6, 0.1, 3], [1.4, 0, 0.2, -40], [0, 0.3, 2.4, 5], [0, 0, 0, 1.0]])


def pattern(sides: tuple[int, ...], seed: int, shifted: bool) -> np.ndarray:
    """Return a smooth image in [0, 1]; a shifted one is brighter to one side and of another contrast."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, *[5] * len(sides), generator=generator)
    image = interpolate(coarse, size=sides, mode="bilinear" if len(sides) == 2 else "trilinear")[0, 0].numpy()
    image += 0.05 * torch.rand(sides, generator=generator).numpy()
    if shifted:
        image = 0.3 + 0.5 * image**2 + 0.3 * np.linspace(0, 1, sides[-1])
    return image.clip(0, 1)


def write_ct(folder: Path, shifted: bool) -> None:
    for seed, sides in enumerate([(26, 22, 12), (20, 24, 14)]):
        hounsfield = (pattern(sides, seed, shifted) * 220 - 60).astype("int16")
        nib.save(nib.Nifti1Image(hounsfield, AFFINE), folder / f"ct_{seed}.nii.gz")


def write_mr(folder: Path, shifted: bool) -> None:
    for case in range(2):
        (folder / f"case_{case}").mkdir()
        for i, sequence in enumerate(("flair", "t1", "t1ce", "t2")):
            values = (pattern((18, 20, 12), 4 * case + i, shifted) * 500).astype("float32")
            nib.save(nib.Nifti1Image(values, AFFINE), folder / f"case_{case}" / f"{case}_{sequence}.nii.gz")


def write_photographs(folder: Path, shifted: bool) -> None:
    for seed in range(2):
        colours = np.stack([pattern((72, 90), 10 * seed + i, shifted) for i in range(3)], axis=-1)
        Image.fromarray((colours * 255).astype("uint8")).save(folder / f"photo_{seed}.png")


@dataclass
class Case:
    """A bundle of the zoo folder, and how the overlay is told about it."""

    write: Callable[[Path, bool], None]
    head: str
    run_id: str = "run"
    has_batch_norm: bool = True
    windows: int = 2
    settings: dict[str, object] = field(default_factory=dict)


CASES = {
    "spleen_like": Case(write_ct, "softmax", windows=1, settings={"adaptation#source_weight": 1}),
    "brats_like": Case(write_mr, "sigmoid", has_batch_norm=False),
    "abdominal_like": Case(write_ct, "softmax", run_id="evaluating", has_batch_norm=False),
    "endoscopy_like": Case(write_photographs, "softmax"),
}


def make_bundle(root: Path, name: str) -> Path:
    """Make a bundle's folder: config, weights that go with its source images, these, and shifted ones as its data."""
    for folder in ("configs", "models", "source", "data"):
        (root / folder).mkdir(parents=True)
    write = CASES[name].write
    write(root / "source", False)
    write(root / "data", True)
    shutil.copytree(ZOO / "scripts", root / "scripts")
    config = shutil.copy(ZOO / f"{name}.yaml", root / "configs" / "inference.yaml")
    torch.manual_seed(0)
    parser = ConfigParser(ConfigParser.load_config_file(config))
    network, channels = (parser.get_parsed_content(f"network_def{key}") for key in ("", "#in_channels"))
    sides = (32, 32) if write is write_photographs else (32, 32, 32)
    images = [np.stack([pattern(sides, 9 * i + c, False) for c in range(channels)]) for i in range(4)]
    update_bn([torch.from_numpy(np.stack(images))], network)
    torch.save(network.state_dict(), root / "models" / "model.pt")
    return root


def read_masks(folder: Path) -> dict[str, np.ndarray]:
    """Return the written masks by their names, and look at their geometry on the way."""
    masks = {}
    for path in sorted(folder.rglob("*.*")):
        if path.suffix == ".png":
            masks[path.name] = np.asarray(Image.open(path))
            assert masks[path.name].shape == (72, 90)
        else:
            mask = nib.load(path)
            source = next((folder.parent / "data").rglob(path.name.replace("_seg", "")))
            assert mask.shape == nib.load(source).shape
            np.testing.assert_allclose(mask.affine, AFFINE, atol=1e-5)
            masks[path.name] = np.asarray(mask.dataobj)
    return masks


@pytest.mark.parametrize("name", CASES)
def test_one_overlay_adapts_the_bundle(name: str, tmp_path: Path) -> None:
    case, root = CASES[name], make_bundle(tmp_path / "bundle", name)
    config, run = root / "configs" / "inference.yaml", {"run_id": case.run_id, "bundle_root": root}
    run_bundle([config], output_dir=root / "before", **run)
    settings = {
        "adaptation_head": case.head,
        "adaptation_windows": case.windows,
        "adaptation#steps": 1,
        **case.settings,
    }
    if not case.has_batch_norm:
        settings["statistics_path"] = root / "adaptation" / "source_statistics.pt"
        run_bundle([config, MEASURE], dataset_dir=root / "source", adaptation_windows=case.windows, **run)
        assert SourceStatistics.load(settings["statistics_path"]).images == 2
        assert not (root / "eval").exists()
    run_bundle([config, ADAPT], output_dir=root / "after", **run, **settings)

    before, after = (read_masks(root / folder) for folder in ("before", "after"))
    assert len(after) == 2
    assert before.keys() == after.keys()
    for mask in after:
        assert len(np.unique(after[mask])) > 1
        assert (before[mask] != after[mask]).mean() > 0.005
    rows = RecordFile(root / "adaptation" / "records.jsonl").read()
    assert [(row["status"], row["index"]) for row in rows] == [("ok", 0), ("ok", 1)]
    assert all(str(root / "data") in row["name"] for row in rows)
    windows = case.windows if name != "endoscopy_like" else 1
    # one step of three global prompts, and one of each size of the instance prompt that was tried
    assert all(row["backwards"] == (3 + len(row["consistency"])) * windows for row in rows)
    assert load_state(root / "adaptation" / "adaptation_state.pt")["position"] == 2


def test_evaluator_in_another_place_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the overlay and MONAI add the bundle to it
    torch.save(tiny_network().state_dict(), tmp_path / "model.pt")
    evaluator = {
        "_target_": "SupervisedEvaluator",
        "device": "cpu",
        "val_data_loader": "$[{'image': torch.rand(1, 3, 24, 24)}]",
        "network": {"_target_": "tests.conftest.tiny_network"},
    }
    config = {"validate": {"evaluator": evaluator}, "run": ["$@validate#evaluator.run()"]}
    ConfigParser.export_config_file(config, tmp_path / "evaluate.json")
    flow = ConfigWorkflow(
        [str(tmp_path / "evaluate.json"), str(ADAPT)],
        logging_file=False,
        bundle_root=str(tmp_path),
        adapted_evaluator="@validate#evaluator",
        **{"adaptation#steps": 1},
    )
    flow.initialize()
    flow.run()
    assert len(RecordFile(tmp_path / "adaptation" / "records.jsonl").read()) == 1


def test_without_statistics_the_error_names_the_overlay_that_makes_them(tmp_path: Path) -> None:
    parser = ConfigParser(ConfigParser.load_config_files([ZOO / "brats_like.yaml", ADAPT]))
    parser["bundle_root"] = str(tmp_path)
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("adaptation")
    assert "x GroupNorm" in root_cause(caught.value)
    assert "configs/existing_source_statistics.yaml" in root_cause(caught.value)


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        (
            {"inferer": {"_target_": "SaliencyInferer", "cam_name": "CAM", "target_layers": "0"}},
            "not through a SaliencyInferer",
        ),
        (
            {"inferer": {"_target_": "SlidingWindowInferer", "roi_size": 16, "with_coord": True}},
            r"with_coord=True\) passes the place of each window to the network.*set with_coord=False",
        ),
        (
            {"_target_": "EnsembleEvaluator", "networks": "$[@net]", "pred_keys": ["pred"]},
            r"EnsembleEvaluator\(networks=\[MGIPT",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_a_statistics_file_is_asked_for(
    tmp_path: Path, evaluator: dict, message: str
) -> None:
    config = {
        "net": {"_target_": "torch.nn.InstanceNorm2d", "num_features": 3},
        "bundle_root": str(tmp_path),
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "cpu",
            "val_data_loader": "$[{'image': torch.rand(1, 3, 24, 24)}]",
            **({} if "networks" in evaluator else {"network": "@net"}),
            **evaluator,
        },
    }
    ConfigParser.export_config_file(config, tmp_path / "evaluate.json")
    parser = ConfigParser(ConfigParser.load_config_files([str(tmp_path / "evaluate.json"), str(ADAPT)]))
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("adaptation")
    assert re.search(message, str(root_cause(caught.value)))


def test_members_of_an_ensemble_adapt_each_on_its_own() -> None:
    methods = [MGIPT(tiny_network(seed=seed), steps=1) for seed in (0, 1)]
    engine = EnsembleEvaluator("cpu", [{"image": torch.rand(1, 3, 24, 24)}], methods, pred_keys=["one", "two"])
    engine.run()
    assert [method.images_seen for method in methods] == [1, 1]
    assert {"one", "two"} <= set(engine.state.output[0])
