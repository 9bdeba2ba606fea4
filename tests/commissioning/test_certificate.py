# SPDX-License-Identifier: Apache-2.0
"""Bounds hold as often as they say, on data of known mean."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mgipt_monai.commissioning.certificate import (
    betting_bound,
    choose,
    harm_bound,
    images_needed,
    lower_bound,
    student_bound,
)

REPEATS = 400
ALLOWED = stats.binom.ppf(0.9999, REPEATS, 0.1) / REPEATS  # wrong at 90 % more often than this: one in ten thousand


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("count", [3, 5, 10, 20])
def test_students_bound_covers_normal_differences(count: int) -> None:
    draws = rng().normal(0.02, 0.05, (REPEATS, count))
    assert np.mean([student_bound(row, 0.9) > 0.02 for row in draws]) <= ALLOWED


@pytest.mark.parametrize("count", [10, 40])
@pytest.mark.parametrize("kind", ["rare losses", "coin", "skewed"])
def test_betting_bound_covers_whatever_is_bounded(kind: str, count: int) -> None:
    generator, draws = rng(), []
    for _ in range(REPEATS):
        uniform = generator.random(count)
        draws.append(
            {
                "rare losses": np.where(uniform < 0.9, 0.1, -0.9),
                "coin": np.where(uniform < 0.5, -0.5, 0.5),
                "skewed": np.clip(1 - generator.exponential(1, count), -1, 1) / 2,
            }[kind]
        )
    mean = {"rare losses": 0.0, "coin": 0.0, "skewed": np.mean(np.concatenate(draws))}[kind]
    assert np.mean([betting_bound(row, 0.9) > mean for row in draws]) <= ALLOWED


def test_betting_certifies_a_steady_gain_with_enough_images() -> None:
    gains = rng().normal(0.07, 0.03, 60)
    assert betting_bound(gains[:10], 0.9) < 0 < betting_bound(gains, 0.9) < 0.07


@pytest.mark.parametrize("alike", [0.0, 0.7])
@pytest.mark.parametrize("candidates", [1, 4, 12])
@pytest.mark.parametrize("count", [5, 10])
def test_choice_among_candidates_that_do_nothing_is_rarely_certified(candidates: int, count: int, alike: float) -> None:
    generator, wrong = rng(), 0
    for _ in range(REPEATS):
        shared = generator.normal(0, 1, count)
        gains = alike**0.5 * shared + (1 - alike) ** 0.5 * generator.normal(0, 1, (candidates, count))
        wrong += choose(gains, 0.9).lower > 0
    assert wrong / REPEATS <= 1.4 * ALLOWED  # the multiplier is approximate for few images


def test_choice_finds_the_candidate_that_gains() -> None:
    gains = rng().normal(0, 0.02, (4, 10))
    gains[2] += 0.06
    choice = choose(gains, 0.9)
    assert choice.best == 2
    assert 0 < choice.lower < student_bound(gains[2], 0.9)
    assert choice.lower < choice.expected
    assert choose(gains, 0.9, "betting").lower < 0


def test_one_candidate_is_students_bound_at_least() -> None:
    gains = rng().normal(0.05, 0.02, (1, 8))
    assert choose(gains, 0.9).lower <= student_bound(gains[0], 0.9)


@pytest.mark.parametrize(("harmed", "count"), [(0, 10), (1, 10), (3, 20)])
def test_harm_bound_is_the_share_at_which_so_few_are_unlikely(harmed: int, count: int) -> None:
    assert stats.binom.cdf(harmed, count, harm_bound(harmed, count, 0.9)) == pytest.approx(0.1)
    assert harm_bound(count, count, 0.9) == 1


def test_images_needed_are_those_at_which_the_bound_passes_zero() -> None:
    gains = np.array([0.05, -0.03, 0.04, 0.02, -0.01])
    more = images_needed(gains, 0.9)
    mean, spread = gains.mean(), gains.std(ddof=1)
    low, high = (
        mean - stats.t.ppf(0.9, n - 1) * spread / np.sqrt(n) for n in (len(gains) + more - 1, len(gains) + more)
    )
    assert low <= 0 < high
    assert images_needed(-gains, 0.9) is None
    assert images_needed(np.array([0.05, 0.06, 0.05]), 0.9) == 0


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        lower_bound(np.zeros(3), 1.0)
    with pytest.raises(ValueError, match="student, betting; got 'guess'"):
        lower_bound(np.zeros(3), 0.9, "guess")
    with pytest.raises(ValueError, match="at least one difference"):
        lower_bound(np.zeros(0), 0.9)
    with pytest.raises(ValueError, match=r"in \[-1, 1\]"):
        betting_bound(np.array([2.0]), 0.9)
