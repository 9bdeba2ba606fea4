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


def test_studies_of_monai_label_are_the_images_with_a_final_annotation(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.jpg", "c.nii.gz", "d.png", "masks/a.png", "datastore_v2.json")
    touch(tmp_path, "labels/original/d.png", "labels/final/a.png", "labels/final/b.png", "labels/final/c.nii.gz")
    items = find_stream(tmp_path, labelled=True)
    assert names(items) == ["a", "b", "c"]
    assert [Path(item["label"]) for item in items] == [
        tmp_path / "labels" / "final" / name for name in ("a.png", "b.png", "c.nii.gz")
    ]
    assert names(find_stream(tmp_path)) == ["a", "b", "c", "d"]


def test_studies_may_be_the_images_folder_of_a_site_whose_masks_are_used_where_the_site_is_named(
    tmp_path: Path,
) -> None:
    touch(tmp_path, "s/images/a.png", "s/images/b.png", "s/masks/a.png", "s/images/labels/final/b.png")
    (item,) = find_stream(tmp_path / "s" / "images", labelled=True)
    assert (item["name"], item["site"]) == ("b", "s")
    assert item["label"] == str(tmp_path / "s" / "images" / "labels" / "final" / "b.png")
    for root, name in ((tmp_path, "s/a"), (tmp_path / "s", "a")):
        items = find_stream(root, labelled=True)
        assert len(items) == 2
        assert (items[0]["name"], items[0]["label"]) == (name, str(tmp_path / "s" / "masks" / "a.png"))


def test_studies_of_several_servers_are_sites(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.png", "x/labels/final/a.png", "y/a.png", "y/b.png", "y/labels/final/b.png")
    assert names(find_stream(tmp_path, labelled=True)) == ["x/a", "y/b"]


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (["a.png", "a.nii.gz"], "has the final annotations .*a.nii.gz and .*a.png: keep one"),
        (["a.nrrd"], r"annotation .*a.nrrd of a.png cannot be used: save it as PNG"),
        (["a.nii.gz"], r"annotation .*a.nii.gz of a.png cannot be used: save it as PNG"),
        (["other.png"], "none of the 1 images has a final annotation in"),
    ],
)
def test_final_annotations_that_cannot_be_used_are_named(tmp_path: Path, labels: list[str], error: str) -> None:
    touch(tmp_path, "a.png", *(f"labels/final/{name}" for name in labels))
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        find_stream(tmp_path, labelled=True)
