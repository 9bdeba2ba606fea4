# SPDX-License-Identifier: Apache-2.0
"""A commissioned site in an existing bundle: ``site_existing.yaml`` laid over the bundle's own config."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.engines import SupervisedEvaluator
from PIL import Image
from scipy.ndimage import binary_erosion
from torch import nn
from torch.optim.swa_utils import update_bn

from mgipt_monai import RecordFile, find_stream, load_state
from mgipt_monai.commissioning import commission, write_site
from mgipt_monai.commissioning.trial import BASES, build_base
from mgipt_monai.handlers import CommissioningHandler
from mgipt_monai.handlers.commission_site import channels_of
from mgipt_monai.methods import Commissioned
from tests.bundle.conftest import ROOT, run_bundle
from tests.bundle.test_existing_bundles import ADAPT, AFFINE, make_bundle, pattern, read_masks

COMMISSION = ROOT / "configs" / "existing_commission.yaml"
UNET = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "channels": [4, 8, 8], "strides": [2, 2]}


def small_bundle(root: Path, name: str) -> Path:
    """Make a bundle of the zoo; photographs get a small network, as activations of the random large one are extreme."""
    make_bundle(root, name)
    if name == "endoscopy_like":
        path = root / "configs" / "inference.yaml"
        config = {**ConfigParser.load_config_file(path), "network_def": {"_target_": "UNet", **UNET, "norm": "batch"}}
        ConfigParser.export_config_file(config, str(path), fmt="yaml")
        torch.manual_seed(0)
        network = ConfigParser(config).get_parsed_content("network_def")
        images = [np.stack([pattern((64, 64), 9 * i + c, False) for c in range(3)]) for i in range(4)]
        update_bn([torch.from_numpy(np.stack(images))], network)
        torch.save(network.state_dict(), root / "models" / "model.pt")
    return root


def write_labelled(folder: Path, name: str) -> None:
    """Write six more images of the site."""
    folder.mkdir()
    for i in range(6):
        if name == "spleen_like":
            hounsfield = (pattern((24, 22, 14), 50 + i, True) * 220 - 60).astype("int16")
            nib.save(nib.Nifti1Image(hounsfield, AFFINE), folder / f"ct_{i}.nii.gz")
        else:
            colours = np.stack([pattern((72, 90), 500 + 10 * i + c, True) for c in range(3)], axis=-1)
            Image.fromarray((colours * 255).astype("uint8")).save(folder / f"photo_{i}.png")


def bundle_of(root: Path, **settings: Any) -> ConfigParser:
    """Return the bundle's parts in this process, with weights."""
    config = ConfigParser.load_config_file(root / "configs" / "inference.yaml")
    parser = ConfigParser({**config, "bundle_root": str(root), **{key: str(value) for key, value in settings.items()}})
    weights = torch.load(root / "models" / "model.pt", weights_only=True)
    parser.get_parsed_content("network").load_state_dict(weights)
    parser.get_parsed_content("network").eval()
    return parser


def labelled_by(network: nn.Module, parser: ConfigParser) -> list[dict[str, Any]]:
    """Return the bundle's images with smaller labels than a network's own predictions."""
    labelled = []
    for i, item in enumerate(parser.get_parsed_content("dataset")):
        with torch.no_grad():
            logits = parser.get_parsed_content("inferer")(item["image"][None], network)[0].as_tensor()
        margin = logits[1] - logits[0]
        label = (margin > margin.mean() + margin.std())[None]
        labelled.append({"image": item["image"], "label": label, "name": f"{i}"})
    return labelled


