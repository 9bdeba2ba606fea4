# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect

import pytest
import torch

from mgipt_monai.methods import Guard
from mgipt_monai.methods.guard.guard import THRESHOLDS
from mgipt_monai.networks import GlobalPrompts
from tests.conftest import same_state

OFF = dict.fromkeys(THRESHOLDS)
FINE = {"finite": 1.0, "repeated": 0.0, "loss": 0.2, "drift": 0.1}

# threshold, its limit, a signal within, one beyond, what is said, whether the prediction is refused
CASES = [
    ("min_agreement", 0.6, 0.6, 0.41, "the adapted mask agrees with the unadapted one by 0.41, less than 0.6", True),
    ("max_area_change", 2, 2.0, 3.456, "a class's area changed by a factor of 3.46, more than 2", True),
    ("max_inconsistency", 0.1, 0.1, 0.25, "changes with brightness and contrast by 0.25, more than 0.1", True),
    ("min_loss_drop", 0.2, 0.2, -0.1, "reduced the alignment loss by a share of -0.1, less than 0.2", True),
    ("max_prompt", 1.5, 1.5, 1.6, "a factor of the prompts is 1.6 away from 1, more than 1.5", True),
    ("max_distance", 4, 4.0, 5.5, "the image is 5.5 standard deviations from the stream's mean, more than 4", False),
    ("max_drift", 1, 1.0, 1.2, "the global prompts would drift 1.2 away from 1, more than 1", False),
]


@pytest.mark.parametrize(("name", "limit", "within", "beyond", "words", "refuses"), CASES, ids=[c[0] for c in CASES])
def test_each_threshold_alone(name: str, limit: float, within: float, beyond: float, words: str, refuses: bool) -> None:
    signal = THRESHOLDS[name].signal
    guard = Guard(**{**OFF, name: limit})
    verdict = guard.judge({**FINE, signal: beyond})
    assert (verdict.accept, verdict.learn, len(verdict.reasons)) == (not refuses, False, 1)
    assert words in verdict.reasons[0]
    for accepting, signals in (
        (guard, {**FINE, signal: within}),
        (guard, FINE),
        (Guard(**OFF), {**FINE, signal: beyond}),
    ):
        verdict = accepting.judge(signals)
        assert (verdict.accept, verdict.learn, verdict.reasons) == (True, True, [])


def test_every_threshold_is_tested_and_can_be_set() -> None:
    assert [case[0] for case in CASES] == list(THRESHOLDS) == list(inspect.signature(Guard).parameters)[:-1]


def test_all_reasons_are_given_and_those_that_refuse_come_first() -> None:
    guard = Guard(**{name: limit for name, limit, *_ in CASES})
    signals = {**FINE, **{THRESHOLDS[name].signal: beyond for name, _, _, beyond, *_ in CASES}, "repeated": 1.0}
    verdict = guard.judge(signals)
    assert len(verdict.reasons) == len(CASES) + 1
    assert "agrees" in verdict.reasons[0]
    assert not verdict.accept


def test_repeated_image_is_accepted_and_not_learnt() -> None:
    guard = Guard(**OFF)
    assert guard.compare(0.25)["repeated"] == 0
    settle(guard, 0.25)
    verdict = guard.judge({**FINE, **guard.compare(0.25)})
    assert (verdict.accept, verdict.learn, verdict.reasons) == (True, False, ["the image repeats the previous one"])
    assert guard.compare(0.26)["repeated"] == 0


def test_prediction_that_is_not_finite_is_refused_by_any_guard() -> None:
    verdict = Guard(**OFF).judge({"finite": 0.0, "repeated": 0.0, "loss": 0.2})
    assert (verdict.accept, verdict.learn, verdict.reasons) == (False, False, ["the adapted prediction is not finite"])


def test_distance_counts_after_the_warm_up() -> None:
    guard = Guard(**{**OFF, "max_distance": 3}, warm_up=4)
    for loss in (0.2, 0.25, 0.18, 0.22):
        assert "distance" not in guard.compare(9.0)
        settle(guard, loss)
    assert guard.judge({**FINE, **guard.compare(0.21)}).learn
    assert not guard.judge({**FINE, **guard.compare(9.0)}).learn


