# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from mgipt_monai.methods.guard.loss_memory import CLIP, MIN_SPREAD, LossMemory


def remembering(losses: list[float], warm_up: int = 10) -> LossMemory:
    memory = LossMemory(warm_up)
    for loss in losses:
        memory.add(loss)
    return memory


def losses(count: int, spread: float = 0.3, mean: float = -2.0, seed: int = 0) -> list[float]:
    return np.exp(np.random.default_rng(seed).normal(mean, spread, count)).tolist()


def test_first_images_give_their_mean_and_variance() -> None:
    seen = losses(10)
    memory = remembering(seen)
    assert memory.mean == pytest.approx(np.log(seen).mean())
    assert memory.variance == pytest.approx(np.log(seen).var())
    assert (memory.images, memory.latest) == (10, seen[-1])


def test_distance_is_in_standard_deviations_of_the_logarithm_either_way() -> None:
    memory = remembering(losses(10))
    for sign in (-1, 1):
        loss = math.exp(memory.mean + sign * 3 * math.sqrt(memory.variance))
        assert memory.distance(loss) == pytest.approx(3)


def test_no_distance_before_the_warm_up_ends() -> None:
    assert remembering(losses(9)).distance(1.0) is None
    assert remembering(losses(10)).distance(1.0) is not None


def test_losses_that_hardly_differ_are_alike() -> None:
    memory = remembering([0.2] * 20)
    assert memory.distance(0.2 * math.exp(2 * MIN_SPREAD)) == pytest.approx(2)


def test_a_strange_image_moves_the_memory_no_more_than_the_clip() -> None:
    one, other = remembering(losses(40)), remembering(losses(40))
    one.add(math.exp(one.mean + CLIP * math.sqrt(one.variance)))
    other.add(1e6)
    assert other.mean == pytest.approx(one.mean)
    assert other.variance == pytest.approx(one.variance)


def test_every_fifth_image_being_strange_does_not_become_normal() -> None:
    memory = remembering(losses(20))
    for i, loss in enumerate(losses(500, seed=1)):
        if i % 5:
            memory.add(loss)
        else:
            assert memory.distance(10.0) > 6
            memory.add(10.0)


def test_a_lasting_change_becomes_normal() -> None:
    memory = remembering(losses(50))
    assert memory.distance(2.0) > 6
    for loss in losses(60, mean=math.log(2.0), seed=1):
        memory.add(loss)
    assert memory.distance(2.0) < 1


def test_zero_loss_is_taken() -> None:
    assert math.isfinite(remembering([0.0, 1.0], warm_up=2).distance(0.0))


def test_state_goes_on_alike_and_reset_starts_anew() -> None:
    seen = losses(30)
    whole = remembering(seen)
    half = remembering(seen[:12])
    other = LossMemory()
    other.load_state(half.state())
    for loss in seen[12:]:
        other.add(loss)
    assert other.state() == whole.state()
    other.reset()
    assert other.state() == LossMemory().state()


@pytest.mark.parametrize("wrong", [{"mean": math.nan}, {"variance": -1.0}, {"images": -1}, {"latest": math.inf}])
def test_unusable_state_is_refused_and_changes_nothing(wrong: dict) -> None:
    memory = remembering(losses(3))
    before = memory.state()
    with pytest.raises(ValueError, match=f"the state's {next(iter(wrong))} must be"):
        memory.load_state({**before, **wrong})
    assert memory.state() == before


def test_too_short_a_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from 2.*got 1"):
        LossMemory(1)
