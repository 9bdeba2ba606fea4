# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from monai.data import load_decathlon_datalist

from mgipt_monai.data import find_stream, order_stream
from mgipt_monai.data.datalists import main, write_datalist


def csv_file(folder: Path, text: str, name: str = "list.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_text(text, encoding=encoding)
    return folder / name


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """Two sites of two images each, with masks."""
    root = tmp_path / "sites"
    for site in ("east", "west"):
        for kind in ("images", "masks"):
            (root / site / kind).mkdir(parents=True)
            for name in ("a.png", "b.png"):
                (root / site / kind / name).touch()
    return root


def test_csv_has_images_masks_sites_and_names(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "image,label,site,name\nx/b.png,m/b.png,S,one\n/data/a.png,/data/m.png,T,two\n")
    assert find_stream(path, labelled=True) == [
        {"image": str(tmp_path / "x/b.png"), "label": str(tmp_path / "m/b.png"), "site": "S", "name": "one"},
        {"image": "/data/a.png", "label": "/data/m.png", "site": "T", "name": "two"},
    ]


def test_csv_of_images_alone_is_one_site_of_the_files_name(tmp_path: Path) -> None:
    items = find_stream(csv_file(tmp_path, "image\n../b.png\na.nii.gz\n", name="clinic.csv"))
    assert items == [
        {"image": str(tmp_path.parent / "b.png"), "site": "clinic", "name": "b"},
        {"image": str(tmp_path / "a.nii.gz"), "site": "clinic", "name": "a"},
    ]


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    # byte order mark, quotes, spaces after commas, an additional column, empty cells, an empty line
    text = '"image", mask, age, site\r\n"a, b.png", m.png, 61, S\r\n\r\nc.png,,,\r\n'
    items = find_stream(csv_file(tmp_path, text, encoding="utf-8-sig"))
    assert items == [
        {"image": str(tmp_path / "a, b.png"), "label": str(tmp_path / "m.png"), "site": "S", "name": "S/a, b"},
        {"image": str(tmp_path / "c.png"), "site": "list", "name": "c"},
    ]


def test_sites_and_limit_hold_for_csv(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "image,site\na.png,S\nb.png,T\nc.png,T\n")
    assert [item["name"] for item in find_stream(path, sites=["T", "S"], limit=1)] == ["T/b", "S/a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"list.csv is empty: its first line must name the columns"),
        ("img;label\na.png;b.png\n", r"list.csv has no column image: its first line is 'img;label'"),
        ("image,label\n,m.png\n", r"list.csv has no image in line 2"),
        ("site,image\nS\n", r"list.csv has no image in line 2"),
        ("image,label\na.png,m.png\nb.png,\n", r"b.png has no label in .*list.csv"),
        ("image\na.png\n", r"a.png has no label in .*list.csv"),
        ("image,mask,name\na.png,m.png,one\nb.png,m.png,one\n", r"a.png and .*b.png would both be written as one"),
    ],
)
def test_wrong_csv_is_named_with_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_stream(csv_file(tmp_path, text), labelled=True)


def test_csv_or_datalist_that_is_absent_or_has_no_image_is_named(tmp_path: Path) -> None:
    for name in ("absent.csv", "absent.json"):
        with pytest.raises(FileNotFoundError, match=name):
            find_stream(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no image found at .*list.csv"):
        find_stream(csv_file(tmp_path, "image\n"))


def test_datalist_entry_without_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"testing": [{"label": "a.png"}]}))
    with pytest.raises(ValueError, match=r"list.json is not a datalist .* no image"):
        find_stream(tmp_path / "list.json")


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("place", ["sites/list.json", "lists/list.json", "list.json"])
def test_written_datalist_is_read_back_to_the_same_items(
    place: str, labelled: bool, sites: Path, tmp_path: Path
) -> None:
    # also next to the site folders, where the name of a site is also a path in the folder of the list
    for items in (
        find_stream(sites, labelled=labelled),
        order_stream(find_stream(sites, labelled=labelled), "shuffled", rounds=2),
    ):
        write_datalist(items, tmp_path / place)
        assert find_stream(tmp_path / place, labelled=labelled) == items


def test_list_of_another_key_is_read_back_by_it(sites: Path, tmp_path: Path) -> None:
    write_datalist(find_stream(sites), tmp_path / "list.json", key="validation")
    assert find_stream(tmp_path / "list.json", datalist_key="validation") == find_stream(sites)
    with pytest.raises(ValueError, match="testing"):
        find_stream(tmp_path / "list.json")


