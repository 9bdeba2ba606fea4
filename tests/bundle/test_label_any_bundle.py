# SPDX-License-Identifier: Apache-2.0
"""Bundles of the model zoo's layout in a MONAI Label app: their own JSON config, adapted, and left as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from mgipt_monai import RecordFile, label_app
from mgipt_monai.label_app import write_label_bundle

from .conftest import run_bundle
from .test_existing_bundles import ADAPT, CASES, MEASURE, make_bundle, read_masks
from .test_label_bundle import Server

CHANNELS = {"0": "background", "1": "organ"}


def make_zoo_bundle(root: Path, name: str, **changes: Any) -> Path:
    """A bundle with the zoo's files: its config as JSON, with changes, and metadata."""
    make_bundle(root, name)
    written = root / "configs" / "inference.yaml"
    config = ConfigParser.load_config_file(written) | changes
    written.unlink()
    (root / "configs" / "inference.json").write_text(json.dumps(config, indent=4))
    sides, channels = (
        ((64, 64), 3) if name == "endoscopy_like" else ((16, 16, 16), config["network_def"].get("in_channels", 1))
    )
    data = {"type": "image", "num_channels": channels, "spatial_shape": sides}
    metadata = {
        "version": "0.5.1",
        "network_data_format": {
            "inputs": {"image": data},
            "outputs": {"pred": {**data, "channel_def": CHANNELS}},
        },
    }
    (root / "configs" / "metadata.json").write_text(json.dumps(metadata))
    return root


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def images_of(root: Path, name: str) -> list[Path | list[str]]:
    """The images as a server has them: one file each, or one per sequence."""
    if name == "brats_like":
        return [sorted(map(str, case.glob("*.nii.gz"))) for case in sorted((root / "data").iterdir())]
    return sorted((root / "data").iterdir())


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    path = tmp_path / "quick.yaml"
    path.write_text("instance_prompt#steps: 1\n")
    return path


