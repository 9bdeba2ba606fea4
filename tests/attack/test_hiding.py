# SPDX-License-Identifier: Apache-2.0
"""With hidden names, nothing that any command writes holds a name, except the masks' own file names."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from PIL import Image

from mgipt_monai import MGIPT, PersistentInferer, RecordFile
from mgipt_monai.label_app import write_label_bundle
from tests.bundle.conftest import BUNDLE, CONFIGS, QUICK, run_bundle
from tests.conftest import stream, tiny_network

INFERENCE, EVALUATE, BENCHMARK = (CONFIGS / f"{name}.yaml" for name in ("inference", "evaluate", "benchmark"))
TELLTALE = ("Ann_Lee", "Bo_Ek", "Cy_Fox", "born_1950", "Jo_Doe")
"""Words in the names of the images and of the folder that they lie in."""


@pytest.fixture
def sites(tmp_path: Path, demo_sites: Path) -> Path:
    """Two sites of photographs named after people, one of which is broken, in a folder named after somebody."""
    source = tmp_path / "Jo_Doe_born_1950"
    for site in ("cold_noisy", "warm_vignetted"):
        for kind in ("images", "masks"):
            (source / site / kind).mkdir(parents=True)
            for name, path in zip(TELLTALE, sorted((demo_sites / site / kind).iterdir()), strict=False):
                shutil.copy(path, source / site / kind / f"{name}_born_1950.png")
    broken = source / "cold_noisy" / "images" / "Bo_Ek_born_1950.png"
    Image.new("RGB", Image.open(broken).size, (9, 9, 9)).save(broken)
    return source


def assert_hidden(folder: Path, masks: bool = False) -> None:
    """No telltale word is in the name or the content of a file, packed or not; masks may be called by them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content += b"".join(archive.read(name) for name in archive.namelist())
        for word in TELLTALE:
            assert word.encode().lower() not in content.lower(), f"{word} is in {path}"
            is_mask = masks and path.suffix == ".png"
            assert is_mask or word.lower() not in str(path.relative_to(folder)).lower(), f"{word} is the name of {path}"


def settings(sites: Path, out: Path, **more: object) -> dict:
    return {"dataset_dir": sites, "output_dir": out, "identifiers": "hashed", **QUICK, **more}


@pytest.mark.parametrize("configs", [[INFERENCE], [INFERENCE, EVALUATE]], ids=["predict", "evaluate"])
def test_predict_and_evaluate_hide_names_in_all_but_the_masks_names(
    tmp_path: Path, sites: Path, configs: list[Path]
) -> None:
    out = tmp_path / "out"
    run_bundle(configs, check=False, **settings(sites, out, rounds=2, save_uncertainty=True))
    assert_hidden(out, masks=True)
    assert len(list(out.rglob("*.png"))) == 20  # the user needs to know whose they are
    rows = RecordFile(out / "records.jsonl").read()
    assert len(rows) == 12
    failed = [row for row in rows if row["status"] == "failed"]
    assert len(failed) == 2
    assert all("constant" in row["reason"] for row in failed)
    # an image has the same pseudonym in each round
    by_round = [{row["name"].split("/")[-1] for row in rows if row["round"] == number} for number in (1, 2)]
    assert by_round[0] == by_round[1]
    assert {row["name"] for row in rows if row["round"] == 2} == {f"round_2/{name}" for name in by_round[0]}
    run_bundle(configs, check=False, **settings(sites, out, rounds=2, save_uncertainty=True, resume=True))
    run_bundle(
        configs, check=False, **settings(sites, out, rounds=2, save_uncertainty=True, resume=True, retry_failed=True)
    )
    assert_hidden(out, masks=True)


def test_benchmark_hides_names_in_records_tables_page_and_pictures(tmp_path: Path, sites: Path) -> None:
    out = tmp_path / "out"
    run_bundle([INFERENCE, EVALUATE, BENCHMARK], **settings(sites, out, compare="[source,mgipt]", rounds=2))
    assert_hidden(out)
    shown = [{row["name"] for row in RecordFile(out / name / "records.jsonl").read()} for name in ("source", "mgipt")]
    assert shown[0] == shown[1]
    pictures = {path.name.split(".")[0] for path in (out / "reference" / "pictures").rglob("*.jpg")}
    assert pictures <= {name.split("/")[-1] for name in shown[0]}
    assert len(pictures) == 5
    assert (out / "report.html").is_file()
    assert (out / "images.csv").is_file()


