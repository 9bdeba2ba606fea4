# SPDX-License-Identifier: Apache-2.0
"""InTEnt: what is integrated, and how entropy weighs it."""

from __future__ import annotations

import math

import pytest
import torch

from mgipt_monai import BatchNormAdaptation
from mgipt_monai.methods import InTEnt
from mgipt_monai.methods.intent import entropy_weights, integrate
from tests.conftest import stream, tiny_network


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_one_blend_is_that_of_bn(weight: float, head: str) -> None:
    image = stream(1)[0]
    logits = InTEnt(tiny_network(), source_weights=[weight], head=head)(image)
    expected = BatchNormAdaptation(tiny_network(), source_weight=weight)(image)
    expected = expected.log_softmax(dim=1) if head == "softmax" else expected
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_probability_lies_among_those_of_the_blends_whatever_their_order(head: str) -> None:
    def probability(logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid() if head == "sigmoid" else logits.softmax(dim=1)

    image, weights = stream(1)[0], (0.0, 0.5, 1.0)
    views = [probability(BatchNormAdaptation(tiny_network(), weight)(image)) for weight in weights]
    fused = probability(InTEnt(tiny_network(), weights, head=head)(image))
    assert (fused >= torch.stack(views).amin(dim=0) - 1e-5).all()
    assert (fused <= torch.stack(views).amax(dim=0) + 1e-5).all()
    turned = probability(InTEnt(tiny_network(), weights[::-1], head=head)(image))
    assert torch.allclose(fused, turned, atol=1e-5)


def test_most_certain_counts_e_times_as_much_as_the_least_and_the_background_does_not_decide() -> None:
    background = torch.full((1, 1, 998), -0.8)
    views = [torch.cat([background, torch.tensor([[[level, level]]])], dim=2) for level in (4.0, 2.0, 0.1)]
    weights = entropy_weights(torch.cat(views), "sigmoid").flatten()
    assert weights.sum().item() == pytest.approx(1)
    assert weights[0] > weights[1] > weights[2]
    assert (weights[0] / weights[2]).item() == pytest.approx(math.e, rel=1e-5)
    # a prediction without structure is weighed by its mean entropy alone
    empty = entropy_weights(torch.cat([views[0], torch.full((1, 1, 1000), -9.0)]), "sigmoid").flatten()
    assert empty[1] > empty[0]


def test_each_structure_of_a_sigmoid_head_has_weights_of_its_own() -> None:
    sure, unsure = torch.tensor([5.0, -5.0]), torch.tensor([0.2, -0.2])
    views = torch.stack([torch.stack([sure, unsure]), torch.stack([unsure, sure])])
    weights = entropy_weights(views, "sigmoid")
    assert weights.shape == (2, 2)
    assert weights[0, 0] == weights[1, 1] > weights[1, 0] == weights[0, 1]
    assert entropy_weights(views, "softmax").shape == (2, 1)


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_logits_stay_finite_and_equal_views_stay_as_they_are(head: str) -> None:
    extreme = torch.tensor([[[300.0, -300.0, 1.0], [-300.0, 300.0, 0.5]]])
    weights = entropy_weights(extreme.repeat(3, 1, 1), head)
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3))
    logits = integrate(extreme.repeat(3, 1, 1), weights, head)
    assert torch.isfinite(logits).all()
    expected = extreme if head == "sigmoid" else extreme.log_softmax(dim=1)
    assert torch.allclose(logits, expected, atol=1e-5)


def test_source_among_the_blends_is_the_plain_network_and_costs_no_more() -> None:
    network, image = tiny_network(), stream(1)[0]
    method = InTEnt(network, source_weights=(0.5, 1))
    method.compare()
    method(image)
    assert torch.equal(method.unadapted, network(image))
    assert method.last[0]["forwards"] == 2
    assert 0.5 < method.last[0]["source_weight"] < 1
    assert method.uncertainty.max() > 0
