# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from mgipt_monai.data import find_stream


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(items: list[dict]) -> list[str]:
    return [item["name"] for item in items]


def test_flat_folder_keeps_names_and_takes_every_known_ending(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.JPG", "c.tif", "d.bmp", "e.nii.gz", "f.nii", "notes.txt", ".hidden.txt")
    items = find_stream(tmp_path)
    assert names(items) == ["a", "b", "c", "d", "e", "f"]
    assert {item["site"] for item in items} == {tmp_path.name}
    assert "label" not in items[0]


def test_images_folder_with_masks_beside_it(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/b.png", "masks/a.png")
    items = find_stream(tmp_path, labelled=True)
    assert names(items) == ["a", "b"]
    assert items[0]["site"] == tmp_path.name
    assert items[0]["label"] == str(tmp_path / "masks" / "a.png")
    assert items[1]["label"] == str(tmp_path / "masks" / "b.png")  # missing: reported when it is loaded


def test_site_folders_come_in_alphabetical_or_the_wanted_order(tmp_path: Path) -> None:
    touch(tmp_path, "north/images/a.png", "east/images/a.png", "east/images/b.png", "west/a.png")
    assert names(find_stream(tmp_path)) == ["east/a", "east/b", "north/a", "west/a"]
    items = find_stream(tmp_path, sites=["west", "east"], limit=1)
    assert names(items) == ["west/a", "east/a"]
    assert [item["site"] for item in items] == ["west", "east"]


def test_glob_pattern_and_single_file(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.png", "y/b.png", "y/c.txt")
    assert names(find_stream(f"{tmp_path}/**/*")) == ["a", "b"]
    assert names(find_stream(tmp_path / "x" / "a.png")) == ["a"]


def test_datalist_keeps_its_order_and_sites(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.png")
    entries = [{"image": "b.png", "label": "m.png", "site": "S"}, {"image": "a.png"}]
    (tmp_path / "list.json").write_text(json.dumps({"testing": entries}))
    items = find_stream(tmp_path / "list.json")
    assert names(items) == ["S/b", "a"]
    assert items[0]["image"] == str(tmp_path / "b.png")
    assert items[0]["label"] == str(tmp_path / "m.png")


def test_image_of_several_files_is_named_by_its_first(tmp_path: Path) -> None:
    touch(tmp_path, "a_t1.nii.gz", "a_t2.nii.gz")
    entries = [{"image": ["a_t1.nii.gz", "a_t2.nii.gz"]}]
    (tmp_path / "list.json").write_text(json.dumps({"testing": entries}))
    assert names(find_stream(tmp_path / "list.json", limit=1)) == ["a_t1"]


def test_datalist_without_masks_is_refused_where_masks_are_needed(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "list.json").write_text(json.dumps({"testing": [{"image": "a.png"}]}))
    with pytest.raises(ValueError, match=r"a.png has no label"):
        find_stream(tmp_path / "list.json", labelled=True)


def test_datalist_that_is_no_datalist_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.png"}]}))
    with pytest.raises(ValueError, match="testing"):
        find_stream(tmp_path / "list.json")
    (tmp_path / "list.json").write_text("{")
    with pytest.raises(ValueError, match=r"list.json"):
        find_stream(tmp_path / "list.json")


@pytest.mark.parametrize("source", ["absent", "", "*.png"])
def test_source_without_images_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(FileNotFoundError, match="no image found at"):
        find_stream(f"{tmp_path}/{source}")


def test_absent_site_is_named_with_those_that_exist(tmp_path: Path) -> None:
    touch(tmp_path, "east/a.png")
    with pytest.raises(FileNotFoundError, match=r"site west.*the sites there are east"):
        find_stream(tmp_path, sites=["west"])


def test_two_images_of_one_output_name_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.jpg")
    with pytest.raises(ValueError, match=r"a.jpg and .*a.png would both be written as a"):
        find_stream(tmp_path)