def test_several_processes_hide_names(tmp_path: Path, sites: Path) -> None:
    done = run_bundle(
        [INFERENCE, "configs/distributed.yaml"],
        check=False,
        launcher=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        **settings(sites, tmp_path / "out"),
    )
    assert "1 of 6 images failed" in done.stdout + done.stderr
    assert_hidden(tmp_path / "out", masks=True)


def _persistent(folder: Path, **more: object) -> PersistentInferer:
    method = MGIPT(tiny_network(), steps=1)
    return PersistentInferer(method, folder / "stream.pt", folder / "records.jsonl", identifiers="hashed", **more)


def test_persistent_stream_hides_names_in_records_and_answers(tmp_path: Path) -> None:
    image = MetaTensor(stream(1)[0], meta={"filename_or_obj": "in/Ann_Lee_born_1950.png"})
    answers = []
    for more in ({}, {"adapt": False}, {"reset": True}):
        inferer = _persistent(tmp_path / "out", **more)
        logits = inferer(image, inferer.method.network)
        answers.append(logits.meta["adaptation"][0]["name"])
        assert inferer.last[0]["name"] == answers[-1]
    assert len(set(answers)) == 1
    assert len(answers[0]) == 16
    assert_hidden(tmp_path / "out")
    assert [row["name"] for row in RecordFile(tmp_path / "out" / "records.jsonl").read()] == answers[:1] * 2
    with pytest.raises(ValueError, match="identifiers must be one of names, hashed; got 'none'"):
        PersistentInferer(inferer.method, tmp_path / "x.pt", identifiers="none")
    assert PersistentInferer(inferer.method, tmp_path / "y.pt", identifiers="hashed").last == []


def test_bundle_for_monai_label_takes_the_setting(tmp_path: Path) -> None:
    overlay = tmp_path / "hashed.yaml"
    overlay.write_text("identifiers: hashed\n")
    write_label_bundle(BUNDLE, tmp_path / "app" / "mgipt_segmentation", [overlay])
    parser = ConfigParser()
    parser.read_config(str(tmp_path / "app" / "mgipt_segmentation" / "configs" / "inference.yaml"))
    parser["bundle_root"] = str(tmp_path / "app" / "mgipt_segmentation")
    inferer = parser.get_parsed_content("inferer")
    assert inferer.identifiers == "hashed"
    image = torch.nn.functional.interpolate(stream(1)[0], size=[64, 64])
    inferer(MetaTensor(image, meta={"filename_or_obj": "Cy_Fox.png"}), inferer.method.network)
    assert_hidden(tmp_path / "app")


def test_existing_bundle_hides_names(tmp_path: Path, sites: Path) -> None:
    network = {
        "_target_": "UNet",
        "spatial_dims": 2,
        "in_channels": 3,
        "out_channels": 3,
        "channels": [4, 8],
        "strides": [2],
        "norm": "batch",
    }
    images = [{"image": str(path)} for path in sorted((sites / "warm_vignetted" / "images").iterdir())]
    load = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "ScaleIntensityd", "keys": "image"},
    ]
    config = {
        "imports": ["$import monai"],
        "bundle_root": ".",
        "network": network,
        "preprocessing": {"_target_": "Compose", "transforms": load},
        "dataset": {"_target_": "Dataset", "data": images, "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "$torch.device('cpu')",
            "val_data_loader": "@dataloader",
            "network": "@network",
        },
        "initialize": [],
        "run": ["$@evaluator.run()"],
    }
    config["imports"].append("$import torch")
    (tmp_path / "bundle" / "configs").mkdir(parents=True)
    path = tmp_path / "bundle" / "configs" / "inference.json"
    path.write_text(json.dumps(config))
    out = tmp_path / "out"
    run_bundle(
        [path, "configs/existing_bundle.yaml"],
        bundle_root=tmp_path / "bundle",
        adaptation_dir=out,
        adaptation_identifiers="hashed",
    )
    assert len(RecordFile(out / "records.jsonl").read()) == 3
    assert_hidden(out)
