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
from monai.transforms import SaveImaged
from PIL import Image

from mgipt_monai import RecordFile, cli, label_app
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_site
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


def run_pieces(parser: ConfigParser, network: torch.nn.Module, image: Path | list[str]) -> dict[str, Any]:
    """Preprocessing, inferer and postprocessing, transform by transform, as a server does, which saves nothing."""
    read = str(image) if isinstance(image, Path) else image
    data: dict[str, Any] = {"image": read, "image_path": read}  # the server's writer needs its ending
    for transform in parser.get_parsed_content("preprocessing").transforms:
        data = transform(data)
    with torch.no_grad():
        data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network)[0]
    for transform in parser.get_parsed_content("postprocessing").transforms:
        data = data if isinstance(transform, SaveImaged) else transform(data)
    assert data["image_path"] == read
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

    def infer(self, image: Path | list[str], **params: Any) -> tuple[np.ndarray, dict[str, Any]]:
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
    assert len(answer["quality"]) == 2
    assert all(0 <= value <= 1 for value in answer["quality"])
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


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's studies folder: eight photographs, six of them with a final annotation."""
    folder = tmp_path_factory.mktemp("studies")
    write_demo_site(folder, CAMERAS["low_contrast"], count=8, seed=0, size=64)
    images, masks = (folder / "low_contrast" / kind for kind in ("images", "masks"))
    (images / "labels" / "final").mkdir(parents=True)
    for mask in sorted(masks.iterdir())[:6]:
        shutil.copy(mask, images / "labels" / "final")
    return images


@pytest.fixture(scope="module", params=["steady + offset", "fast + offset", "none + norms"])
def site(request: pytest.FixtureRequest, studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site that was commissioned on them."""
    folder = tmp_path_factory.mktemp("site")
    ask = ["--spatial_size", "[64,64]", "--confidence", "0.5", "--max_harm", "1", "--device", "cpu"]
    assert not cli.main(["commission", str(studies), str(folder), "--candidates", f"['{request.param}']", *ask])
    report = json.loads((folder / "commissioning.json").read_text())
    assert report["certified"]
    assert [case["name"] for case in report["cases"]] == [f"eye_{i:03d}" for i in range(6)]
    return folder


def test_server_runs_the_method_of_a_commissioned_site(site: Path, studies: Path, tmp_path: Path, quick: Path) -> None:
    folder, masks = tmp_path / "app" / "model" / "mgipt_segmentation", tmp_path / "masks"
    overlays = [quick, site / "site.yaml"]
    write_label_bundle(BUNDLE, folder, overlays)
    assert not cli.main(["predict", str(studies), str(masks), "--config", *map(str, overlays), "--device", "cpu"])
    answers = []
    for image in sorted(studies.glob("*.png")):
        drawn, answer = Server(folder).infer(image)  # started again for each image
        assert np.array_equal(drawn.T, np.asarray(Image.open(masks / image.name)))
        answers.append(answer["adaptation"])
    assert [answer["position"] for answer in answers] == list(range(1, 9))
    rows = RecordFile(masks / "records.jsonl").read()
    served = RecordFile(folder / "adaptation" / "records.jsonl").read()
    for key in ("corrected", "monitor"):
        assert [row[key] for row in rows] == [row[key] for row in served] == [answer[key] for answer in answers]
    assert served[0]["corrected"][-1] == "offset"

    server, state = Server(folder), folder / "adaptation" / "stream.pt"
    saved = state.read_bytes()
    image = studies / "eye_000.png"
    first, answer = server.infer(image, adapt=False, reset=True)
    assert np.array_equal(first.T, np.asarray(Image.open(masks / "eye_000.png")))
    assert answer["adaptation"]["monitor"] == rows[0]["monitor"]
    assert server.infer(image, adapt=False)[1]["adaptation"]["position"] == 8
    assert state.read_bytes() == saved
    assert np.array_equal(server.infer(image, reset=True)[0], first)
    assert server.infer(image)[1]["adaptation"]["position"] == 2


def test_app_keeps_its_own_setting_and_another_one_needs_a_reset(site: Path, studies: Path, tmp_path: Path) -> None:
    folder, quick, copied = tmp_path / "mgipt_segmentation", tmp_path / "quick.yaml", tmp_path / "site"
    quick.write_text(QUICK)
    image = studies / "eye_007.png"
    write_label_bundle(BUNDLE, folder, [quick])
    Server(folder).infer(image)
    shutil.copytree(site, copied)
    config = (site / "site.yaml").read_text().replace(str(site), str(copied))
    (copied / "site.yaml").write_text(config)
    write_label_bundle(BUNDLE, folder, [quick, copied / "site.yaml"])
    shutil.rmtree(copied)
    with pytest.raises(ValueError, match=r"was made with other settings: .*or start a new stream"):
        Server(folder).infer(image)
    assert Server(folder).infer(image, reset=True)[1]["adaptation"]["position"] == 1
    assert Server(folder).infer(image)[1]["adaptation"]["position"] == 2


def test_setting_of_other_weights_is_refused_before_the_server_starts(site: Path, tmp_path: Path) -> None:
    weights = torch.load(BUNDLE / "models" / "model.pt", weights_only=True)
    key = next(key for key, value in weights.items() if value.is_floating_point())
    torch.save({**weights, key: weights[key] + 1}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"site\.pt was commissioned with other weights"):
        write_label_bundle(BUNDLE, tmp_path / "app", [site / "site.yaml"], tmp_path / "w.pt")
    assert not (tmp_path / "app").exists()


def test_annotation_of_another_size_than_its_image_is_refused(
    studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copied = shutil.copytree(studies, tmp_path / "studies")
    label = copied / "labels" / "final" / "eye_002.png"
    Image.open(label).resize((48, 32), Image.Resampling.NEAREST).save(label)
    with pytest.raises(SystemExit):
        cli.main(["commission", str(copied), str(tmp_path / "site"), "--candidates", "['none + offset']"])
    assert f"{label} is 48x32, but its image is 64x64: draw the label on the whole image" in capsys.readouterr().err
