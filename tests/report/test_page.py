# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mgipt_monai.report.__main__ import main
from mgipt_monai.report.page import write_report
from tests.report.fabricated import SITES, fabricate

VOID = {"meta", "img", "br", "link", "input", "hr", "path"}
METHODS = {"source": 0.0, "tent": -0.02, "mgipt": 0.01}


class Page(HTMLParser):
    """What a page has, and whether its tags are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def headings(self) -> list[int]:
        return [int(name[1]) for name, _ in self.tags if name in ("h1", "h2", "h3", "h4")]


@pytest.fixture(scope="module")
def full_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fabricate(tmp_path_factory.mktemp("full"), METHODS, failed=(f"{SITES[1]}/eye_001",))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def full(full_folder: Path) -> Page:
    return Page(full_folder / "report.html")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """One round, no baseline, no prompts, no pictures, no times."""
    folder = fabricate(tmp_path_factory.mktemp("bare"), METHODS, rounds=1, baseline=None, prompts=False, pictures=False)
    (folder / "timing.json").unlink()
    return Page(write_report(folder))


def test_page_needs_nothing_from_elsewhere(full: Page) -> None:
    for _, attributes in full.tags:
        for name in ("src", "href", "srcset", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in full.source
    assert "@import" not in full.source


def test_page_names_every_method_site_and_failed_image(full: Page) -> None:
    assert all(name in full.text for name in (*METHODS, *SITES))
    assert f"{SITES[1]}/eye_001 (mgipt): the image has 3 NaN <b>" in full.text
    assert "<&>" not in full.source
    assert "<b>" not in full.source
    assert "Images 8 in 2 rounds, 7 measured" in full.text
    assert "Data /data/eyes <b> Images" in full.text
    assert "Network UNet, 408,485 parameters Weights model.pt, SHA-256 0123" in full.text
    assert all(f"{name} What {name} does." in full.text for name in METHODS)


def test_page_is_accessible(full: Page) -> None:
    assert full.all("html")[0]["lang"] == "en"
    assert full.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(full.headings, full.headings[1:], strict=False))
    assert all(image["alt"] for image in full.all("img"))
    assert any(SITES[1] in image["alt"] for image in full.all("img"))
    assert all(head["scope"] in ("col", "colgroup", "row", "rowgroup") for head in full.all("th"))
    assert len(full.all("caption")) == len(full.all("table")) == 2


def test_tables_have_a_cell_for_every_heading(full: Page) -> None:
    tables = full.source.split("<table>")[1:]
    for table in tables:
        columns = table.split("</thead>")[0].split("<tr>")[2].count("<th ")
        rows = [row for row in table.split("</thead>")[1].split("</table>")[0].split("<tr>")[1:] if "<td" in row]
        assert len(rows) in (len(METHODS), len(METHODS) * len(SITES))
        assert {row.count("<td>") for row in rows} == {columns}


def test_figures_of_the_table_are_those_of_the_results(full: Page, full_folder: Path) -> None:
    mgipt = json.loads((full_folder / "results.json").read_text())["methods"]["mgipt"]
    dsc, against = mgipt["metrics"]["dsc"], mgipt["against_baseline"]["dsc"]
    for value in (dsc["mean"], dsc["classes"]["cup"], dsc["worst_tenth"], dsc["sites"]["A"]["mean"]):
        assert f"<td>{100 * value:.2f}" in full.source
    assert f"<td>{100 * against['gain']:+.2f}".replace("-", "−") in full.source
    assert f"{mgipt['metrics']['hd95']['mean']:.2f}" in full.source
    assert "<td>812</td>" in full.source
    assert "<td>49.0</td>" in full.source


def test_last_method_is_open_and_the_others_are_closed(full: Page) -> None:
    sections = full.all("details")
    assert [("open" in section) for section in sections] == [False, False, True]  # settings, tent, mgipt
    assert full.text.count("input unchanged") == 3  # tent's images
    assert full.text.count("input as adapted") == 3
    assert [full.text.count(f"{what} change:") for what in ("Best", "Median", "Worst")] == [2, 2, 2]


def test_charts_are_there_with_their_data(full: Page, bare: Page) -> None:
    titles = ("Along the stream", "Round by round", "Image by image against source", "Chosen prompt sizes")
    assert all(title in full.text for title in titles)
    assert "Prompts of mgipt after the stream" in full.text
    assert "Along the stream" in bare.text
    absent = (*titles[1:], "Prompts of", "Chosen images", "against", "Wilcoxon", "egradation", "Machine", "seconds")
    assert not [words for words in absent if words in bare.text]


def test_without_failed_images_none_are_listed(bare: Page) -> None:
    assert "Failed images None." in bare.text


def test_chart_is_a_picture_of_its_own(full_folder: Path, tmp_path: Path) -> None:
    main([str(full_folder), "--chart", str(tmp_path / "gain.png")])
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_verdict_is_on_the_page(full: Page, tmp_path: Path) -> None:
    assert "helps: the best method, mgipt," in full.text
    folder = fabricate(tmp_path, {"source": 0.0, "tent": -0.02, "mgipt": -0.01}, rounds=1, pictures=False)
    assert "no method has a higher mean DSC than source" in Page(write_report(folder)).text


def test_same_folder_gives_the_same_bytes_from_the_command_line(full: Page, full_folder: Path) -> None:
    before = (full_folder / "report.html").read_bytes()
    (full_folder / "report.html").unlink()
    command = [sys.executable, "-m", "mgipt_monai.report", str(full_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(full_folder / "report.html")
    assert (full_folder / "report.html").read_bytes() == before


def test_folder_without_results_or_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no results\.json in .*give the output folder of a benchmark"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": "mgipt_monai.results", "version": 2}')
    with pytest.raises(ValueError, match=r"\('mgipt_monai.results', 2\), this report reads"):
        write_report(tmp_path)


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)  # how Python marks a module that cannot be imported
    monkeypatch.delitem(sys.modules, "mgipt_monai.report.page")
    with pytest.raises(ModuleNotFoundError, match=r"the report needs jinja2: pip install mgipt_monai\[benchmark\]"):
        importlib.import_module("mgipt_monai.report.page")
