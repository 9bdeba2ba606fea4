# SPDX-License-Identifier: Apache-2.0
"""The bundle as a MONAI Label server runs it: one config, piece by piece, and no evaluator."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from mgipt_monai import label_app
from mgipt_monai.label_app import write_label_bundle
from mgipt_monai.stream.state_file import read

from .conftest import BUNDLE

QUICK = "spatial_size: [64, 64]\ninstance_prompt#steps: 1\n"


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    return path


@pytest.fixture
def folder(tmp_path: Path, quick: Path) -> Path:
    folder = tmp_path / "app" / "model" / "mgipt_segmentation"
    write_label_bundle(BUNDLE, folder, overlays=[quick])
    return folder


def run_pieces(parser: ConfigParser, network: torch.nn.Module, image: Path) -> dict[str, Any]:
    """Preprocessing, inferer and postprocessing, transform by transform, as a server does."""
    data: dict[str, Any] = {"image": str(image)}
    for transform in parser.get_parsed_content("preprocessing").transforms:
        data = transform(data)
    with torch.no_grad():
        data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network)[0]
    for transform in parser.get_parsed_content("postprocessing").transforms:
        data = transform(data)
    return data


class Server:
    """The steps of MONAI Label's bundle task."""

    def __init__(self, folder: Path) -> None:
        self.parser = ConfigParser()
        self.parser.read_config(folder / "configs" / "inference.yaml")
        self.parser.config["bundle_root"] = str(folder)
        (weights,) = (folder / "models").glob("*.pt")
        self.network = copy.deepcopy(self.parser.get_parsed_content("network_def"))
        self.network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
        self.network.eval()
        self.shown = self.parser.get_parsed_content("displayable_configs")

    def infer(self, image: Path, **params: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """What the writer is given: the array, and the JSON answer."""
        self.parser["displayable_configs"].update({**self.shown, **params})
        self.parser.parse()  # all objects are made anew
        data = run_pieces(self.parser, self.network, image)
        return data["pred"].numpy(), data["result"]


def mask_of_a_run(image: Path, folder: Path, quick: Path) -> np.ndarray:
    """The mask of the stream's first image that the bundle itself writes."""
    configs = ConfigParser.load_config_files([str(BUNDLE / "configs" / "inference.yaml"), str(quick)])
    parser = ConfigParser(configs | {"output_dir": str(folder), "bundle_root": str(BUNDLE)})
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True))
    run_pieces(parser, network.eval(), image)
    (written,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return nibabel.load(written).get_fdata() if written.name.endswith(".nii.gz") else np.asarray(Image.open(written))


def test_png_gives_the_mask_of_a_run_columns_first_and_the_stream_goes_on(
    folder: Path, quick: Path, demo_sites: Path, tmp_path: Path
) -> None:
    photograph = Image.open(demo_sites / "cold_noisy" / "images" / "eye_000.png")
    image = tmp_path / "eye.png"
    photograph.resize((50, 70)).save(image)
    drawn, answer = Server(folder).infer(image)
    assert (drawn.shape, drawn.dtype) == ((50, 70), np.uint8)
    assert np.array_equal(drawn.T, mask_of_a_run(image, tmp_path / "run", quick))
    assert set(np.unique(drawn)) == {0, 1, 2}
    assert json.loads(json.dumps(answer)) == answer
    assert answer["adaptation"]["position"] == 1
    server = Server(folder)  # started again
    assert server.infer(image)[1]["adaptation"]["position"] == 2
    saved = (folder / "adaptation" / "stream.pt").read_bytes()
    assert server.infer(image, adapt=False)[1]["adaptation"]["position"] == 2
    with pytest.raises(ValueError, match=r"lr was 0\.05, is 0\.01"):
        server.infer(image, lr=0.01)
    assert (folder / "adaptation" / "stream.pt").read_bytes() == saved
    assert server.infer(image, lr=0.01, reset=True)[1]["adaptation"]["position"] == 1
    assert server.infer(image, lr=0.01)[1]["adaptation"]["position"] == 2
    settings = read(folder / "adaptation" / "stream.pt")["settings"]
    assert settings["instance_prompt"]["lr"] == settings["global_prompts"]["lr"] == 0.01


def test_nifti_of_one_slice_gives_a_label_with_all_axes_of_the_file(
    folder: Path, quick: Path, demo_sites: Path, tmp_path: Path
) -> None:
    photograph = Image.open(demo_sites / "cold_noisy" / "images" / "eye_000.png").resize((50, 70))
    image = tmp_path / "eye.nii.gz"
    nibabel.save(
        nibabel.Nifti1Image(np.asarray(photograph, np.float32)[:, :, None], np.diag([2.0, 1.0, 3.0, 1.0])), image
    )
    drawn, _ = Server(folder).infer(image)
    assert (drawn.shape, drawn.dtype) == ((70, 50, 1), np.uint8)
    assert np.array_equal(drawn, mask_of_a_run(image, tmp_path / "run", quick))


def test_models_has_one_file_and_classes_are_numbered_as_drawn(folder: Path) -> None:
    assert [path.name for path in (folder / "models").iterdir()] == ["model.pt"]
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert channels == {"0": "background", "1": "disc", "2": "cup"}


def test_written_again_it_keeps_the_stream(folder: Path, demo_sites: Path, quick: Path) -> None:
    image = demo_sites / "cold_noisy" / "images" / "eye_000.png"
    Server(folder).infer(image)
    write_label_bundle(BUNDLE, folder, overlays=[quick])
    assert Server(folder).infer(image)[1]["adaptation"]["position"] == 2


def test_weights_that_do_not_fit_and_files_that_label_might_take_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (folder / "models" / "model.pt").read_bytes()
    torch.save({"other": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(SystemExit):
        label_app.main(["--bundle", str(BUNDLE), "--app", str(tmp_path / "app"), "--ckpt_path", str(tmp_path / "w.pt")])
    assert "w.pt does not fit the network UNet" in capsys.readouterr().err
    assert (folder / "models" / "model.pt").read_bytes() == before
    shutil.copy(tmp_path / "w.pt", folder / "models" / "w.pt")
    with pytest.raises(ValueError, match=r"holds w\.pt, which MONAI Label might load: leave only model\.pt there"):
        write_label_bundle(BUNDLE, folder)
