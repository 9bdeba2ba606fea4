# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import importlib
import io
import itertools
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from torch import nn

from mgipt_monai.commissioning import Commissioning, commission
from mgipt_monai.commissioning.page import commissioning_page
from mgipt_monai.report.overlays import contour_picture

Labelled = list[dict[str, Any]]
VOID = {"meta", "img", "br", "path"}
BAD = "<script>alert(1)</script>/eye & 'x'"
COLOURS = {"reference": (255, 255, 255), "before": (230, 159, 0), "after": (86, 180, 233)}


class Page(HTMLParser):
    """What a page has, and whether its tags are closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def blob(size: tuple[int, ...], radius: float, shift: float = 0.0) -> torch.Tensor:
    grids = torch.meshgrid(*[torch.linspace(-1, 1, length) for length in size], indexing="ij")
    return (sum((grid - shift) ** 2 for grid in grids) < radius**2).float()  # type: ignore[union-attr]


def site(channels: int, size: tuple[int, ...], classes: int = 1, images: int = 5) -> tuple[nn.Module, Labelled]:
    """A network that predicts too large masks, and images whose blobs have the labels' sizes."""
    generator = torch.Generator().manual_seed(0)
    layer = (nn.Conv2d if len(size) == 2 else nn.Conv3d)(channels, classes, 1)
    with torch.no_grad():
        layer.weight.fill_(10.0 / channels)
        layer.bias.copy_(torch.linspace(-0.7, -4.6, classes))  # type: ignore[union-attr]
    labelled = []
    for index in range(images):
        masks = torch.stack([blob(size, 0.8 - 0.2 * one, 0.02 * index) for one in range(classes)])
        image = (0.7 * masks.mean(0) + 0.15 + 0.1 * torch.rand(size, generator=generator)).expand(channels, *size)
        labelled.append({"image": image.clone(), "label": masks, "name": f"eye_{index}"})
    return layer, labelled


def commissioned(network: nn.Module, labelled: Labelled, **settings: Any) -> Commissioning:
    given = {"candidates": ["none + offset"], "check_labels": False, **settings}
    return commission(network, labelled, **given)


CASES = {
    "rgb": ((3, (24, 32)), {}, True),
    "grey": ((1, (24, 24)), {"bound": "betting"}, False),
    "three classes": ((2, (24, 24), 3), {"class_names": ["rim", "disc", "cup"]}, True),
    "volume": ((1, (12, 10, 8)), {"metric": "surface_dice", "candidates": ["none + offset"]}, None),
}


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest) -> tuple[Commissioning, Labelled, Page]:
    shape, settings, certified = CASES[request.param]
    network, labelled = site(*shape)  # type: ignore[misc]
    labelled[0]["name"] = BAD
    if request.param == "three classes":
        labelled[1]["label"][2] = 0  # no cup in one label: its metric is not defined
    result = commissioned(network, labelled, **settings)  # type: ignore[arg-type]
    assert certified in (result.certified, None)
    return result, labelled, Page(commissioning_page(result, labelled, title="Site <A>", facts={"scanner": "<S>"}))


def test_page_needs_nothing_from_elsewhere(made: tuple[Commissioning, Labelled, Page]) -> None:
    page = made[2]
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?:|url\(|@import", page.source)


def test_page_has_verdict_candidates_and_every_image(made: tuple[Commissioning, Labelled, Page]) -> None:
    result, _, page = made
    assert ("✓ Certified" in page.text) is result.certified
    assert ("✗ Not certified" in page.text) is not result.certified
    assert "".join(result.statement.replace("`", "").split()) in "".join(page.text.split())
    for row in result.table:
        assert f"<code>{row.name}</code>" in page.source
    for case in result.cases:
        assert case["name"] in page.text
        assert any(code.get("title") == case["sha256"] for code in page.all("code"))
    assert page.source.count('<figure class="case') == len(result.cases)
    assert result.settings["weights"] in page.text
    assert "▶ deployed" in page.text
    assert page.text.endswith("Name Role Date Signature Name Role Date Signature")


def test_names_and_numbers_are_clean(made: tuple[Commissioning, Labelled, Page]) -> None:
    page = made[2]
    assert "<script" not in page.source
    assert "<A>" not in page.source
    assert "<S>" not in page.source
    assert "Scanner <S>" in page.text
    assert not re.search(r"\b(nan|inf|None|-inf)\b", page.text)


def test_page_is_accessible(made: tuple[Commissioning, Labelled, Page]) -> None:
    page = made[2]
    assert page.all("html")[0]["lang"] == "en"
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    assert all(image["alt"] for image in page.all("img"))
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))


