# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgipt_monai.report.examples import chosen_images
from mgipt_monai.report.folder import BenchmarkFolder
from mgipt_monai.report.pictures import ADAPTED, INPUT, MASK, picture_path
from tests.report.fabricated import fabricate


@pytest.fixture
def folder(tmp_path: Path) -> BenchmarkFolder:
    return BenchmarkFolder.read(fabricate(tmp_path, {"source": 0, "mgipt": 0.02}, images=3, rounds=1))


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_best_median_and_worst_change_are_chosen(folder: BenchmarkFolder) -> None:
    changes = folder.changes("mgipt")
    in_order = sorted(changes, key=changes.get)
    chosen = chosen_images(folder, "mgipt")
    assert [image.what for image in chosen] == ["best change", "median change", "worst change"]
    assert [image.name for image in chosen] == [in_order[-1], in_order[len(in_order) // 2], in_order[0]]
    for image in chosen:
        assert image.after - image.before == pytest.approx(changes[image.name])


def test_pictures_are_those_of_the_folder_with_outlines_drawn(folder: BenchmarkFolder) -> None:
    image = chosen_images(folder, "mgipt")[0]
    shown, adapted = (
        picture_path(folder.path / where / "pictures", image.name, ending)
        for where, ending in (("reference", INPUT), ("mgipt", ADAPTED))
    )
    assert (pixels(image.shown) == np.asarray(Image.open(shown))).all()
    assert (pixels(image.adapted) == np.asarray(Image.open(adapted))).all()
    drawn = pixels(image.contours).astype(int)
    assert drawn.shape == (512, 512, 3)
    # the reference begins at column 3 of 16, which is at 96 pixels of the drawing, and its outline is white
    assert drawn[160, 94:99].min(axis=-1).max() > 200


def test_image_without_pictures_is_not_chosen(folder: BenchmarkFolder) -> None:
    best = chosen_images(folder, "mgipt")[0].name
    picture_path(folder.path / "source" / "pictures", best, MASK).unlink()
    assert best not in [image.name for image in chosen_images(folder, "mgipt")]


@pytest.mark.parametrize(("count", "expected"), [(1, ["best change"]), (2, ["best change", "worst change"])])
def test_no_image_is_shown_twice(tmp_path: Path, count: int, expected: list[str]) -> None:
    fabricated = fabricate(tmp_path, {"source": 0, "mgipt": 0.02}, images=count, rounds=1, sites=("A",))
    assert [image.what for image in chosen_images(BenchmarkFolder.read(fabricated), "mgipt")] == expected


def test_failed_image_is_left_out_in_every_round(tmp_path: Path) -> None:
    gains = {"source": 0, "tent": 0.01, "mgipt": 0.02}
    folder = BenchmarkFolder.read(fabricate(tmp_path, gains, failed=("A/eye_001",), pictures=False))
    assert len(folder.scores["tent"]) == 2 * 7  # mgipt failed at one of eight, in the first of two rounds
    assert not [name for name in folder.scores["tent"] if name.endswith("A/eye_001")]


def test_change_of_an_image_is_the_mean_over_its_rounds(tmp_path: Path) -> None:
    folder = BenchmarkFolder.read(fabricate(tmp_path, {"source": 0, "mgipt": 0.02}, pictures=False))
    changes = folder.changes("mgipt")
    expected = [(changes[name] + changes[f"round_2/{name}"]) / 2 for name in changes if not name.startswith("round_")]
    assert folder.image_changes("mgipt") == pytest.approx(expected)
