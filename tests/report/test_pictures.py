# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.metrics import DiceMetric
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Resized,
    ScaleIntensityd,
)
from PIL import Image

from mgipt_monai import AdaptiveInferer, Source, StreamingAdaptationEvaluator
from mgipt_monai.data.dataset import StreamDataset
from mgipt_monai.report import PictureWriter
from mgipt_monai.report.pictures import ADAPTED, INPUT, MASK, picture_path, read_masks, write_masks
from mgipt_monai.utils.outputs import MANIFEST
from tests.conftest import tiny_network


def write_stream(folder: Path, count: int) -> list[dict[str, str]]:
    """PNG photographs of 40 x 60 pixels with a disc mask, and where they are."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :60]
    items = []
    for i in range(count):
        disc = (y - 20) ** 2 + (x - 20 - 10 * i) ** 2 < 100
        pixels = (120 * disc[..., None] + rng.integers(0, 120, (40, 60, 3))).astype(np.uint8)
        item = {"image": str(folder / f"{i}.png"), "label": str(folder / f"{i}_mask.png")}
        Image.fromarray(pixels).save(item["image"])
        Image.fromarray(disc.astype(np.uint8)).save(item["label"])
        items.append({**item, "site": "A", "name": f"A/eye.{i}"})
    return items


def run(data: list[dict], *writers: PictureWriter) -> list[torch.Tensor]:
    """Run a stream whose network sees 48 x 48 pixels; return the predictions in the images' own geometry."""
    rows_first = {"reader": "PILReader", "reverse_indexing": False}
    preprocessing = Compose(
        [
            LoadImaged(["image", "label"], **rows_first),
            EnsureChannelFirstd(["image", "label"]),
            Resized("image", (48, 48)),
            ScaleIntensityd("image"),
        ]
    )
    network = tiny_network(out_channels=1)
    predictions: list[torch.Tensor] = []
    evaluator = StreamingAdaptationEvaluator(
        "cpu",
        DataLoader(StreamDataset(data, preprocessing), batch_size=1),
        network,
        AdaptiveInferer(Source(network)),
        image_metrics={"dsc": DiceMetric(reduction="none")},
        postprocessing=Compose(
            [
                Activationsd("pred", sigmoid=True),
                Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False),
                AsDiscreted("pred", threshold=0.5),
            ]
        ),
        val_handlers=list(writers),
        progress=False,
    )
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: predictions.append(e.state.output[0]["pred"]))
    evaluator.run()
    return predictions


def show(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}


def engine_after(image: torch.Tensor, pred: torch.Tensor, label: torch.Tensor) -> Engine:
    """An engine in the state in which an evaluator leaves it after an image."""
    engine = Engine(lambda engine, batch: [{"image": image, "pred": pred, "label": label}])
    engine.state.record = {"name": "volume"}
    return engine