def test_paths_below_the_datalist_are_relative_and_move_with_it(sites: Path, tmp_path: Path) -> None:
    write_datalist(find_stream(sites, labelled=True), sites / "list.json")
    entries = json.loads((sites / "list.json").read_text())["testing"]
    assert entries[0] == {
        "image": "east/images/a.png",
        "label": "east/masks/a.png",
        "site": "east",
        "name": "east/a",
    }
    moved = sites.rename(tmp_path / "moved")
    assert find_stream(moved / "list.json", labelled=True) == find_stream(moved, labelled=True)


def test_paths_elsewhere_are_absolute_whatever_they_were(sites: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_datalist(find_stream("sites"), "lists/list.json")
    assert find_stream(tmp_path / "lists" / "list.json") == find_stream(sites)


def test_image_of_several_files_is_written_and_read_back(tmp_path: Path) -> None:
    files = [str(tmp_path / "a_t1.nii"), os.path.abspath(os.sep + "far/a_t2.nii")]
    items = [{"image": files, "site": "", "name": "a"}]
    write_datalist(items, tmp_path / "list.json")
    assert json.loads((tmp_path / "list.json").read_text())["testing"][0]["image"] == ["a_t1.nii", files[1]]
    assert find_stream(tmp_path / "list.json") == items


def test_monai_reads_the_datalist(sites: Path, tmp_path: Path) -> None:
    items = order_stream(find_stream(sites, labelled=True), rounds=2)
    write_datalist(items, tmp_path / "list.json")
    assert load_decathlon_datalist(tmp_path / "list.json", data_list_key="testing") == items


def test_datalist_of_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .json, got .*list.txt"):
        write_datalist([], tmp_path / "list.txt")


def test_command_writes_what_the_functions_give(sites: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.json"
    main([str(sites), str(out)])
    assert find_stream(out) == order_stream(find_stream(sites))
    limits = ["--sites", "west,east", "--limit", "1", "--labelled"]
    main([str(sites), str(out), *limits, "--order", "shuffled", "--rounds", "3", "--seed", "5"])
    items = find_stream(sites, sites=["west", "east"], labelled=True, limit=1)
    assert find_stream(out, labelled=True) == order_stream(items, "shuffled", rounds=3, seed=5)
    assert f"east: 3 images in {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sites", "north"], "no image of site north"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--order", "random"], "invalid choice: 'random'"),
    ],
)
def test_command_says_what_is_wrong(
    options: list[str], message: str, sites: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main([str(sites), str(tmp_path / "out.json"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "a.png", "name": 5}, "entry 2 has name 5: write it as a text"),
        ({"image": "a.png", "name": None}, "entry 2 has name null: write it as a text"),
        ({"image": "a.png", "name": ["a"]}, 'entry 2 has name ["a"]: write it as a text'),
        ({"image": "a.png", "site": None}, "entry 2 has site null: write it as a text, or leave it out"),
        ({"image": "a.png", "site": {"x": 1}}, 'entry 2 has site {"x": 1}: write it as a text'),
        ({"image": 5}, "entry 2 has image 5: write the path of a file as a text"),
        ({"image": None}, "entry 2 has image null: write the path"),
        ({"image": []}, "entry 2 has image []: write the path"),
        ({"image": ["a.png", 7]}, 'entry 2 has image ["a.png", 7]: write the path'),
        ({"image": "a.png", "label": 1.5}, "entry 2 has label 1.5: write the path"),
        ({"image": "a\0b.png"}, "entry 2 has image"),
        ({"image": "a.png", "round": "2"}, 'entry 2 has round "2": write a whole number from 1'),
        ({"image": "a.png", "round": 0}, "entry 2 has round 0: write a whole number from 1"),
        ({"image": "a.png", "age": None}, "entry 2 has no value for age: leave out what is null"),
        ({"label": "a.png"}, "entry 2 has no image"),
        ([], "entry 2 is []: write"),
        (None, "entry 2 is null: write"),
    ],
    ids=str,
)
def test_entry_of_other_types_is_a_sentence_before_the_run(entry: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"testing": [{"image": "good.png"}, entry]}))
    with pytest.raises(ValueError, match=rf"list.json is not a datalist .*{re.escape(message)}"):
        find_stream(tmp_path / "list.json")


def test_list_that_is_no_list_or_no_table_is_a_sentence(tmp_path: Path) -> None:
    for content in ('{"other": []}', '{"testing": 3}', "[]", "[" * 100_000, '{"testing": {"image": "a.png"}}'):
        (tmp_path / "list.json").write_text(content)
        with pytest.raises(ValueError, match=r"list.json is not a datalist"):
            find_stream(tmp_path / "list.json")
    for table in (b"image\n\xff\xfe.png\n", b"image\n" + b"a" * 200_000 + b"\n"):
        (tmp_path / "list.csv").write_bytes(table)
        with pytest.raises(ValueError, match=r"list.csv is not a CSV table in UTF-8"):
            find_stream(tmp_path / "list.csv")