@pytest.mark.parametrize(
    ("name", "candidate", "corrected"),
    [
        ("endoscopy_like", "none + norms", ["norms", "offset"]),
        ("endoscopy_like", "steady + offset", ["offset"]),
        ("spleen_like", "fast + offset", ["offset"]),
    ],
)
def test_overlay_adapts_an_existing_bundle_as_commissioned(
    name: str, candidate: str, corrected: list[str], tmp_path: Path
) -> None:
    root, site = small_bundle(tmp_path / "bundle", name), tmp_path / "site"
    write_labelled(tmp_path / "labelled", name)
    parser = bundle_of(root, dataset_dir=tmp_path / "labelled")
    network, inferer = (parser.get_parsed_content(key) for key in ("network", "inferer"))
    with_its_norms = copy.deepcopy(network)
    if "norms" in corrected:
        images = [item["image"].as_tensor() for item in parser.get_parsed_content("dataset")]
        update_bn([torch.stack(images)], with_its_norms)
    labelled = labelled_by(with_its_norms.eval(), parser)
    windows = inferer if name == "spleen_like" else None
    result = commission(network, labelled, head="softmax", candidates=[candidate], inferer=windows, max_harm=1)
    assert result.certified
    write_site(result, site, labelled)

    config = root / "configs" / "inference.yaml"
    run_bundle([config, ADAPT, site / "site_existing.yaml"], bundle_root=root, output_dir=root / "after")
    rows = RecordFile(root / "adaptation" / "records.jsonl").read()
    assert [(row["status"], row["corrected"], row["monitor"]["alarm"]) for row in rows] == [
        ("ok", corrected, False)
    ] * 2

    parser = bundle_of(root, output_dir=root / "expected")
    network = parser.get_parsed_content("network")
    base = build_base(BASES[result.table[0].base], network, {"head": "softmax", "statistics_path": None, "seed": 0})
    method = Commissioned(base, site / "site.pt", "softmax")
    method.predict_through(parser.get_parsed_content("inferer"))
    for item, row in zip(parser.get_parsed_content("dataset"), rows, strict=True):
        with torch.no_grad():
            logits = method(item["image"][None])
        parser.get_parsed_content("postprocessing")({**item, "pred": logits[0]})
        assert method.last[0]["monitor"] == row["monitor"]
    written, expected = (read_masks(root / folder) for folder in ("after", "expected"))
    assert len(written) == 2
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[mask], expected[mask]) for mask in written)
    assert all(len(np.unique(mask)) > 1 for mask in written.values())
    saved = load_state(root / "adaptation" / "adaptation_state.pt")
    assert saved["settings"]["site"] == method.settings()["site"]


def test_weights_that_the_bundle_loads_must_be_those_commissioned(tmp_path: Path) -> None:
    root, site = small_bundle(tmp_path / "bundle", "endoscopy_like"), tmp_path / "site"
    write_labelled(tmp_path / "labelled", "endoscopy_like")
    parser = bundle_of(root, dataset_dir=tmp_path / "labelled")
    network = parser.get_parsed_content("network")
    labelled = labelled_by(network, parser)
    result = commission(network, labelled, head="softmax", candidates=["none + offset"], max_harm=1)
    assert result.certified
    write_site(result, site, labelled)
    weights = torch.load(root / "models" / "model.pt", weights_only=True)
    key = next(key for key in weights if key.endswith("weight"))
    torch.save({**weights, key: weights[key] + 1}, root / "models" / "model.pt")
    config = root / "configs" / "inference.yaml"
    done = run_bundle([config, ADAPT, site / "site_existing.yaml"], check=False, bundle_root=root)
    assert done.returncode
    assert "the site was commissioned with other weights than this UNet has" in done.stdout + done.stderr
    assert not (root / "eval").exists()


def evaluation_of(root: Path) -> Path:
    """Write the spleen-like bundle's config for evaluation, as the zoo has it: below ``validate``, with labels."""
    config = ConfigParser.load_config_file(root / "configs" / "inference.yaml")
    for key in ("postprocessing", "run"):
        del config[key]
    transforms = config["preprocessing"]["transforms"]
    for transform in transforms:
        if transform["_target_"] != "ScaleIntensityRanged":
            transform["keys"] = ["image", "label"]
    transforms[3]["mode"] = ["bilinear", "nearest"]
    config["dataset"]["data"], config["evaluator"]["postprocessing"] = [], None
    moved = {key: config.pop(key) for key in ("preprocessing", "dataset", "dataloader", "inferer", "evaluator")}
    text = str({**config, "validate": moved, "run": ["$@validate#evaluator.run()"]})
    for key in moved:
        text = text.replace(f"@{key}'", f"@validate#{key}'")
    path = root / "configs" / "evaluate.yaml"
    ConfigParser.export_config_file(ast.literal_eval(text), str(path), fmt="yaml")
    return path


