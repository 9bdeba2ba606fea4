# SPDX-License-Identifier: Apache-2.0
"""Statistics of values over the images of a stream, and of differences from the baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from monai.utils import optional_import

__all__ = ["interval", "per_case", "shares", "wilcoxon"]

stats, _ = optional_import("scipy.stats", descriptor="{}: pip install mgipt_monai[benchmark]")

RESAMPLES = 2000
MARGIN = 0.01
"""One point of a metric in [0, 1]: a smaller difference counts as neither worse nor better."""


def per_case(values: Sequence[float] | np.ndarray, cases: Sequence[str]) -> np.ndarray:
    """Average the values of each case, in order of appearance, as the rounds of an image are not independent.

    Example:
        >>> per_case([0.5, 0.75, 1.0], ["A", "B", "A"]).tolist()
        [0.75, 0.75]
    """
    _, first, place = np.unique(cases, return_index=True, return_inverse=True)
    means = np.bincount(place, weights=values) / np.bincount(place)
    return means[np.argsort(first)]


def interval(values: np.ndarray, seed: int) -> list[float] | None:
    """Return the 95 % bootstrap interval (percentile) of the mean over cases; None for fewer than two."""
    if len(values) < 2:
        return None
    # not by scipy, without which a stream's summary has an interval too
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return [float(bound) for bound in np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])]


def wilcoxon(differences: np.ndarray) -> float | None:
    """Return the p-value of the two-sided Wilcoxon signed-rank test; None if all differences are zero."""
    return float(stats.wilcoxon(differences).pvalue) if np.any(differences) else None


def shares(differences: np.ndarray) -> tuple[float, float]:
    """Return the shares of images that are more than one point worse, and better, than the baseline."""
    return float((differences < -MARGIN).mean()), float((differences > MARGIN).mean())
