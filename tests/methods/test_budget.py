# SPDX-License-Identifier: Apache-2.0
"""MGIPT within a limited number of forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SliceInferer, SlidingWindowInferer

from mgipt_monai import MGIPT, AdaptiveInferer
from mgipt_monai.methods import Guard
from mgipt_monai.methods.budget import Plan, plan
from mgipt_monai.networks import InstancePrompt
from tests.conftest import same_state, stream, tiny_network

WHOLE = Plan((1, 3, 5), 7, (3, 5, 7))


def spent(mgipt: MGIPT) -> list[int]:
    return [record["forwards"] + record["backwards"] for record in mgipt.last]


GROWTH = ["instance size 5", "instance size 3", "consistency check"]


@pytest.mark.parametrize(
    ("budget", "cost", "dropped"),
    [
        (58, 58, []),
        (57, 42, ["instance size 5"]),
        (41, 24, GROWTH),
        (23, 22, [*GROWTH, "1 of 7 steps"]),
        (12, 12, [*GROWTH, "6 of 7 steps"]),
        (11, 9, [*GROWTH, "instance size 1"]),
        (6, 6, [*GROWTH, "instance size 1", "global size 7"]),
        (4, 3, [*GROWTH, "instance size 1", "global size 7", "global size 5"]),
        (1, 1, [*GROWTH, "instance size 1", "global size 7", "global size 5", "global size 3"]),
    ],
)
def test_parts_are_left_out_in_the_documented_order(budget: int, cost: int, dropped: list[str]) -> None:
    planned = plan(budget, WHOLE)
    assert (planned.cost, planned.lacks(WHOLE)) == (cost, dropped)


@pytest.mark.parametrize("guard", [None, Guard()])
@pytest.mark.parametrize("budget", [2, 3, 5, 8, 9, 10, 12, 17, 19, 29, 35, 41, 59, 1000])
def test_cost_is_known_and_never_exceeded(budget: int, guard: Guard | None) -> None:
    mgipt = MGIPT(tiny_network(), guard=guard, max_forwards=budget)
    most = plan(budget, Plan((1, 3, 5), 7, (3, 5, 7), guarded=guard is not None))
    for image in stream(3):
        mgipt(image)
        assert spent(mgipt)[0] <= most.cost <= budget
        if not most.compares:
            assert spent(mgipt)[0] == most.cost


def test_budget_of_everything_changes_nothing_but_says_so(images: list[torch.Tensor]) -> None:
    limited, plain = MGIPT(tiny_network(), max_forwards=58), MGIPT(tiny_network())
    for image in images:
        assert torch.equal(limited(image), plain(image))
        assert limited.last[0] == {**plain.last[0], "dropped": []}
    assert same_state(limited.adaptation_state(), plain.adaptation_state())


def test_limited_method_is_the_method_of_the_parts_that_are_left(images: list[torch.Tensor]) -> None:
    limited = MGIPT(tiny_network(), max_forwards=22)
    small = MGIPT(tiny_network(), steps=6, instance_sizes=(1,))
    for image in images:
        assert torch.equal(limited(image), small(image))


def test_smallest_budget_is_the_calibrated_prediction(images: list[torch.Tensor]) -> None:
    mgipt = MGIPT(tiny_network(), max_forwards=1)
    expected = mgipt.norms.predict(images[0], "calibrated")
    assert torch.equal(mgipt(images[0]), expected)
    assert spent(mgipt) == [1]
    assert torch.equal(mgipt.adapted_input(images[0]), images[0])
    assert mgipt.last[0]["prompt_norm"] == 0


def test_parts_that_are_given_stay_as_they_are() -> None:
    part = InstancePrompt()
    MGIPT(tiny_network(), instance_prompt=part, max_forwards=12)
    assert (part.sizes, part.steps) == ((1, 3, 5), 7)


@pytest.mark.parametrize(
    ("budget", "guard", "message"),
    [
        (0, None, r"at least 1 \(one for the calibrated prediction\), got 0"),
        (1, Guard(), r"at least 2 \(.* and one without adaptation\), got 1"),
        (30.5, None, "whole number of .*, got 30.5"),
        (True, None, "got True"),
    ],
)
def test_impossible_budget_is_an_error_at_construction(budget: float, guard: Guard | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MGIPT(tiny_network(), guard=guard, max_forwards=budget)


def test_windows_are_refused_and_single_slices_are_not() -> None:
    mgipt = MGIPT(tiny_network(), max_forwards=30)
    with pytest.raises(ValueError, match=r"max_forwards=30 cannot be guaranteed with a SlidingWindowInferer"):
        mgipt.predict_through(SlidingWindowInferer((8, 8)))
    slices = AdaptiveInferer(mgipt, SliceInferer(roi_size=(24, 24), spatial_dim=2), slices="own")
    volume = torch.stack(stream(2), dim=-1)
    assert slices(volume, mgipt.network).shape == (1, 2, 24, 24, 2)
    assert mgipt.last[0]["forwards"] + mgipt.last[0]["backwards"] <= 2 * 30
