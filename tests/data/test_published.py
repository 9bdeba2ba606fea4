# SPDX-License-Identifier: Apache-2.0
"""Conversion of published datasets from their owners' folders to sites."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mgipt_monai.data import find_stream
from mgipt_monai.data.published import LAYOUTS, convert
from mgipt_monai.data.published.__main__ import main
from mgipt_monai.data.published.cropping import disc_window

from .published_folders import BUILD, Case, black_and_white, eye, photograph, polyps, save


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_converted(cases: list[Case], out: Path) -> None:
    """Compare an output folder with the expected images and masks, exactly."""
    items = {item["name"]: item for item in find_stream(out, labelled=True)}
    assert set(items) == {f"{case.site}/{case.name}" for case in cases}
    for case in cases:
        item = items[f"{case.site}/{case.name}"]
        assert item["site"] == case.site
        assert np.array_equal(pixels(item["image"]), case.image)
        assert np.array_equal(pixels(item["label"]), case.mask)
    parts: dict[str, list[dict]] = {}
    for case in cases:
        part = f"{case.site}_{case.split}" if case.split else case.site
        parts.setdefault(part, []).append(items[f"{case.site}/{case.name}"])
    assert {path.stem: find_stream(path, labelled=True) for path in out.glob("*.json")} == parts


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_gives_its_sites_images_and_masks(name: str, tmp_path: Path) -> None:
    cases = BUILD[name](tmp_path / "owner")
    counts = convert(LAYOUTS[name], tmp_path / "owner", tmp_path / "out")
    assert counts == {case.site: sum(other.site == case.site for other in cases) for case in cases}
    assert_converted(cases, tmp_path / "out")
    first = files(tmp_path / "out")
    convert(LAYOUTS[name], tmp_path / "owner", tmp_path / "out")
    assert files(tmp_path / "out") == first


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "preprocessed"])
def test_folder_may_lie_deeper_than_told_beside_what_a_mac_leaves(name: str, tmp_path: Path) -> None:
    cases = BUILD[name](tmp_path / "owner" / "unpacked")
    for path in list((tmp_path / "owner").rglob("*.*")):
        path.with_name(f"._{path.name}").write_bytes(b"resource fork")
    convert(LAYOUTS[name], tmp_path / "owner", tmp_path / "out")
    assert_converted(cases, tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "images", "masks"),
    [
        ("etis_larib", "images/12.png", "masks/12.png"),
        ("etis_larib", "ETIS-LaribPolypDB/images/12.png", "ETIS-LaribPolypDB/masks/12.png"),
        ("cvc_clinicdb", "PNG/Original/12.png", "PNG/Ground Truth/12.png"),
    ],
)
def test_polyps_as_others_pass_them_on(layout: str, images: str, masks: str, tmp_path: Path) -> None:
    cases = polyps(tmp_path / "owner", layout, images, masks)
    convert(LAYOUTS[layout], tmp_path / "owner", tmp_path / "out")
    assert_converted(cases, tmp_path / "out")


@pytest.mark.parametrize("folder", ["Semi-automatic-annotations", "manual marking"])
def test_origa_masks_from_matlab_files(folder: str, tmp_path: Path) -> None:
    image = save(tmp_path / "owner" / "images" / "013.jpg", photograph(0))
    (tmp_path / "owner" / folder).mkdir()
    savemat(tmp_path / "owner" / folder / "013.mat", {"mask": eye()})
    save(tmp_path / "owner" / folder / "013.tif", eye())  # a file that must be ignored
    convert(LAYOUTS["origa"], tmp_path / "owner", tmp_path / "out")
    assert_converted([Case("origa", "013", image, eye())], tmp_path / "out")


def test_cup_ends_where_its_disc_ends(tmp_path: Path) -> None:
    BUILD["rim_one_dl"](tmp_path / "owner")
    (cup,) = (tmp_path / "owner").rglob("r1_Im001-1-Cup-T.png")
    save(cup, black_and_white(np.ones_like(eye())))
    convert(LAYOUTS["rim_one_dl"], tmp_path / "owner", tmp_path / "out")
    assert np.array_equal(pixels(tmp_path / "out/rimone_r1/masks/r1_Im001.png"), 2 * (eye(column=0) > 0))


def test_crop_is_centred_on_the_disc_and_the_same_for_image_and_mask(tmp_path: Path) -> None:
    (whole, *_) = BUILD["origa"](tmp_path / "owner")
    # a disc of rows 0 to 16 and columns 16 to 32: the window of 20 is shifted down by two rows, not sideways
    convert(LAYOUTS["origa"], tmp_path / "owner", tmp_path / "out", crop=20)
    for kind, pixels_of in (("images", whole.image), ("masks", whole.mask)):
        assert np.array_equal(pixels(tmp_path / "out/origa" / kind / "001.png"), pixels_of[0:20, 14:34])
    # larger than the image: the largest square in the image
    convert(LAYOUTS["origa"], tmp_path / "owner", tmp_path / "out", crop=800)
    assert np.array_equal(pixels(tmp_path / "out/origa/images/001.png"), whole.image[:, 8:40])


def test_window_holds_the_disc_and_is_centred_unless_at_the_border() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        top, left, height, width = rng.integers(0, 40, 2).tolist() + rng.integers(1, 20, 2).tolist()
        mask = np.zeros((60, 70), dtype=np.uint8)
        mask[top : top + height, left : left + width] = 1
        window = disc_window(mask, 25)
        assert mask[window].shape == (25, 25)
        assert mask[window].sum() == mask.sum()
        for inside, span, length in zip((top, left), window, mask.shape, strict=True):
            extent = height if length == 60 else width
            before, after = inside - span.start, span.stop - inside - extent
            assert abs(before - after) <= 1 or span.start == 0 or span.stop == length


def test_size_makes_squares_and_keeps_the_masks_values(tmp_path: Path) -> None:
    cases = BUILD["refuge"](tmp_path / "owner")
    convert(LAYOUTS["refuge"], tmp_path / "owner", tmp_path / "out", crop=32, size=16)
    for item in find_stream(tmp_path / "out", labelled=True):
        assert pixels(item["image"]).shape == (16, 16, 3)
        assert set(np.unique(pixels(item["label"]))) == {0, 1, 2}
    # half of 32: every second pixel of the mask
    window = cases[0].mask[:, :32]
    assert np.array_equal(pixels(tmp_path / "out/refuge/masks/g0001.png"), window[1::2, 1::2])


def test_site_can_be_named_where_there_is_one(tmp_path: Path) -> None:
    BUILD["drishti_gs"](tmp_path / "owner")
    convert(LAYOUTS["drishti_gs"], tmp_path / "owner", tmp_path / "out", site="madurai")
    assert {item["site"] for item in find_stream(tmp_path / "out")} == {"madurai"}
    assert json.loads((tmp_path / "out/madurai_test.json").read_text())["testing"][0]["name"] == "madurai/drishtiGS_001"
    BUILD["rim_one_dl"](tmp_path / "several")
    with pytest.raises(ValueError, match="site x cannot name the 3 sites rimone_r1, rimone_r2, rimone_r3"):
        convert(LAYOUTS["rim_one_dl"], tmp_path / "several", tmp_path / "out", site="x")


def test_another_count_than_published_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BUILD["refuge"](tmp_path / "owner")
    with caplog.at_level(logging.WARNING):
        convert(LAYOUTS["refuge"], tmp_path / "owner", tmp_path / "out")
    assert [record.getMessage() for record in caplog.records] == [
        f"refuge: 2 images in {tmp_path / 'owner'}, but 400 are published",
        f"refuge_valid_test: 2 images in {tmp_path / 'owner'}, but 800 are published",
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_folder_without_the_data_set_is_told_what_is_expected(name: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError) as caught:
            convert(LAYOUTS[name], folder, tmp_path.parent / "out")
        assert str(folder) in str(caught.value)
        assert f"Layout {name} expects {LAYOUTS[name].expected}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("rim_one_dl", "*r2_Im300-1-Cup-T.png", r"1 images without a mask \(r2_Im300\): add what is missing"),
        ("refuge", "T0001.jpg", r"1 masks without an image \(T0001\)"),
        ("refuge", "[gn]000*.bmp", r"2 images without a mask \(g0001, n0002\): add what is missing"),
        ("origa", "Masks", r"no image or mask below a folder Semi-automatic-annotations or manual marking in "),
        ("drishti_gs", "*_ODsegSoftmap.png", r"no image or mask named \(.+\)_ODsegSoftmap below a folder SoftMap in "),
        ("rim_one_r3", "Stereo Images", "no image or mask below a folder Stereo Images in "),
        ("preprocessed", "*.tif", r"4 listed files are missing, the first is .*V1.tif"),
        ("kvasir_seg", "masks", "no image or mask below a folder masks in "),
    ],
)
def test_what_is_missing_is_named(name: str, gone: str, message: str, tmp_path: Path) -> None:
    BUILD[name](tmp_path / "owner")
    for path in list((tmp_path / "owner").rglob(gone)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{message}.*Layout {name} expects"):
        convert(LAYOUTS[name], tmp_path / "owner", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        (
            "origa",
            "001.png",
            np.full((32, 48), 3, np.uint8),
            r"001.jpg with mask 001.png: .* 0, 1 and 2, got .* with 3",
        ),
        ("origa", "001.png", np.zeros((32, 48), np.uint8), "001.png: the mask has no optic disc"),
        ("origa", "001.png", eye(width=50), r"the mask has \(32, 50\) rows and columns, the image \(32, 48\)"),
        ("rim_one_dl", "r1_Im001-1-Cup-T.png", eye(width=50), r"disc's mask has \(48, 32\) .*, the cup's \(50, 32\)"),
        ("rim_one_r3", "N-1-L.jpg", photograph(0, width=20), "20 x 32 pixels are not two views side by side"),
        ("kvasir_seg", "masks/cj.jpg", eye(), "the mask's highest value is 2, but polyps are 255"),
        ("refuge", "V0001.bmp", b"not an image", r"V0001.jpg with mask V0001.bmp: cannot identify image file"),
    ],
)
def test_file_that_is_not_as_published_is_named(
    name: str, file: str, change: np.ndarray | bytes, message: str, tmp_path: Path
) -> None:
    BUILD[name](tmp_path / "owner")
    (path,) = (tmp_path / "owner").rglob(file)
    path.write_bytes(change) if isinstance(change, bytes) else save(path, change)
    with pytest.raises(ValueError, match=message):
        convert(LAYOUTS[name], tmp_path / "owner", tmp_path / "out")


def test_two_files_of_one_name_are_named(tmp_path: Path) -> None:
    for ending in ("png", "tif"):
        polyps(tmp_path, "cvc_clinicdb", f"{ending}/Original/1.{ending}", f"{ending}/Ground Truth/1.{ending}")
    with pytest.raises(ValueError, match=r"Original/1.png and .*Original/1.tif are both 1: give the folder"):
        convert(LAYOUTS["cvc_clinicdb"], tmp_path, tmp_path.parent / "out")
    BUILD["preprocessed"](tmp_path / "lists")
    (tmp_path / "lists" / "RIM_ONE_r3.csv").write_text((tmp_path / "lists" / "RIM_ONE_r3_test.csv").read_text())
    with pytest.raises(ValueError, match=r"c.png and .*c.png would both be RIM_ONE_r3/c"):
        convert(LAYOUTS["preprocessed"], tmp_path / "lists", tmp_path.parent / "out")


def test_list_without_masks_is_named(tmp_path: Path) -> None:
    (tmp_path / "A_test.csv").write_text("image\na.png\n")
    with pytest.raises(ValueError, match=r"a.png has no mask in .*A_test.csv"):
        convert(LAYOUTS["preprocessed"], tmp_path, tmp_path.parent / "out")


def test_output_folder_with_other_images_or_in_the_data_set_is_refused(tmp_path: Path) -> None:
    BUILD["rim_one_r3"](tmp_path / "r3")
    BUILD["rim_one_dl"](tmp_path / "dl")
    convert(LAYOUTS["rim_one_r3"], tmp_path / "r3", tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out/rimone_r3 has other images \(N-1-L.png\): choose another"):
        convert(LAYOUTS["rim_one_dl"], tmp_path / "dl", tmp_path / "out")
    assert files(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"out lies in the folder .*dl of the images"):
        convert(LAYOUTS["rim_one_dl"], tmp_path / "dl", tmp_path / "dl" / "out")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("origa", {"crop": 0}, "crop must be at least 1 pixel, got 0"),
        ("origa", {"size": -1}, "size must be at least 1 pixel, got -1"),
        ("kvasir_seg", {"crop": 800}, "crop is for optic discs, layout kvasir_seg has none"),
        ("origa", {"crop": 10}, r"001.jpg: a crop of 10 pixels cuts off the disc of 16: use a larger one"),
    ],
)
def test_wrong_arguments_are_named(name: str, options: dict, message: str, tmp_path: Path) -> None:
    BUILD[name](tmp_path / "owner")
    with pytest.raises(ValueError, match=message):
        convert(LAYOUTS[name], tmp_path / "owner", tmp_path / "out", **options)


def test_command_converts_and_prints_a_line_for_each_site(tmp_path: Path) -> None:
    BUILD["rim_one_dl"](tmp_path / "owner")
    command = [sys.executable, "-m", "mgipt_monai.data.published", "rim_one_dl", str(tmp_path / "owner")]
    options = ["--output_dir", str(tmp_path / "out"), "--crop", "24", "--size", "12"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        f"rimone_r{i}: 1 images in {tmp_path / 'out' / f'rimone_r{i}'}" for i in (1, 2, 3)
    ]
    assert "rimone_r2: 1 images" in done.stderr
    assert "but 250 are published" in done.stderr
    convert(LAYOUTS["rim_one_dl"], tmp_path / "owner", tmp_path / "again", crop=24, size=12)
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_command_lists_the_layouts_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}: {layout.expected}\n" in shown for name, layout in LAYOUTS.items())
    with pytest.raises(SystemExit):
        main(["origa", str(tmp_path), "--output_dir", str(tmp_path.parent / "out")])
    assert "Layout origa expects" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["messidor", str(tmp_path), "--output_dir", "out"])
    assert "invalid choice: 'messidor'" in capsys.readouterr().err
