# SPDX-License-Identifier: Apache-2.0
"""The script that lays the overlay over configs like those of the model zoo, on a few of them; it runs the rest."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from tests.conftest import load_benchmark

SEEN = {
    "UNet, batch norm, windows": ("green", r"\d+ F, \d+ F"),
    "UNet, instance norm, slices": ("green", r"\d+ F, \d+ F"),
    "SegResNet, tiles": ("green", r"\d+ F, \d+ F"),
    "BasicUNet with clicks": ("green", r"\d+ F, \d+ F"),
    "each slice an image": ("green", r"\d+ F, \d+ F"),
    "windows with coordinates": ("refused", "set with_coord=False"),
    "an inferer of its own": ("refused", "not through a OwnInferer"),
}


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    return load_benchmark("zoo_overlays")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a run in this process changes: the search path, and MONAI's settings of logging."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.mark.parametrize("name", SEEN)
def test_bundle_adapts_or_is_refused_in_words(zoo: ModuleType, name: str, tmp_path: Path) -> None:
    result, detail = zoo.outcome(zoo.bundles()[name], tmp_path)
    expected, words = SEEN[name]
    assert (result, bool(re.search(words, detail))) == (expected, True), (result, detail)


def test_what_breaks_inside_is_no_refusal(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zoo, "Placed", lambda: Picky())
    network = {"_target_": "zoo_overlays.Placed"}
    bundle = zoo.bundles()["UNet, batch norm, whole image"]._replace(network=network)
    assert zoo.outcome(bundle, tmp_path) == ("DEFECT", "seen once")


class Picky(nn.Module):
    """A network that fails from its third image on, which is the first one that is adapted to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head, self.seen = nn.BatchNorm2d(1), nn.Conv2d(1, 3, 1), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if Picky.total == 2:
            raise ValueError("seen once")
        Picky.total += 1
        return self.head(self.norm(x))

    total = 0


def test_every_network_is_cut_in_every_way_that_it_can_be(zoo: ModuleType) -> None:
    names = zoo.bundles().keys()
    assert len(names) == 9 * 5 - 2 + 10
    assert zoo.main(["--only", "no such bundle"]) == 0
