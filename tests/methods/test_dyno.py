# SPDX-License-Identifier: Apache-2.0
"""DyNo: three domains, the weights of their distances, and the mean that is kept between images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mgipt_monai.methods import DyNo
from tests.conftest import stream, tiny_network


def lone_norm(mean: float = 0.5, variance: float = 0.1) -> nn.Module:
    """A batch norm of three channels, whose input is the image itself."""
    network = nn.Sequential(nn.BatchNorm2d(3)).eval()
    network[0].running_mean.fill_(mean)
    network[0].running_var.fill_(variance)
    return network


def statistics(image: torch.Tensor) -> torch.Tensor:
    return torch.stack([image.mean((0, 2, 3)), image.var((0, 2, 3))])


def normalised(image: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    return (image - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + 1e-5).sqrt()


def test_stream_is_normalised_as_written_out_image_by_image() -> None:
    method, halves = DyNo(lone_norm()), []
    source = torch.tensor([[0.5] * 3, [0.1] * 3])
    for image in stream(4):
        own = statistics(image)
        halves.append((source + own) / 2)
        before = torch.stack(halves[:-1] or halves).mean(dim=0)
        to_source, to_before = ((own - other).abs().sum(dim=0) for other in (source, before))
        weight = to_before.exp() / (to_before.exp() + to_source.exp())
        expected = weight * source + (1 - weight) / 2 * (torch.stack(halves).mean(dim=0) + own)
        assert torch.allclose(method(image), normalised(image, *expected), atol=1e-5)
        assert math.isclose(method.last[0]["source_weight"], weight.mean().item(), abs_tol=1e-6)
        assert 0 < method.last[0]["source_weight"] < 1


def test_image_with_the_sources_statistics_is_predicted_as_the_source() -> None:
    image = stream(1)[0]
    network = lone_norm()
    network[0].running_mean.copy_(statistics(image)[0])
    network[0].running_var.copy_(statistics(image)[1])
    method = DyNo(network)
    assert torch.allclose(method(image), network(image), atol=1e-5)
    assert method.last[0]["source_weight"] == pytest.approx(0.5)


def test_farther_images_leave_the_source_less_weight_once_the_stream_is_known() -> None:
    weights = []
    for offset in (0.0, 1.0, 4.0):
        method = DyNo(lone_norm())
        for image in stream(3):
            method(image + offset)
        weights.append(method.last[0]["source_weight"])
    assert weights[0] > weights[1] > weights[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["between"].update({"7": torch.zeros(2, 6)}), "layer '7' that is not adapted"),
        (lambda s: s["between"].update({"1": torch.zeros(2, 5)}), r"the shape \(2, 5\), not \(2, 6\)"),
        (lambda s: s["between"]["1"].fill_(math.nan), "statistics of 1 are not finite"),
        (lambda s: s["between"]["1"].fill_(-1), "statistics of 1 have a negative variance"),
        (lambda s: s["between"].clear(), "1 images but statistics of 0 layers"),
        (lambda s: s.update(between=None), "between"),
        (lambda s: s.update(count=-1), "count"),
    ],
)
def test_wrong_states_are_refused_and_change_nothing(change: Callable[[dict], object], message: str) -> None:
    image = stream(1)[0]
    method, untouched = DyNo(tiny_network()), DyNo(tiny_network())
    for each in (method, untouched):
        each(image)
    state = copy.deepcopy(method.adaptation_state())
    change(state)
    with pytest.raises(ValueError, match=message):
        method.load_adaptation_state(state)
    assert torch.equal(method(image + 0.1), untouched(image + 0.1))
