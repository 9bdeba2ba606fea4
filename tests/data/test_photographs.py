# SPDX-License-Identifier: Apache-2.0
"""Photographs of other kinds than the network's channels are converted where that is plain."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from PIL import Image

from mgipt_monai.data import CheckImaged, PhotographReader, StreamDataset

GREY = np.random.default_rng(0).integers(0, 255, (5, 4), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 255, (5, 4, 3), dtype=np.uint8)


def saved(path: Path, kind: str) -> Path:
    grey, colour = Image.fromarray(GREY), Image.fromarray(COLOUR)
    made = {
        "grey": grey,
        "RGB": colour,
        "RGBA": colour.convert("RGBA"),
        "palette": colour.quantize(20),
        "equal": grey.convert("RGB"),
        "equal palette": grey.convert("P"),
        "grey and alpha": grey.convert("LA"),
        "16 bits": Image.fromarray(GREY.astype(np.uint16) * 257),
    }
    made[kind].save(path / f"{kind}.png")
    return path / f"{kind}.png"


def item(path: Path, channels: int, color_mode: str | None = None) -> dict:
    reader = PhotographReader(color_mode, reverse_indexing=False, channels=channels)
    steps = [LoadImaged("image", reader=reader), EnsureChannelFirstd("image"), CheckImaged("image", channels)]
    return StreamDataset([{"image": str(path), "name": "eye"}], Compose(steps))[0]


@pytest.mark.parametrize("kind", ["grey", "grey and alpha", "16 bits", "equal palette"])
def test_grey_is_repeated_for_three_channels(tmp_path: Path, kind: str) -> None:
    found = item(saved(tmp_path, kind), 3)["image"]
    assert np.array_equal(found, np.stack([GREY] * 3))


@pytest.mark.parametrize("kind", ["RGBA", "palette"])
def test_alpha_is_dropped_and_palettes_are_expanded(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, kind)
    assert np.array_equal(item(path, 3)["image"].permute(1, 2, 0), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("kind", ["equal", "equal palette", "grey and alpha"])
def test_equal_channels_become_grey_for_one_channel(tmp_path: Path, kind: str) -> None:
    assert np.array_equal(item(saved(tmp_path, kind), 1)["image"][0], GREY)


def test_colour_for_one_channel_is_refused_with_the_fix_unless_color_mode_says_grey(tmp_path: Path) -> None:
    path = saved(tmp_path, "RGB")
    assert "3 channels where the network expects 1" in (failure := item(path, 1)["failure"])
    assert "set color_mode (RGB for 3 channels, L for 1)" in failure
    assert np.array_equal(item(path, 1, "L")["image"][0], np.asarray(Image.open(path).convert("L")))


def test_16_bits_keep_their_values_for_one_channel(tmp_path: Path) -> None:
    assert item(saved(tmp_path, "16 bits"), 1)["image"].max() == 257 * int(GREY.max())


def test_conversion_is_said_once_for_each_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = PhotographReader(channels=3)
    with caplog.at_level(logging.INFO, logger="mgipt_monai"):
        for _ in range(3):
            reader.read(saved(tmp_path, "grey"))
            reader.read(saved(tmp_path, "RGBA"))
            reader.read(saved(tmp_path, "RGB"))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "a picture of the kind L is converted to RGB, since the network has 3 channels (see color_mode)",
        "a picture of the kind RGBA is converted to RGB, since the network has 3 channels (see color_mode)",
    ]


def test_files_that_are_channels_are_not_converted(tmp_path: Path) -> None:
    reader = PhotographReader(channels=3)
    assert [image.mode for image in reader.read([saved(tmp_path, "grey")] * 3)] == ["L"] * 3
    assert reader.read([saved(tmp_path, "grey")] * 3)[0].pixels.shape == (5, 4)