def test_evaluator_leaves_pictures_of_each_image(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    data = write_stream(tmp_path / "in", 2)
    reference = tmp_path / "reference"
    predictions = run(data, PictureWriter(tmp_path / "out", lambda image: 1 - image, reference, side=32))
    assert written(tmp_path / "out") == {f"A/eye.{i}.{ending}" for i in range(2) for ending in (ADAPTED, MASK)}
    assert written(reference) == {f"A/eye.{i}.{ending}" for i in range(2) for ending in (INPUT, MASK)}
    for i, prediction in enumerate(predictions):
        name = f"A/eye.{i}"
        shown, adapted = (
            show(picture_path(f, name, e)).astype(int) for f, e in ((reference, INPUT), (tmp_path / "out", ADAPTED))
        )
        # the network's input is 48 x 48, whatever the photograph
        assert shown.shape == (32, 32, 3)
        assert np.abs(shown + adapted - 255).mean() < 8  # JPEG is not exact
        masks = read_masks(picture_path(tmp_path / "out", name, MASK), 1)
        assert masks.shape == (1, 32, 32)
        assert masks.mean() == pytest.approx(prediction.mean().item(), abs=0.03)
        disc = read_masks(picture_path(reference, name, MASK), 1)[0]
        assert disc.mean() == pytest.approx(np.pi * 100 / 2400, abs=0.02)
        # the disc is where the picture is bright, in the same row and column
        assert shown[disc == 1].mean() > shown[disc == 0].mean() + 50


def test_method_that_leaves_its_input_has_no_adapted_picture_and_the_reference_is_kept(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    data = write_stream(tmp_path / "in", 1)
    kept = picture_path(tmp_path / "reference", "A/eye.0", INPUT)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"there before")
    run(data, PictureWriter(tmp_path / "one", reference=tmp_path / "reference"), PictureWriter(tmp_path / "two"))
    assert written(tmp_path / "one") == written(tmp_path / "two") == {f"A/eye.0.{MASK}"}
    assert kept.read_bytes() == b"there before"
    assert picture_path(tmp_path / "reference", "A/eye.0", MASK).is_file()


def test_volume_is_shown_in_the_plane_with_most_of_the_reference(tmp_path: Path) -> None:
    # the network's input has half the planes of the reference
    label, pred = torch.zeros(2, 12, 10, 8), torch.zeros(2, 12, 10, 8)
    label[0, 2:4, 2:4, 1] = 1
    label[1, 2:9, 2:9, 5] = 1
    pred[0, 5:7, :, 5] = 1
    image = torch.linspace(0, 1, 4).expand(1, 6, 5, 4).clone()
    engine = engine_after(image, pred, label)
    PictureWriter(tmp_path / "out", reference=tmp_path).attach(engine)
    engine.run([0])
    shown = show(picture_path(tmp_path, "volume", INPUT))
    assert shown.shape == (6, 5)
    assert np.abs(shown.astype(int) - round(255 * 2 / 3)).max() <= 2  # plane 5 of 8 is plane 2 of 4
    reference = read_masks(picture_path(tmp_path, "volume", MASK), 2)
    assert reference[0].sum() == 0
    assert reference[1].mean() == pytest.approx(label[1, ..., 5].mean().item(), abs=0.12)
    assert read_masks(picture_path(tmp_path / "out", "volume", MASK), 2)[0].any()


def test_volume_without_reference_is_shown_in_the_middle(tmp_path: Path) -> None:
    image = torch.linspace(0, 1, 5).expand(2, 6, 6, 5).clone()  # of two channels the first is shown
    engine = engine_after(image, torch.zeros(1, 6, 6, 5), torch.zeros(1, 6, 6, 5))
    PictureWriter(tmp_path / "out", reference=tmp_path).attach(engine)
    engine.run([0])
    assert np.abs(show(picture_path(tmp_path, "volume", INPUT)).astype(int) - 128).max() <= 1


@pytest.mark.parametrize("classes", [1, 3, 8])
def test_masks_come_back_from_their_bits(tmp_path: Path, classes: int) -> None:
    masks = np.random.default_rng(classes).integers(0, 2, (classes, 7, 5)).astype(np.uint8)
    write_masks(tmp_path / "deep" / "mask.png", masks)
    assert show(tmp_path / "deep" / "mask.png").dtype == np.uint8
    assert (read_masks(tmp_path / "deep" / "mask.png", classes) == masks).all()


def test_more_than_eight_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 8 classes, got 9"):
        write_masks(tmp_path / "mask.png", np.zeros((9, 4, 4)))
    assert not written(tmp_path)


def test_wrong_settings_and_unlabelled_streams_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="side must be at least 1 pixel, got 0"):
        PictureWriter(tmp_path, side=0)
    engine = engine_after(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), None)
    PictureWriter(tmp_path).attach(engine)
    with pytest.raises(ValueError, match="volume has no reference mask"):
        engine.run([0])
