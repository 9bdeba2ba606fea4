# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDistanceMetric

from mgipt_monai.metrics import ImageMeasures, MaxEMeasure, SMeasure
from tests.conftest import labelled_square


def square(first: int = 4, last: int = 12, side: int = 32) -> torch.Tensor:
    mask = torch.zeros(1, side, side)
    mask[:, first:last, first:last] = 1
    return mask


@pytest.mark.parametrize("metric", [MaxEMeasure(), SMeasure()])
def test_measures_are_one_for_the_mask_itself_and_fall_as_it_moves_away(metric) -> None:
    scores = [float(metric([square(4 + shift, 12 + shift)], [square()])) for shift in (0, 2, 4)]
    assert scores[0] == pytest.approx(1, abs=1e-2)
    assert scores[0] > scores[1] > scores[2] > 0


def test_max_e_measure_takes_the_best_threshold() -> None:
    # a map that is correct at only one threshold: the square at .8 in a larger one at .6
    graded = square() * 0.2 + square(2, 20) * 0.6
    wide = square(2, 20) * 0.6
    metric = MaxEMeasure()
    assert float(metric([graded], [square()])) == pytest.approx(float(metric([square()], [square()])))
    assert float(metric([wide], [square()])) < 0.95


@pytest.mark.parametrize("metric", [MaxEMeasure(), SMeasure()])
def test_measures_come_per_image_and_channel(metric) -> None:
    maps = [torch.cat([square(), square(6, 14)]), torch.cat([square(), square()])]
    masks = [torch.cat([square(), square()])] * 2
    scores = metric(maps, masks)
    assert scores.shape == (2, 2)
    assert scores[0, 0] == scores[1, 0] == scores[1, 1] > scores[0, 1]
    assert metric.aggregate() == scores.mean()


def test_measures_refuse_volumes_and_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"SMeasure needs two-dimensional .* got \(1, 1, 8, 8, 8\)"):
        SMeasure()([torch.rand(1, 8, 8, 8)], [torch.zeros(1, 8, 8, 8)])
    with pytest.raises(ValueError, match="two-dimensional maps and masks of one shape"):
        MaxEMeasure()([torch.rand(1, 8, 8)], [torch.zeros(1, 8, 9)])


def test_distances_are_in_the_labels_spacing() -> None:
    asd = SurfaceDistanceMetric(include_background=True, symmetric=True, reduction="none")
    hd95 = HausdorffDistanceMetric(include_background=True, percentile=95, reduction="none")
    measures = ImageMeasures({"dsc": DiceMetric(reduction="none"), "hd95": hd95, "asd": asd}, class_names=["square"])
    pixels, millimetres = (
        measures({"pred": square(6, 14), "label": labelled_square(spacing)}) for spacing in (1.0, 0.25)
    )
    assert millimetres["dsc"] == pixels["dsc"]
    assert pixels["hd95"]["square"] >= 2
    for name in ("hd95", "asd"):
        assert millimetres[name]["square"] == pytest.approx(pixels[name]["square"] / 4)


def test_probabilities_are_measured_without_their_background_channel() -> None:
    measures = ImageMeasures(probability_metrics={"s": SMeasure()}, class_names=["square"])
    probability = torch.cat([1 - square(), square()])
    assert measures({"pred": square(), "label": square(), "prob": probability})["s"]["square"] == pytest.approx(1)
    with pytest.raises(ValueError, match="'prob'"):
        measures({"pred": square(), "label": square()})
    assert measures({"pred": square()}) == {}
