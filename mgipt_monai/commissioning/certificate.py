# SPDX-License-Identifier: Apache-2.0
"""Bounds on a mean gain and on a share of harmed images, from a few paired differences."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from monai.utils import optional_import

stats, _ = optional_import("scipy.stats", descriptor="{}: pip install mgipt_monai[commission]")

__all__ = ["Bound", "Choice", "betting_bound", "choose", "harm_bound", "images_needed", "lower_bound", "student_bound"]

Bound = Literal["student", "betting"]
"""``student``: assumes roughly normal differences; ``betting``: only that they are bounded."""

MEANS, LARGEST_BET = np.linspace(0, 1, 1001), 0.95
ALL_FLIPS = 11


def lower_bound(differences: np.ndarray, confidence: float, bound: Bound = "student") -> float:
    """Return the one-sided lower bound on the mean of the population that the differences were drawn from.

    Args:
        differences: one per image (n,), each in [-1, 1].
        confidence: probability that the bound holds, in (0, 1).
        bound: which one.

    Raises:
        ValueError: for an unknown bound, a confidence out of range or no differences.

    Example:
        >>> gains = np.array([0.05, 0.07, 0.06, 0.08, 0.04])
        >>> round(lower_bound(gains, 0.9), 3), lower_bound(gains, 0.9, "betting") < 0
        (0.049, True)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if bound not in get_args(Bound):
        raise ValueError(f"bound must be one of {', '.join(get_args(Bound))}; got {bound!r}")
    differences = np.asarray(differences, dtype=float)
    if not len(differences):
        raise ValueError("a bound needs at least one difference")
    return (student_bound if bound == "student" else betting_bound)(differences, confidence)


def student_bound(differences: np.ndarray, confidence: float) -> float:
    """Return Student's lower bound on the mean: exact for normal differences; minus infinity for a single one."""
    count = len(differences)
    if count < 2:
        return -math.inf
    spread = differences.std(ddof=1) / math.sqrt(count)
    return float(differences.mean() - stats.t.ppf(confidence, count - 1) * spread)


def betting_bound(differences: np.ndarray, confidence: float) -> float:
    """Return a lower bound that holds for any differences in [-1, 1], whatever their distribution, at any time.

    A gambler bets that the mean is larger than m. Its capital is a supermartingale if it is not, so that it reaches
    ``1 / (1 - confidence)`` with a probability of at most ``1 - confidence``; the bound is the largest m at which it
    does. The bets use only earlier differences. It takes about 45 images to certify a steady gain of seven points.

    Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (JRSS B 2024), Section 4.
    """
    x = (np.asarray(differences, dtype=float) + 1) / 2
    if (x < 0).any() or (x > 1).any():
        raise ValueError("differences must be in [-1, 1]")
    logarithm = math.log(1 / (1 - confidence))
    capital, best = np.zeros_like(MEANS), np.zeros_like(MEANS)
    total, squares = 0.5, 0.25
    for count, value in enumerate(x, start=1):
        # predictable plug-in: mean and variance of the differences before this one, and of a first guess
        variance = squares / count
        bet = math.sqrt(2 * logarithm / (variance * len(x)))
        bets = np.minimum(bet, LARGEST_BET / np.maximum(MEANS, 1e-9))
        capital += np.log1p(bets * (value - MEANS))
        best = np.maximum(best, capital)
        total += value
        squares += (value - total / (count + 1)) ** 2
    rejected = np.flatnonzero(best >= logarithm)
    return float(2 * MEANS[rejected[-1]] - 1) if len(rejected) else -1.0


def harm_bound(harmed: int, count: int, confidence: float) -> float:
    """Return the upper bound on the share of harmed images, by Clopper and Pearson; it holds for any n.

    Example:
        >>> round(harm_bound(0, 10, 0.9), 3)
        0.206
    """
    return 1.0 if harmed >= count else float(stats.beta.ppf(confidence, harmed + 1, count - harmed))


def images_needed(differences: np.ndarray, confidence: float, most: int = 1000) -> int | None:
    """Return how many more images would make Student's bound exceed 0, if mean and spread stay as they are.

    Returns:
        0 if it does already, None if the mean is not positive, or if more than ``most`` images would be needed.

    Example:
        >>> images_needed(np.array([0.05, -0.03, 0.04, 0.02, -0.01]), 0.9)
        6
    """
    mean, count = float(np.mean(differences)), len(differences)
    if mean <= 0 or count < 2:
        return None
    spread = float(np.std(differences, ddof=1))
    totals = np.arange(count, count + most + 1)
    enough = np.flatnonzero(mean > stats.t.ppf(confidence, totals - 1) * spread / np.sqrt(totals))
    return int(enough[0]) if len(enough) else None


@dataclass(frozen=True)
class Choice:
    """A candidate that was chosen by its gains, and what can be said of its gain nevertheless.

    Attributes:
        best: index of the candidate.
        lower: lower bound on its mean gain that holds for whichever candidate is chosen.
        expected: mean gain that choosing like this brings, by choosing once for each group without it.
    """

    best: int
    lower: float
    expected: float


def choose(gains: np.ndarray, confidence: float, bound: Bound = "student") -> Choice:
    """Choose the candidate with the largest lower bound on its gain, and bound its gain in view of the choice.

    The best of many candidates looks better than it is. So the bound holds for all candidates at once: Student's
    quantile is replaced by that of the largest t value of all candidates when the signs of the groups' deviations from
    the candidate's mean are flipped at random (all flips for up to 11 groups). It takes into account that the
    candidates' gains are alike, for which a division of the error among them would pay dearly. ``betting`` divides it.

    Source: max-t with a Rademacher multiplier bootstrap (Romano and Wolf, Econometrica 2005; Chernozhukov et al.,
    Annals of Statistics 2013).

    Args:
        gains: of each candidate on each group of images, (candidates, groups).
        confidence: of the bound, in (0, 1).
        bound: which one.

    Example:
        >>> noise = np.random.default_rng(0).normal(0, 0.02, (30, 10))
        >>> choice = choose(noise, 0.9)
        >>> lower_bound(noise[choice.best], 0.9) > 0, choice.lower > 0  # the best of thirty that do nothing
        (True, False)
    """
    count = gains.shape[1]
    best = _best(gains, confidence)
    if bound == "betting":
        lower = lower_bound(gains[best], 1 - (1 - confidence) / len(gains), bound)
    else:
        quantile = max(_largest_t(gains, confidence), stats.t.ppf(confidence, count - 1))
        lower = float(gains[best].mean() - quantile * gains[best].std(ddof=1) / math.sqrt(count))
    others = ~np.eye(count, dtype=bool)
    picks = [_best(gains[:, keep], confidence) for keep in others]
    return Choice(best, lower, float(np.mean([gains[pick, group] for group, pick in enumerate(picks)])))


def _best(gains: np.ndarray, confidence: float) -> int:
    # Student's bound whichever is certified: it also ranks candidates of which none can be certified
    return int(np.argmax([student_bound(row, confidence) for row in gains]))


def _largest_t(gains: np.ndarray, confidence: float) -> float:
    """Return the quantile of the candidates' largest t value under flips of sign."""
    count = gains.shape[1]
    if count <= ALL_FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (2**ALL_FLIPS, count))
    deviations = gains - gains.mean(axis=1, keepdims=True)
    means = signs @ deviations.T / count
    variances = (np.square(deviations).sum(axis=1) - count * np.square(means)) / (count - 1)
    largest = (means / np.sqrt(np.maximum(variances, 1e-18) / count)).max(axis=1)
    return float(np.quantile(largest, confidence, method="higher"))