def prompts_at(value: float) -> GlobalPrompts:
    prompts = GlobalPrompts(sizes=(1, 3))
    both = [torch.full((1, 2, side, side), value) for side in prompts.sizes]
    prompts.load_adaptation_state({"students": both, "teachers": both})
    return prompts


def settle(guard: Guard, loss: float = 0.2, before: float = 1.0, after: float = 1.0, **signals: float) -> GlobalPrompts:
    """Let a guard settle an image whose step took all factors from one value to another."""
    prompts = prompts_at(after)
    signals = {**FINE, **guard.compare(loss), "drift": abs(after - 1), **signals}
    guard.settle(guard.judge(signals), signals, prompts, prompts_at(before).adaptation_state())
    return prompts


def test_step_is_kept_or_undone() -> None:
    guard = Guard(**{**OFF, "min_agreement": 0.6})
    for agreement, expected in ((0.9, 1.25), (0.3, 1.125)):
        prompts = settle(guard, before=1.125, after=1.25, agreement=agreement, loss=agreement)
        assert same_state(prompts.adaptation_state(), prompts_at(expected).adaptation_state())


def test_drift_resets_to_the_last_good_prompts_within_half_the_range() -> None:
    guard = Guard(**{**OFF, "min_agreement": 0.6, "max_drift": 1.0})
    assert settle(guard, loss=0.1, before=1.9, after=2.1).teachers == []  # nothing good yet: from the start
    settle(guard, loss=0.2, before=1.25, after=1.5)
    settle(guard, loss=0.3, before=1.5, after=0.75, agreement=0.1)  # refused: not good
    settle(guard, loss=0.4, before=1.5, after=1.75)  # kept, but beyond half the range
    prompts = settle(guard, loss=0.5, before=1.75, after=2.125)
    assert same_state(prompts.adaptation_state(), prompts_at(1.5).adaptation_state())


def test_repeated_image_never_moves_the_prompts() -> None:
    guard = Guard(**{**OFF, "max_drift": 1.0})
    settle(guard, loss=0.2, before=1.9, after=1.95)
    prompts = settle(guard, loss=0.2, before=1.95, after=2.1)
    assert same_state(prompts.adaptation_state(), prompts_at(1.95).adaptation_state())
    assert guard.memory.images == 1


def test_state_is_plain_and_goes_on_alike() -> None:
    guard = Guard(max_drift=1.0)
    settle(guard, after=1.25, loss=0.3)
    state = guard.adaptation_state()
    assert set(state) == {"images", "mean", "variance", "latest", "students", "teachers"}
    other = Guard(max_drift=1.0)
    other.load_adaptation_state(state, GlobalPrompts(sizes=(1, 3)))
    assert same_state(other.adaptation_state(), state)
    state["teachers"][0].zero_()
    assert guard.good["teachers"][0][0, 0, 0, 0] == 1.25
    guard.reset()
    assert same_state(guard.adaptation_state(), Guard().adaptation_state())


def test_wrong_states_are_refused_and_change_nothing() -> None:
    guard = Guard(max_drift=1.0)
    settle(guard, after=1.25)
    good = guard.adaptation_state()
    cases = [
        ({"images": 3}, (1, 3), "lacks latest, mean, students"),
        ({**good, "variance": -1.0}, (1, 3), "variance must be a number from 0"),
        (good, (3, 5), r"sizes \(1, 3\)"),
    ]
    for state, sizes, message in cases:
        with pytest.raises(ValueError, match=message):
            guard.load_adaptation_state(state, GlobalPrompts(sizes))
        assert same_state(guard.adaptation_state(), good)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_agreement": 1.5}, r"min_agreement must be in \[0, 1\], or None to switch it off; got 1.5"),
        ({"max_area_change": 0.5}, "max_area_change must be at least 1.*got 0.5"),
        ({"max_inconsistency": -0.1}, "got -0.1"),
        ({"min_loss_drop": float("nan")}, "got nan"),
        ({"max_prompt": -1}, "got -1"),
        ({"max_distance": float("inf")}, "max_distance must be at least 0, or None to switch it off; got inf"),
        ({"max_drift": -2}, "got -2"),
        ({"max_drift": 2, "max_prompt": 1}, r"max_drift \(2\) would never be reached, since max_prompt \(1\)"),
        ({"warm_up": 1}, "got 1"),
    ],
)
def test_wrong_settings_fail_at_construction_with_the_value(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**settings)
