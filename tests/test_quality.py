# SPDX-License-Identifier: Apache-2.0
"""The expected Dice of a mask, its calibration, and what a summary makes of it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from mgipt_monai.commissioning.commission import calibrate_quality
from mgipt_monai.data import EstimateQualityd
from mgipt_monai.metrics import expected_dice, mask_dice
from mgipt_monai.stream import StreamSummary


def test_expected_dice_is_one_where_the_network_is_certain_and_right_on_average() -> None:
    certain = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    assert expected_dice(certain, certain) == [1.0]
    # many independent pixels: the mean Dice with truths that the probabilities draw is what is expected
    generator = torch.Generator().manual_seed(0)
    likely = torch.rand(1, 100, 100, generator=generator)
    mask = (likely > 0.5).float()
    truths = [(torch.rand(likely.shape, generator=generator) < likely).float() for _ in range(20)]
    found = np.mean([mask_dice(mask, truth)[0] for truth in truths])
    assert expected_dice(likely, mask)[0] == pytest.approx(found, abs=0.01)


def test_an_empty_mask_is_as_good_as_the_class_is_surely_absent() -> None:
    assert expected_dice(torch.full((1, 4, 4), 0.25), torch.zeros(1, 4, 4)) == [0.75]


def test_softmax_has_no_quality_of_the_background() -> None:
    likely = torch.tensor([[0.2, 0.7], [0.8, 0.1], [0.0, 0.2]]).view(3, 1, 2)
    quality = EstimateQualityd("pred", head="softmax")({"pred": likely})["quality"]
    assert quality == pytest.approx([2 * 0.8 / (0.9 + 1), 1 - 0.2])


def test_calibration_is_a_line_within_bounds() -> None:
    data = {"pred": torch.tensor([[[0.75, 0.75, 0.0]], [[1.0, 1.0, 0.0]]])}
    transform = EstimateQualityd("pred", calibration=[[-0.1, 1.0], [0.5, 1.0]], result="result")
    found = transform({**data, "result": {"other": 1}})
    assert found["quality"] == pytest.approx([6 / 7 - 0.1, 1.0])
    assert found["result"] == {"other": 1, "quality": found["quality"]}
    with pytest.raises(ValueError, match="1 lines for 2 structures"):
        EstimateQualityd("pred", calibration=[[0.0, 1.0]])(data)
    with pytest.raises(ValueError, match="one prediction"):
        EstimateQualityd(["pred", "unadapted"])
    with pytest.raises(ValueError, match="head"):
        EstimateQualityd("pred", head="relu")


def test_calibration_is_fitted_to_each_class() -> None:
    generator = np.random.default_rng(0)
    quality = generator.uniform(0.7, 1.0, (200, 2))
    dice = np.stack([quality[:, 0] - 0.1, 0.4 + 0.5 * quality[:, 1]], axis=1)
    dice[:3, 0] = np.nan
    (first, second) = calibrate_quality(quality, dice)
    assert first == pytest.approx([-0.1, 1.0])
    assert second == pytest.approx([0.4, 0.5], abs=0.02)
    assert calibrate_quality(quality[:3, :1], dice[:3, :1]) == [[0.0, 1.0]]


def record(name: str, adapted: float, unadapted: float | None = None, **more: object) -> dict:
    compared = {} if unadapted is None else {"unadapted_metrics": {"dsc": {"disc": unadapted}}}
    return {
        "name": name,
        "site": "A",
        "status": "ok",
        "seconds": 1.0,
        "metrics": {"dsc": {"disc": adapted}},
        **compared,
        **more,
    }


def test_gain_counts_an_image_once_whatever_the_rounds() -> None:
    summary = StreamSummary()
    for round_number in (1, 2):
        for name, adapted in (("a", 0.70), ("b", 0.85)):
            prefix = f"round_{round_number}/" if round_number > 1 else ""
            summary.add(record(f"{prefix}{name}", adapted, 0.80, round=round_number))
    gain = summary.figures()["all"]["gain"]["dsc"]
    assert (gain["images"], gain["worse"], gain["better"]) == (2, 1, 1)
    assert gain["mean"] == pytest.approx(-0.025)
    assert gain["interval"][0] <= gain["mean"] <= gain["interval"][1]
    assert "-2.50 points" in summary.verdict()[0]
    assert "unadapted" in summary.table().splitlines()[0]


def test_without_labels_the_summary_says_what_can_be_said() -> None:
    summary = StreamSummary()
    for name, quality, agreement in (("a", 0.9, 0.99), ("b", 0.6, 0.80)):
        row = {
            **record(name, 0),
            "quality": {"disc": quality, "cup": 1.0},
            "agreement": {"disc": agreement, "cup": 1.0},
        }
        row["metrics"] = {}
        row |= {"elsewhere": name == "b", "decision": "unadapted" if name == "b" else "adapted"}
        summary.add(row)
    text = "\n".join(summary.verdict())
    for words in (
        "agree to 89.5 %",
        "least b (80 %)",
        "only labels tell",
        "1 of 2 images",
        "unlike those before",
        "b, a",
    ):
        assert words in text


def test_review_has_the_failed_the_odd_and_the_worst_in_front(tmp_path: Path) -> None:
    summary = StreamSummary()
    summary.add(record("good", 0.9, quality={"disc": 0.9}))
    summary.add(record("odd", 0.9, quality={"disc": 0.95}, elsewhere=True))
    summary.add(record("bad", 0.9, quality={"disc": 0.5}, agreement={"disc": 0.7}))
    summary.add({"name": "broken", "site": "A", "status": "failed", "reason": "empty", "seconds": 0.0}, shown="=1+1")
    summary.write_review(tmp_path / "review.csv")
    with (tmp_path / "review.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["look"] for row in rows] == ["failed", "elsewhere", "", ""]
    assert [row["name"] for row in rows][1:] == ["odd", "bad", "good"]
    assert not rows[0]["name"].startswith("=")  # no formula in a spreadsheet
    assert (rows[2]["quality"], rows[2]["quality_disc"], rows[2]["agreement"]) == ("0.5", "0.5", "0.7")
