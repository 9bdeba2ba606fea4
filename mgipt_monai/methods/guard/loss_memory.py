# SPDX-License-Identifier: Apache-2.0
"""Running statistics of a stream's alignment losses, to detect images that do not belong to it."""

from __future__ import annotations

import math
from typing import Any

from mgipt_monai.utils.state_checks import check_number, is_whole

__all__ = ["LossMemory"]

RATE = 0.05
"""Weight of the newest image after 20 images; before, all images count equally."""
CLIP = 1.5
"""An image counts as at most this many standard deviations away, so that a few outliers do not widen the range."""
MIN_SPREAD = 0.05
"""Smallest standard deviation: losses that differ by 5 % count as alike."""
MIN_LOSS = 1e-12
"""Keeps the logarithm finite."""
LARGEST_LOG = 710.0
"""Upper bound on the logarithm of a float."""


class LossMemory:
    """Running mean and variance of the logarithm of a stream's losses.

    All images count equally at first, then about the latest 20, so that a lasting change becomes the new normal. After
    the warm-up, an image far from the others is clipped before it counts.

    Args:
        warm_up: number of images before a distance is defined, at least 2.

    Raises:
        ValueError: at construction, for a shorter warm-up.

    Attributes:
        images: number of losses added.
        mean: mean of their logarithms.
        variance: variance of their logarithms.
        latest: the loss of the latest image; None before the first image.

    Example:
        >>> memory = LossMemory(warm_up=3)
        >>> for loss in (1.0, 1.2, 0.9, 1.1):
        ...     memory.add(loss)
        >>> memory.distance(1.05) < 1 < 10 < memory.distance(5.0)
        True
    """

    def __init__(self, warm_up: int = 10) -> None:
        if not is_whole(warm_up) or warm_up < 2:
            raise ValueError(f"warm_up must be a whole number from 2, the fewest images with a spread; got {warm_up!r}")
        self.warm_up = warm_up
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self.images, self.mean, self.variance = 0, 0.0, 0.0
        self.latest: float | None = None

    def distance(self, loss: float) -> float | None:
        """Return the distance of a loss from the mean, in standard deviations of the logarithm; None in the warm-up."""
        if self.images < self.warm_up:
            return None
        return abs(math.log(max(loss, MIN_LOSS)) - self.mean) / self._spread()

    def add(self, loss: float) -> None:
        """Add the loss of one image."""
        value = math.log(max(loss, MIN_LOSS))
        if self.images >= self.warm_up:
            reach = CLIP * self._spread()
            value = min(max(value, self.mean - reach), self.mean + reach)
        self.images += 1
        rate = max(1 / self.images, RATE)
        difference = value - self.mean
        self.mean += rate * difference
        self.variance = (1 - rate) * (self.variance + rate * difference**2)
        self.latest = loss

    def state(self) -> dict[str, Any]:
        """Return the statistics: four plain numbers (``latest`` is None before the first image)."""
        return {"images": self.images, "mean": self.mean, "variance": self.variance, "latest": self.latest}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            ValueError: if a value is invalid; nothing is changed then.
        """
        check_number("images", state["images"], least=0, whole=True)
        check_number("mean", state["mean"], -LARGEST_LOG, LARGEST_LOG)
        check_number("variance", state["variance"], 0, LARGEST_LOG**2)
        if state["latest"] is not None:
            check_number("latest", state["latest"])
        self.images, self.mean, self.variance, self.latest = (
            state[key] for key in ("images", "mean", "variance", "latest")
        )

    def _spread(self) -> float:
        return max(math.sqrt(self.variance), MIN_SPREAD)
