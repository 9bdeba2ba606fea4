# SPDX-License-Identifier: Apache-2.0
"""The benchmark of how cost grows measures what it says. No time is asserted."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.conftest import load_benchmark, tiny_network


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    module = load_benchmark("growth")
    module.small_unet = lambda side: module.Size(tiny_network, 3, (side, side))
    module.TURNS = module.PLAIN_CALLS = 1
    return module


def test_tables_have_a_row_for_each_value(growth: ModuleType, tmp_path: Path) -> None:
    sides, layers = growth.with_side([16, 24]), growth.with_layers([1, 2], 16)
    assert [row[0] for row in sides.rows] == [16, 24]
    assert [row[0] for row in layers.rows] == [1, 2]
    assert sides.markdown().splitlines()[1] == "|--:|--:|--:|--:|"
    growth.draw([sides, layers]).savefig(tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_every_image_costs_the_same_and_the_first_layers_are_aligned(growth: ModuleType) -> None:
    size = growth.small_unet(16)
    method = growth.adapting(size, growth.weights(size), r"^1$")
    for _ in range(2):
        method(torch.rand(1, 3, 16, 16))
        assert method.last[0]["forwards"] + method.last[0]["backwards"] == 52
    assert list(method.norms.layers) == ["1"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_a_stream_is_measured_in_equal_parts(growth: ModuleType) -> None:
    rows = growth.along_stream(6, looks=3).rows
    assert [row[0] for row in rows] == [2, 4, 6]
    assert all(row[2] > 50 for row in rows)