def test_tables_have_a_cell_for_every_heading(made: tuple[Commissioning, Labelled, Page]) -> None:
    for table in made[2].source.split("<table>")[1:]:
        head, body = table.split("</table>")[0].split("</thead>")
        assert {row.count("<td") + 1 for row in body.split("<tr")[1:]} == {head.count("<th ")}


def test_volume_shows_the_plane_with_most_reference_voxels() -> None:
    network, labelled = site(1, (12, 10, 8))
    for item in labelled:
        item["label"][..., 6:] = 0
        item["label"][:, 2:9, 2:9, 5] = 1
        item["label"][..., :5] = 0
    page = Page(commissioning_page(commissioned(network, labelled), labelled))
    assert page.text.count("plane 6 of 8") == len(labelled)


def test_worst_change_comes_first_and_harm_is_marked() -> None:
    network, labelled = site(3, (24, 24), classes=2)
    result = commissioned(network, labelled)
    assert result.certified
    cases = [{**case, "after": case["before"] + change} for case, change in zip(result.cases, CHANGES, strict=True)]
    source = commissioning_page(replace(result, cases=cases), labelled)
    names = re.findall(r'<p class="name">(\w+)', source)
    assert names == ["eye_1", "eye_4", "eye_3", "eye_0", "eye_2"]
    assert source.count("▼ lost more than 1 point<") == 1
    assert source.index("case harmed") < source.index("eye_1 with the contours")
    assert "<td>−5.0</td>" in source


CHANGES = (0.02, -0.05, 0.03, 0.0, -0.005)


def test_without_certificate_nothing_is_claimed() -> None:
    _, labelled = site(1, (24, 24))
    generator = torch.Generator().manual_seed(1)
    for item in labelled:
        item["label"] = (torch.rand(item["label"].shape, generator=generator) > 0.5).float()
    network = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        network.weight.fill_(0.0)
        network.bias.fill_(1.0)  # type: ignore[union-attr]
    result = commissioned(network, labelled)
    page = Page(commissioning_page(result, labelled))
    assert not result.certified
    assert result.chosen == "none"
    assert "The source network, unchanged." in page.text
    assert "Nothing changes, so no image can lose." in page.text
    assert "Here, nothing is certified." in page.text
    assert "drift alarm" not in page.text
    assert "before (source network)" not in page.text
    assert "More images needed" in page.text


def test_fallback_is_named_unproven() -> None:
    _, labelled = site(1, (24, 24), images=6)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    for item in labelled:
        item["group"] = "patient <1>" if item["name"] in ("eye_0", "eye_1") else item["name"]
    result = commissioned(network, labelled, candidates=["none"], fallback="steady")
    page = Page(commissioning_page(result, labelled))
    assert not result.certified
    assert "as the fallback, unproven" in page.text
    assert "Not proven to be above 0 at the site." in page.text
    assert page.text.count("group patient <1>") == 2
    assert "6, in 5 groups" in page.text


def test_skipped_candidates_have_their_reason() -> None:
    network, labelled = site(1, (24, 24))
    result = replace(commissioned(network, labelled), skipped={"steady": "the network has no <batch> norm"})
    assert "Not tried: steady the network has no <batch> norm" in Page(commissioning_page(result, labelled)).text


def test_other_images_than_those_commissioned_are_refused() -> None:
    network, labelled = site(1, (24, 24))
    result = commissioned(network, labelled)
    with pytest.raises(ValueError, match="5 labelled images were commissioned, but 4 are given"):
        commissioning_page(result, labelled[1:])
    with pytest.raises(ValueError, match="eye_0 is another image than the one that was commissioned"):
        commissioning_page(result, labelled[::-1])