@pytest.mark.parametrize("name", CASES)
def test_server_gives_the_masks_of_a_run_with_the_overlay(
    name: str, tmp_path: Path, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, root = CASES[name], make_zoo_bundle(tmp_path / f"{name}_segmentation", name)
    config, run = root / "configs" / "inference.json", {"run_id": case.run_id, "bundle_root": root}
    app, command = tmp_path / "app", ["--bundle", str(root), "--overlays", str(quick), "--head", case.head]
    settings: dict[str, Any] = {"adaptation_head": case.head, "adaptation#steps": 1}
    if not case.has_batch_norm:
        statistics = settings["statistics_path"] = root / "adaptation" / "source_statistics.pt"
        run_bundle([config, MEASURE], dataset_dir=root / "source", **run)
        command += ["--statistics", str(statistics)]
    run_bundle([config, ADAPT], output_dir=root / "after", **run, **settings)
    before = content(root)
    label_app.main([*command, "--app", str(app)])
    assert content(root) == before

    folder = app / "model" / f"{name}_segmentation"
    monkeypatch.syspath_prepend(folder)  # as the server does
    served, answers = [], []
    for image in images_of(root, name):
        mask, answer = Server(folder).infer(image)  # started again for each image
        served.append(mask)
        answers.append(answer["adaptation"])
    assert [answer["position"] for answer in answers] == [1, 2]
    assert not (folder / "eval").exists()
    written = read_masks(root / "after").values()
    for mask, expected in zip(served, written, strict=True):
        drawn = mask[0].T * 255 if name == "endoscopy_like" else mask[0]
        assert np.array_equal(drawn, expected)
        assert len(np.unique(mask)) > 1
    records = RecordFile(root / "adaptation" / "records.jsonl").read()
    assert [row["loss_after"] for row in records] == [answer["loss_after"] for answer in answers]


def test_slices_presets_methods_and_requests(tmp_path: Path, quick: Path) -> None:
    name = "spleen_like"
    network = ConfigParser.load_config_file(Path(__file__).parent / "zoo" / f"{name}.yaml")["network_def"]
    inferer = {"_target_": "SliceInferer", "roi_size": [16, 16], "spatial_dim": 2, "sw_batch_size": 4}
    root = make_zoo_bundle(
        tmp_path / "slices", name, inferer=inferer, network_def={**network, "spatial_dims": 2},
        displayable_configs={"overlap": 0.5},
    )  # fmt: skip
    parser = ConfigParser(ConfigParser.load_config_file(root / "configs" / "inference.json"))
    torch.save({"model": parser.get_parsed_content("network_def").state_dict()}, root / "models" / "model.pt")
    first, second = images_of(root, name)
    for preset, method in (("paper", "MGIPT"), ("steady", "SiteCorrection"), ("fast", "MGIPT")):
        app = tmp_path / preset
        label_app.main(
            ["--bundle", str(root), "--app", str(app), "--preset", preset, "--name", "a", "--overlays", str(quick)]
        )
        server = Server(app / "model" / "a")
        assert server.parser.get_parsed_content("method").name == method
        assert server.shown["overlap"] == 0.5
        mask, _ = server.infer(first)
        assert server.infer(second)[1]["adaptation"]["position"] == 2
        saved = (app / "model" / "a" / "adaptation" / "stream.pt").read_bytes()
        assert np.array_equal(server.infer(first, adapt=False, reset=True)[0], mask)
        assert (app / "model" / "a" / "adaptation" / "stream.pt").read_bytes() == saved


def test_files_that_the_config_names_and_the_licence_go_with_it(tmp_path: Path) -> None:
    root = make_zoo_bundle(
        tmp_path / "b", "spleen_like", searched="$torch.load(@bundle_root + '/models/searched.pt', weights_only=True)"
    )
    torch.save({"code": torch.ones(2)}, root / "models" / "searched.pt")
    (root / "LICENSE").write_text("free")
    write_label_bundle(root, tmp_path / "app")
    assert [path.name for path in (tmp_path / "app" / "models").iterdir()] == ["model.pt"]
    parser = Server(tmp_path / "app").parser
    assert torch.equal(parser.get_parsed_content("searched")["code"], torch.ones(2))
    assert (tmp_path / "app" / "LICENSE").read_text() == "free"
    metadata = json.loads((tmp_path / "app" / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == CHANNELS


def test_nothing_that_another_wrote_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_zoo_bundle(tmp_path / "app" / "model" / "spleen_ct_segmentation", "spleen_like")
    before = content(root)
    with pytest.raises(SystemExit):
        label_app.main(["--bundle", str(root), "--app", str(tmp_path / "app")])
    assert "has files that this command did not write: give another --name" in capsys.readouterr().err
    assert content(root) == before


def test_folder_with_files_of_another_is_refused_and_a_states_is_not(tmp_path: Path) -> None:
    root, app = make_zoo_bundle(tmp_path / "b", "spleen_like"), tmp_path / "app"
    (app / "scripts").mkdir(parents=True)
    (app / "scripts" / "mine.py").write_text("mine")
    with pytest.raises(FileExistsError, match="files that this command did not write"):
        write_label_bundle(root, app)
    assert content(app) == {app / "scripts" / "mine.py": b"mine"}
    (app / "scripts").rename(app / "adaptation")
    write_label_bundle(root, app)
    write_label_bundle(root, app)  # again, over its own
    assert (app / "adaptation" / "mine.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"inferer": {"_target_": "SaliencyInferer", "cam_name": "CAM", "target_layers": "0"}},
            "not through a Saliency",
        ),
        ({"network_def": {"_target_": "DynUNet"}}, "network_def: "),
        ({"head": "mine", "guard": True}, "has guard, head, which adaptation needs for itself: rename it"),
    ],
)
def test_what_a_server_could_not_run_is_refused_before_it_starts(tmp_path: Path, changes: dict, message: str) -> None:
    root = make_zoo_bundle(tmp_path / "b", "spleen_like", **changes)
    with pytest.raises(ValueError, match=message):
        write_label_bundle(root, tmp_path / "app")
    assert not (tmp_path / "app").exists()


def declare(root: Path, **data: Any) -> None:
    """Change what a bundle's metadata say of the network's inputs and outputs."""
    path = root / "configs" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["network_data_format"] |= data
    path.write_text(json.dumps(metadata))


# as the zoo's bundles have them: classification, detection, landmarks, registration, generation, HoVerNet
OTHER_TASKS = {
    "classifies images (format classes": {"pred": {"type": "probabilities", "format": "classes"}},
    "classifies images (format labels": {"pred": {"type": "image", "format": "labels", "spatial_shape": [1, 4]}},
    "detects objects (format dict": {"pred": {"type": "object", "format": "dict"}},
    "finds points (format points": {"pred": {"type": "tuples", "format": "points", "spatial_shape": [2, 10]}},
    "makes images (format magnitude": {"pred": {"type": "image", "format": "magnitude"}},
    "b returns nuclei, type: adaptation gives one map": {
        "nuclei": {"type": "probability", "format": "segmentation"},
        "type": {"type": "probability", "format": "classification"},
    },
}


@pytest.mark.parametrize("said", OTHER_TASKS)
def test_bundle_of_another_task_is_refused_by_its_metadata(said: str, tmp_path: Path) -> None:
    root = make_zoo_bundle(tmp_path / "b", "spleen_like")
    declare(root, outputs=OTHER_TASKS[said])
    with pytest.raises(ValueError, match=re.escape(said)):
        write_label_bundle(root, tmp_path / "app")
    assert not (tmp_path / "app").exists()


def test_network_that_takes_more_than_an_image_is_refused(tmp_path: Path) -> None:
    root = make_zoo_bundle(tmp_path / "b", "spleen_like")
    declare(root, inputs={"latent": {"type": "noise"}, "condition": {"type": "timesteps"}})
    with pytest.raises(ValueError, match="b takes latent, condition: adaptation passes only an image"):
        write_label_bundle(root, tmp_path / "app")


def test_map_of_labels_is_a_segmentation(tmp_path: Path) -> None:
    root = make_zoo_bundle(tmp_path / "b", "spleen_like")
    declare(root, outputs={"pred": {"type": "image", "format": "labels", "spatial_shape": ["8*n"] * 3}})
    write_label_bundle(root, tmp_path / "app")


def test_clicks_are_refused_until_the_channels_of_the_image_are_named(tmp_path: Path, quick: Path) -> None:
    network = ConfigParser.load_config_file(Path(__file__).parent / "zoo" / "spleen_like.yaml")["network_def"]
    root = make_zoo_bundle(tmp_path / "b", "spleen_like", network_def={**network, "in_channels": 3})
    config = root / "configs" / "inference.json"
    parser = ConfigParser(ConfigParser.load_config_file(config))
    torch.save(parser.get_parsed_content("network_def").state_dict(), root / "models" / "model.pt")

    # by the names of the channels
    named = {"type": "image", "num_channels": 3, "channel_def": {"0": "CT", "1": "+ve Signal", "2": "-ve Signal"}}
    declare(root, inputs={"image": named})
    with pytest.raises(ValueError, match=r"guidance .*\+ve Signal.*instance_prompt#channels: \[0\] and global"):
        write_label_bundle(root, tmp_path / "app")

    # by the transforms, where the names do not tell
    declare(root, inputs={"image": {"type": "image", "num_channels": 3, "channel_def": {"0": "image"}}})
    changed = json.loads(config.read_text())
    guidance = {"_target_": "AddGuidanceSignalDeepEditd", "keys": "image", "guidance": "guidance"}
    guided = {**changed["preprocessing"], "transforms": [*changed["preprocessing"]["transforms"], guidance]}
    config.write_text(json.dumps({**changed, "preprocessing": guided}))
    with pytest.raises(ValueError, match=r"AddGuidanceSignalDeepEditd.*global_prompts#channels: \[0\]"):
        write_label_bundle(root, tmp_path / "app")

    allowed = tmp_path / "allowed.yaml"
    allowed.write_text("instance_prompt#channels: [0]\nglobal_prompts#channels: [0]\n")
    write_label_bundle(root, tmp_path / "app", [quick, allowed])
    config = ConfigParser.load_config_file(tmp_path / "app" / "configs" / "inference.yaml")
    assert [config[prompt]["channels"] for prompt in ("instance_prompt", "global_prompts")] == [[0], [0]]


def test_networks_without_batch_norm_need_statistics(tmp_path: Path) -> None:
    root = make_zoo_bundle(tmp_path / "b", "brats_like")
    with pytest.raises(ValueError, match=r"GroupNorm.*existing_source_statistics\.yaml"):
        write_label_bundle(root, tmp_path / "app", head="sigmoid")
    with pytest.raises(FileNotFoundError, match=r"there are no source statistics at absent\.pt"):
        write_label_bundle(root, tmp_path / "app", statistics="absent.pt")
    (root / "configs" / "inference.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no inference\.json or inference\.yaml"):
        write_label_bundle(root, tmp_path / "app")