def test_overlay_commissions_the_network_of_an_existing_bundle(tmp_path: Path) -> None:
    root, data, site = make_bundle(tmp_path / "bundle", "spleen_like"), tmp_path / "labelled", tmp_path / "site"
    data.mkdir()
    write_labelled(data / "images", "spleen_like")
    config, evaluation = root / "configs" / "inference.yaml", evaluation_of(root)
    run_bundle([config], bundle_root=root, dataset_dir=data / "images", output_dir=tmp_path / "predicted")
    (data / "masks").mkdir()
    for path in (tmp_path / "predicted").rglob("*.nii.gz"):
        mask = nib.load(path)
        smaller = binary_erosion(np.asarray(mask.dataobj) > 0).astype("uint8")
        nib.save(nib.Nifti1Image(smaller, mask.affine), data / "masks" / path.name.replace("_seg", ""))

    settings = {"bundle_root": root, "labelled_dir": data, "site_dir": site, "validate#dataset#data": "@labelled"}
    tried = {"commissioning#candidates": ["none + offset"], "commissioning#max_harm": 1}
    run_bundle([evaluation, COMMISSION], **settings, **tried)
    report = json.loads((site / "commissioning.json").read_text())
    assert [case["name"] for case in report["cases"]] == [f"ct_{i}" for i in range(6)]
    assert report["certified"]
    run_bundle([config, ADAPT, site / "site_existing.yaml"], bundle_root=root, output_dir=root / "after")
    rows = RecordFile(root / "adaptation" / "records.jsonl").read()
    assert [(row["status"], row["corrected"]) for row in rows] == [("ok", ["offset"])] * 2

    # the same cases through Python
    parser = bundle_of(root)
    evaluator = ConfigParser({**ConfigParser.load_config_file(evaluation), "bundle_root": str(root)})
    evaluator["validate"]["dataset"]["data"] = find_stream(data, labelled=True)
    cases = [
        {"image": case["image"], "label": case["label"], "name": str(i)}
        for i, case in enumerate(evaluator.get_parsed_content("validate#dataset"))
    ]
    inferer = evaluator.get_parsed_content("validate#inferer")
    network = parser.get_parsed_content("network")
    result = commission(network, cases, head="softmax", candidates=["none + offset"], inferer=inferer, max_harm=1)
    assert result.statement == report["statement"]

    # an audit refuses the images that it was commissioned on
    done = run_bundle([evaluation, COMMISSION], check=False, audit=True, **settings)
    assert "the site was commissioned on this image" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("label", "classes", "head", "expected"),
    [
        ([[0, 1, 2]], 2, "softmax", [[0, 1, 0], [0, 0, 1]]),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 2, "softmax", [[0, 1, 0], [0, 0, 1]]),
        ([[1, 1, 0], [0, 1, 0]], 2, "sigmoid", [[1, 1, 0], [0, 1, 0]]),
        ([[0, 1, 1]], 1, "softmax", [[0, 1, 1]]),
        ([[0, 1, 2]], 2, "sigmoid", [[0, 1, 0], [0, 0, 1]]),
        ([[0, 2, 2]], 1, "sigmoid", r"ct: the label has class 2 and the network predicts 1 classes \(sigmoid"),
        ([[0, 1], [1, 0]], 3, "softmax", r"ct: the label has 2 channels and the network predicts 3 classes"),
    ],
)
def test_labels_of_pipelines_become_channels(label: list, classes: int, head: str, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            channels_of(torch.tensor(label), classes, head, "ct")
    else:
        assert channels_of(torch.tensor(label), classes, head, "ct").tolist() == expected


def test_pipeline_without_labels_is_told_which_config_to_use(tmp_path: Path) -> None:
    evaluator = SupervisedEvaluator("cpu", [{"image": torch.rand(1, 3, 16, 16)}], nn.Conv2d(3, 2, 1))
    evaluator.logger.setLevel("CRITICAL")
    CommissioningHandler(tmp_path / "site").attach(evaluator)
    with pytest.raises(ValueError, match="use the config that evaluates the network"):
        evaluator.run()
    with pytest.raises(ValueError, match="mode must be new or audit, got 'add'"):
        CommissioningHandler(tmp_path / "site", mode="add")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fallback": "hope"}, "fallback must be one of none, steady"),
        ({"confidence": 2}, "confidence"),
        ({"candidates": ["none + luck"]}, "there is no candidate 'none \\+ luck'"),
        ({"fallbak": "none"}, "unexpected keyword argument 'fallbak'"),
    ],
)
def test_handler_checks_its_settings_before_any_work(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        CommissioningHandler(tmp_path / "site", **settings)
