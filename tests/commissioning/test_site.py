# SPDX-License-Identifier: Apache-2.0
"""A site's folder: commissioned by command, deployed with any config, added to, audited, and never written over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import validate
from monai.bundle import ConfigParser
from PIL import Image

from mgipt_monai import RecordFile
from mgipt_monai.cli import main
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_site
from mgipt_monai.methods import Commissioned, SiteSetting
from mgipt_monai.utils.files import load_state, save_state
from tests.bundle.conftest import CONFIGS, ROOT, run_bundle

COMMISSION = [CONFIGS / f"{name}.yaml" for name in ("inference", "evaluate", "commission")]
LOOSE = {"candidates": "none + offset, steady + offset", "max_harm": "1.0", "spatial_size": "[64,64]"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photographs of a camera that the network has never seen, whose annotators draw wider."""
    folder = tmp_path_factory.mktemp("photographs")
    write_demo_site(folder, CAMERAS["low_contrast"], 12, seed=0, size=64)
    for path in (folder / "low_contrast" / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        wide = np.max([np.roll(mask, (y, x), (0, 1)) for y in range(-4, 5, 2) for x in range(-4, 5, 2)], axis=0)
        Image.fromarray(wide).save(path)
    return folder


def part_of(photographs: Path, folder: Path, numbers: range) -> Path:
    for kind in ("images", "masks"):
        (folder / "low_contrast" / kind).mkdir(parents=True)
        for number in numbers:
            name = f"low_contrast/{kind}/eye_{number:03d}.png"
            shutil.copy(photographs / name, folder / name)
    return folder


def mgipt(*words: Any, **settings: str) -> int:
    return main([*map(str, words), *(part for key, value in settings.items() for part in (f"--{key}", value))])


@pytest.fixture(scope="module")
def site(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commissioned")
    labelled = part_of(photographs, folder / "labelled", range(6))
    assert mgipt("commission", labelled, "--output_dir", folder / "site", **LOOSE) == 0
    return folder / "site"


def report_of(site: Path) -> dict[str, Any]:
    return json.loads((site / "commissioning.json").read_text())


def test_folder_has_what_deploys_the_site_and_what_it_rests_on(site: Path, photographs: Path) -> None:
    report = report_of(site)
    validate(report, json.loads((ROOT / "docs" / "reference" / "commissioning.schema.json").read_text()))
    assert report["certified"]
    assert report["chosen"] in ("none + offset", "steady + offset")
    assert [case["name"] for case in report["cases"]] == [f"low_contrast/eye_{n:03d}" for n in range(6)]
    assert {path.name for path in site.iterdir() if path.name[0] != "."} == {
        "site.pt",
        "site.yaml",
        "site_existing.yaml",
        "commissioning.json",
        "commissioning.html",
    }
    assert report["statement"] in (site / "commissioning.html").read_text().replace("&#39;", "'")
    assert report["statement"][:40] in (site / "site.yaml").read_text()


def test_site_is_deployed_over_any_config_and_gains(site: Path, photographs: Path, tmp_path: Path) -> None:
    new = part_of(photographs, tmp_path / "new", range(6, 12))
    means = {}
    for name, overlays in {"site": [site / "site.yaml"], "source": ["methods/source"]}.items():
        assert mgipt("evaluate", new, tmp_path / name, "--config", *overlays, spatial_size="[64,64]") == 0
        rows = RecordFile(tmp_path / name / "records.jsonl").read()
        means[name] = np.mean([np.mean(list(row["metrics"]["dsc"].values())) for row in rows])
    assert means["site"] > means["source"] + 0.02
    rows = RecordFile(tmp_path / "site" / "records.jsonl").read()
    assert all(row["corrected"] == ["offset"] for row in rows)
    assert all(row["monitor"]["alarm"] is False for row in rows)


def test_deployed_masks_are_those_of_the_method_in_python(site: Path, photographs: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(photographs / "low_contrast" / "images", images)
    run_bundle(
        [CONFIGS / "inference.yaml", site / "site.yaml"],
        dataset_dir=images,
        output_dir=tmp_path / "masks",
        spatial_size="[64,64]",
    )
    parser = ConfigParser(ConfigParser.load_config_files([str(CONFIGS / "inference.yaml"), str(site / "site.yaml")]))
    parser.update({"bundle_root": str(CONFIGS.parent), "dataset_dir": str(images), "spatial_size": [64, 64]})
    parser.update({"output_dir": str(tmp_path / "other")})
    method = parser.get_parsed_content("method")
    assert isinstance(method, Commissioned)
    parser.get_parsed_content("network").load_state_dict(torch.load(CONFIGS.parent / "models" / "model.pt"))
    for item in parser.get_parsed_content("dataset"):
        masks = (method(item["image"][None])[0] > 0).numpy()
        drawn = np.where(masks[1], 2, np.where(masks[0], 1, 0))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "masks" / f"{item['name']}.png")), drawn.T.T)


def test_overlay_takes_no_other_setting(site: Path, photographs: Path, tmp_path: Path, capsys: Any) -> None:
    # as a run leaves it that was killed between the two files
    other = shutil.copytree(site, tmp_path / "site")
    content = load_state(other / "site.pt", "setting")
    content["correction"]["offset"] += 1
    save_state(content, other / "site.pt", sealed=True)
    (other / "site.yaml").write_text((other / "site.yaml").read_text().replace(str(site), str(other)))
    images = photographs / "low_contrast" / "images"
    with pytest.raises(SystemExit):
        mgipt("predict", images, tmp_path / "masks", "--config", other / "site.yaml", spatial_size="[64,64]")
    assert "its overlay was written for" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "masks").glob("*.png"))


