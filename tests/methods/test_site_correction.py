# SPDX-License-Identifier: Apache-2.0
"""Calibration to the site: nothing where there is no shift, all where there is no doubt."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from mgipt_monai import SiteCorrection
from mgipt_monai.networks import SiteStatistics, disagreement
from tests.conftest import stream, tiny_network


def alike(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Images of one mean and deviation, so that what they differ in is not the camera's."""
    images = stream(count, seed=seed)
    return [0.5 + 0.15 * (i - i.mean((2, 3), keepdim=True)) / i.std((2, 3), keepdim=True) for i in images]


@pytest.fixture
def source() -> nn.Module:
    """A network whose statistics are those of the stream's images."""
    network = tiny_network()
    for layer in (network[1], network[4]):
        layer.reset_running_stats()
        layer.momentum = None
    network.train()
    with torch.no_grad():
        for image in alike(60, seed=9):
            network(image)
    return network.eval()


def run(method: SiteCorrection, images: Iterable[torch.Tensor]) -> list[dict]:
    records = []
    for image in images:
        method(image)
        records += method.last
    return records


def test_a_site_like_the_source_is_left_to_the_source(source: nn.Module) -> None:
    method = SiteCorrection(source)
    records = run(method, alike(40))
    assert sum(record["adapted_weight"] for record in records[10:]) / 30 < 0.05
    image = alike(1, seed=5)[0]
    with torch.no_grad():
        plain = source(image)
    assert (method(image) - plain).abs().mean() < 0.05 * plain.std()


def test_another_site_is_calibrated_to(source: nn.Module) -> None:
    method = SiteCorrection(source, SiteStatistics(horizon=60, caution=0), image_share=0)
    records = run(method, [0.3 * image for image in alike(60)])
    assert records[-1]["adapted_weight"] > 0.9
    # a gain is what each channel's mean and deviation can tell
    plain_image = alike(1, seed=5)[0]
    with torch.no_grad():
        wanted, unadapted = source(plain_image), source(0.3 * plain_image)
    adapted = method(0.3 * plain_image)
    assert (adapted - wanted).abs().mean() < 0.5 * (unadapted - wanted).abs().mean()


@pytest.mark.parametrize("trust", [1.5, 2.5])
def test_the_weight_is_the_square_of_the_evidence_up_to_one(source: nn.Module, trust: float) -> None:
    method = SiteCorrection(source, trust=trust)
    records = run(method, [(1 - 0.015 * i) * image for i, image in enumerate(alike(30))])
    for record in records:
        assert record["adapted_weight"] == min(1.0, (trust * record["evidence"]) ** 2)
    weights = [record["adapted_weight"] for record in records]
    assert min(weights) < 0.3
    assert max(weights) > 0.5


def test_without_trust_it_is_the_source(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    method = SiteCorrection(network, trust=1e-9)
    for image in images:
        with torch.no_grad():
            assert torch.allclose(method(image), network(image), atol=1e-5)


def test_a_window_that_covers_the_image_changes_nothing_but_the_cost(images: list[torch.Tensor]) -> None:
    whole, windowed = SiteCorrection(tiny_network()), SiteCorrection(tiny_network())
    windowed.predict_through(SlidingWindowInferer(roi_size=images[0].shape[2:]))
    for image in images:
        assert torch.allclose(whole(image), windowed(image), atol=1e-5)
    assert (whole.last[0]["forwards"], windowed.last[0]["forwards"]) == (3, 4)


def test_windows_share_the_sites_statistics(images: list[torch.Tensor]) -> None:
    method = SiteCorrection(tiny_network())
    method.predict_through(SlidingWindowInferer(roi_size=(16, 16)), windows=2)
    logits = method(images[0])
    assert logits.shape[2:] == images[0].shape[2:]
    assert method.last[0]["forwards"] == 3 * 4 + 2
    assert method.adaptation_state()["site"]["count"] == 1


def test_uncertainty_is_the_disagreement_of_the_three(images: list[torch.Tensor]) -> None:
    method = SiteCorrection(tiny_network())
    assert method.uncertainty is None
    method(torch.cat(images[:2]))
    assert method.uncertainty.shape == (2, 1, *images[0].shape[2:])
    assert method.last[1]["disagreement"] > 0
    with pytest.raises(ValueError, match="constant"):
        method(torch.ones_like(images[0]))
    assert method.uncertainty is None
    agreeing = torch.zeros(3, 2, 4, 4)
    assert disagreement(agreeing)[1] == 0


def test_settings_name_the_sites_too() -> None:
    settings = SiteCorrection(tiny_network(), SiteStatistics(horizon=7)).settings()
    assert settings["site"] == {"horizon": 7, "caution": 2.0}
    assert settings["trust"] == 2.5