def test_image_types_give_the_same_page() -> None:
    network, labelled = site(1, (24, 24))
    result = commissioned(network, labelled)
    other = [{**item, "image": MetaTensor(item["image"]), "label": item["label"].numpy()} for item in labelled]
    facts = {"date": "2026-11-26"}
    assert commissioning_page(result, other, facts=facts) == commissioning_page(result, labelled, facts=facts)
    assert "2026-11-26" in commissioning_page(result, labelled, facts=facts)


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def near(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(pixels - colour) < 40).all(axis=-1)


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_contour_is_drawn_where_the_mask_ends(name: str, channels: int) -> None:
    mask = torch.zeros(1, 20, 40)
    mask[:, 5:15, 10:30] = 1
    image = -1000 + torch.zeros(channels, 20, 40)
    pixels = opened(contour_picture(image, {name: mask}, side=320))
    assert pixels.shape == (160, 320, 3)
    rows, columns = np.nonzero(near(pixels, COLOURS[name]))
    edges = (rows.min(), rows.max(), columns.min(), columns.max())
    assert np.abs(np.subtract(edges, (40, 120, 80, 240))).max() <= 2
    assert not near(pixels, COLOURS[name])[44:116, 84:236].any()


def test_contours_on_one_another_all_show() -> None:
    mask = blob((64, 64), 0.6)[None]
    pixels = opened(contour_picture(torch.zeros(1, 64, 64), dict.fromkeys(COLOURS, mask)))
    assert all(near(pixels, colour).sum() > 20 for colour in COLOURS.values())


def test_any_range_is_shown_from_black_to_white() -> None:
    ramp = torch.linspace(-3000, 5000, 64).expand(1, 16, 64)
    pixels = opened(contour_picture(ramp, {}, side=64))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert opened(contour_picture(torch.full((3, 400, 8), 7.0), {})).shape == (288, 6, 3)


def test_mask_of_the_whole_image_and_empty_masks() -> None:
    image = torch.zeros(1, 32, 32)
    whole = near(opened(contour_picture(image, {"reference": torch.ones(1, 32, 32)})), COLOURS["reference"])
    assert whole[0, 10:-10].all()
    assert not whole[4:-4, 4:-4].any()
    assert contour_picture(image, {"after": torch.zeros(2, 32, 32)}) == contour_picture(image, {})


def test_volume_is_drawn_in_the_plane_of_the_first_masks() -> None:
    volume, mask = torch.zeros(1, 16, 16, 5), torch.zeros(2, 16, 16, 5)
    volume[:, :8, :, 3] = 1
    mask[1, 4:12, 4:12, 3] = 1
    drawn = contour_picture(volume, {"reference": mask, "after": torch.zeros(2, 16, 16, 5)})
    assert drawn == contour_picture(volume[..., 3], {"reference": mask[..., 3]})


def test_wrong_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="no style for the masks 'later': reference, before, after"):
        contour_picture(torch.zeros(1, 8, 8), {"later": torch.zeros(1, 8, 8)})
    with pytest.raises(ValueError, match=r"the after masks are \(8, 9\), the image is \(8, 8\)"):
        contour_picture(torch.zeros(1, 8, 8), {"after": torch.zeros(1, 8, 9)})


def test_pictures_on_the_page_are_those_of_the_helper() -> None:
    network, labelled = site(3, (24, 24))
    result = commissioned(network, labelled)
    before, after = result.masks[2]
    png = contour_picture(labelled[2]["image"], {"reference": labelled[2]["label"], "before": before, "after": after})
    assert base64.b64encode(png).decode() in commissioning_page(result, labelled)


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)  # how Python marks a module that cannot be imported
    monkeypatch.delitem(sys.modules, "mgipt_monai.commissioning.page")
    with pytest.raises(ModuleNotFoundError, match=r"needs jinja2: pip install mgipt_monai\[commission\]"):
        importlib.import_module("mgipt_monai.commissioning.page")