def test_interrupted_stream_of_a_site_goes_on_alike(site: Path, photographs: Path, tmp_path: Path) -> None:
    images, overlay = photographs / "low_contrast" / "images", site / "site.yaml"
    for limit in ("3", "12"):
        words = ("predict", images, tmp_path / "two", "--config", overlay)
        assert mgipt(*words, spatial_size="[64,64]", limit=limit, resume=str(limit == "12")) == 0
    assert mgipt("predict", images, tmp_path / "one", "--config", overlay, spatial_size="[64,64]") == 0
    for path in (tmp_path / "one").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_more_images_are_added_and_new_ones_audit(site: Path, photographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    labelled = part_of(photographs, tmp_path / "labelled", range(5))
    assert mgipt("commission", labelled, folder, **LOOSE) == 0
    more = part_of(photographs, tmp_path / "more", range(5, 7))
    assert mgipt("commission", more, folder, add="True", **LOOSE) == 0
    report = report_of(folder)
    assert len(report["cases"]) == 7
    assert report["certified"]
    new = part_of(photographs, tmp_path / "new", range(7, 12))
    before = SiteSetting.load(folder / "site.pt")
    assert mgipt("commission", new, folder, audit="True", **LOOSE) == 0
    (audit,) = report_of(folder)["audits"]
    assert audit["gain"] > 0
    assert len(audit["cases"]) == 5
    assert SiteSetting.load(folder / "site.pt").correction.digest == before.correction.digest
    with pytest.raises(SystemExit):
        mgipt("commission", more, folder, audit="True", **LOOSE)


def test_hidden_names_are_in_no_file(photographs: Path, tmp_path: Path) -> None:
    labelled = part_of(photographs, tmp_path / "labelled", range(5))
    folder = tmp_path / "site"
    assert mgipt("commission", labelled, folder, identifiers="hashed", **LOOSE) == 0
    for path in folder.iterdir():
        assert b"eye_00" not in path.read_bytes(), path.name
        assert str(labelled).encode() not in path.read_bytes(), path.name
    with pytest.raises(SystemExit):
        mgipt("commission", labelled, folder, add="True", identifiers="hashed", **LOOSE)


def test_what_nobody_commissioned_is_never_written_over(photographs: Path, tmp_path: Path, capsys: Any) -> None:
    labelled = part_of(photographs, tmp_path / "labelled", range(5))
    (tmp_path / "site").mkdir()
    mine = tmp_path / "site" / "site.yaml"
    mine.write_text("mine")
    with pytest.raises(SystemExit):
        mgipt("commission", labelled, tmp_path / "site", **LOOSE)
    assert "was not written by a run" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    with pytest.raises(SystemExit):
        mgipt("commission", labelled, labelled, **LOOSE)
    assert "the output folder" in capsys.readouterr().err


def test_nothing_proven_leaves_no_setting_behind(photographs: Path, tmp_path: Path) -> None:
    labelled, folder = part_of(photographs, tmp_path / "labelled", range(6)), tmp_path / "site"
    assert mgipt("commission", labelled, folder, **LOOSE) == 0
    assert (folder / "site.pt").is_file()
    assert mgipt("commission", labelled, folder, **{**LOOSE, "confidence": "0.999999"}) == 0
    assert not (folder / "site.pt").exists()
    assert "mgipt_monai.Source" in (folder / "site.yaml").read_text()
    assert mgipt("predict", labelled, tmp_path / "masks", "--config", folder / "site.yaml", limit="1") == 0


def test_bundle_run_does_the_same(site: Path, photographs: Path, tmp_path: Path) -> None:
    labelled = part_of(photographs, tmp_path / "labelled", range(6))
    run_bundle(
        COMMISSION,
        dataset_dir=labelled,
        output_dir=tmp_path / "site",
        **{**LOOSE, "candidates": "['none + offset','steady + offset']"},
    )
    keep = ("statement", "candidates", "cases", "chosen")
    one, other = report_of(site), report_of(tmp_path / "site")
    assert {key: one[key] for key in keep} == {key: other[key] for key in keep}


def test_groups_of_a_datalist_are_honoured(photographs: Path, tmp_path: Path) -> None:
    folder = photographs / "low_contrast"
    lines = ["image,label,group"]
    lines += [f"{folder}/images/eye_{n:03d}.png,{folder}/masks/eye_{n:03d}.png,patient {n // 2}" for n in range(10)]
    (tmp_path / "labelled.csv").write_text("\n".join(lines) + "\n")
    assert mgipt("commission", tmp_path / "labelled.csv", tmp_path / "site", **LOOSE) == 0
    assert {case["group"] for case in report_of(tmp_path / "site")["cases"]} == {f"patient {n}" for n in range(5)}


def test_too_few_and_unreadable_images_are_said_last(photographs: Path, tmp_path: Path, capsys: Any) -> None:
    labelled = part_of(photographs, tmp_path / "labelled", range(4))
    with pytest.raises(SystemExit):
        mgipt("commission", labelled, tmp_path / "site", **LOOSE)
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: 4 labelled images can certify nothing")
    (labelled / "low_contrast" / "images" / "eye_001.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        mgipt("commission", labelled, tmp_path / "site", **LOOSE)
    assert "eye_001.png" in capsys.readouterr().err.strip().splitlines()[-1]
