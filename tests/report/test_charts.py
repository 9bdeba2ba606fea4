# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import math
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from mgipt_monai.report.charts import Block, blocks_of, charts_of, prompt_chart, running_mean
from mgipt_monai.report.folder import BenchmarkFolder
from mgipt_monai.report.styles import method_styles
from tests.report.fabricated import fabricate


def svg(source: str) -> ElementTree.Element:
    head, content = source.split(",", 1)
    assert head == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(content))


def test_no_two_methods_share_colour_and_line() -> None:
    styles = method_styles(["source", *(f"method {i}" for i in range(25)), "mgipt"], "source")
    assert len({(style.color, str(style.dashes)) for style in styles.values()}) == 27
    # as many as the benchmark runs differ in colour and in marker
    ten = [styles[name] for name in ("source", *(f"method {i}" for i in range(9)), "mgipt")]
    assert len({style.color for style in ten}) == len({style.marker for style in ten}) == 11
    assert len({(style.color, style.marker) for style in styles.values()}) == 27
    # neighbours differ in marker and hatch too, for print without colour
    few = [styles[name] for name in ("source", "method 0", "method 1", "method 2", "mgipt")]
    assert len({style.marker for style in few}) == len({style.hatch for style in few}) == 5


def test_method_keeps_its_style_without_a_baseline() -> None:
    assert (
        method_styles(["tent", "mgipt"], None)["mgipt"] == method_styles(["source", "tent", "mgipt"], "source")["mgipt"]
    )
    assert list(method_styles(["source"], "source")) == ["source"]


def test_running_mean_stays_within_its_block_and_leaves_failed_images_out() -> None:
    values = np.array([1.0, math.nan, 3.0, 5.0, 100.0, 200.0])
    means = running_mean(values, [Block(0, 4, "A", 1), Block(4, 6, "B", 1)], half=2)
    assert np.allclose(means, [2.0, math.nan, 3.0, 4.0, 150.0, 150.0], equal_nan=True)


def test_running_mean_of_a_constant_is_that_constant() -> None:
    assert (running_mean([0.5] * 7, [Block(0, 7, "A", 1)], half=2) == 0.5).all()


def test_rounds_part_the_visits_of_one_site() -> None:
    rows = [{"site": "A", "round": round_} for round_ in (1, 1, 2)]
    assert blocks_of(rows) == [Block(0, 2, "A", 1), Block(2, 3, "A", 2)]


def test_mixed_sites_are_not_shaded_one_by_one() -> None:
    rows = [{"site": site, "round": round_} for round_ in (1, 2) for site in "ABAB"]
    assert blocks_of(rows) == [Block(0, 4, "", 1), Block(4, 8, "", 2)]


def test_charts_are_drawings_without_a_date(tmp_path: Path) -> None:
    folder = BenchmarkFolder.read(fabricate(tmp_path, {"source": 0, "mgipt": 0.01}, pictures=False))
    charts = list(charts_of(folder))
    assert len(charts) == 5
    for chart in charts:
        assert len(list(svg(chart.source).iter())) > 50
        assert b"<dc:date>" not in base64.b64decode(chart.source.split(",")[1])
        assert chart.caption.endswith(".")
        assert chart.caption.count(". ") == 0


def test_charts_of_one_method_alone(tmp_path: Path) -> None:
    folder = BenchmarkFolder.read(fabricate(tmp_path, {"source": 0}, images=1, sites=("A",), rounds=1, pictures=False))
    assert [chart.title for chart in charts_of(folder)] == ["Along the stream"]


@pytest.mark.parametrize("channels", [1, 3])
def test_prompt_of_a_volume_is_its_middle_slice(channels: int) -> None:
    volume = np.random.default_rng(0).normal(1, 0.1, (channels, 3, 3, 3))
    chart = prompt_chart("mgipt", {"3 x 3": volume.tolist()})
    assert "middle slice" in chart.caption
    slices = [prompt_chart("mgipt", {"3 x 3": volume[:, i].tolist()}) for i in range(2)]
    assert [chart.source == flat.source for flat in slices] == [False, True]
    assert "slice" not in slices[0].caption


def test_prompt_that_changes_nothing_is_drawn_and_numbers_are_left_out_of_small_cells() -> None:
    small = prompt_chart("mgipt", {"3 x 3": np.ones((1, 3, 3)).tolist()})
    large = prompt_chart("mgipt", {"9 x 9": np.ones((1, 9, 9)).tolist()})
    cells = [svg(chart.source).findall(".//*[@id]") for chart in (small, large)]
    texts = [sum(element.get("id", "").startswith("text_") for element in found) for found in cells]
    assert texts[0] - texts[1] == 9


@pytest.mark.parametrize("name", ["A$x_{$", "$", "$$", r"\$a$\$", "$\\frac$", "a_b^c", "<&>$x$--"])
def test_name_with_signs_of_a_formula_is_drawn_as_it_is(name: str, tmp_path: Path) -> None:
    gains = {"source": 0, f"mgipt{name}": 0.01}
    folder = BenchmarkFolder.read(fabricate(tmp_path, gains, sites=(name, "B"), pictures=False))
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters instead of outlines
        charts = list(charts_of(folder))
        along = {element.text for element in svg(charts[0].source).iter("{http://www.w3.org/2000/svg}text")}
    assert name in along
    assert f"mgipt{name}" in along
    svg(prompt_chart(name, {name: np.ones((3, 3, 3))}).source)
