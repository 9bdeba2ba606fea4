# SPDX-License-Identifier: Apache-2.0
"""What a stream's alignment losses look like, in a few numbers, to see an image that does not belong to it."""

from __future__ import annotations

import math
from typing import Any

from mgipt_monai.utils.state_checks import check_number

__all__ = ["LossMemory"]

RATE = 0.05
"""Share of the newest image once 20 were seen; before, all count alike."""
CLIP = 1.5
"""An image counts as at most so many standard deviations away, so that a few strange ones do not widen the range."""
MIN_SPREAD = 0.05
"""Smallest standard deviation: losses that differ by 5 % are alike."""
MIN_LOSS = 1e-12
"""Keeps the logarithm finite."""
LARGEST_LOG = 710.0
"""No logarithm of a number that a computer holds is larger."""


class LossMemory:
    """Running mean and variance of the logarithm of the losses that a stream has seen.

    All images count alike at first, then the latest 20 or so, so that a lasting change becomes the new normal. After
    the warm-up, an image far from the others is drawn nearer before it counts.

    Args:
        warm_up: images before a distance can be told, at least 2.

    Raises:
        ValueError: at construction, for a shorter warm-up.

    Attributes:
        images: how many losses were taken.
        mean: mean of their logarithms.
        variance: variance of their logarithms.
        latest: the loss of the latest image, None before the first.

    Example:
        >>> memory = LossMemory(warm_up=3)
        >>> for loss in (1.0, 1.2, 0.9, 1.1):
        ...     memory.add(loss)
        >>> memory.distance(1.05) < 1 < 10 < memory.distance(5.0)
        True
    """

    def __init__(self, warm_up: int = 10) -> None:
        if warm_up < 2:
            raise ValueError(f"warm_up must be at least 2 images, two make the smallest spread; got {warm_up}")
        self.warm_up = warm_up
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self.images, self.mean, self.variance = 0, 0.0, 0.0
        self.latest: float | None = None

    def distance(self, loss: float) -> float | None:
        """Return how many standard deviations a loss lies from those seen, on a logarithmic scale.

        None during the warm-up.
        """
        if self.images < self.warm_up:
            return None
        return abs(math.log(max(loss, MIN_LOSS)) - self.mean) / self._spread()

    def add(self, loss: float) -> None:
        """Take the loss of one more image."""
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
        """Return all that is remembered: four plain numbers (``latest`` is None before the first image)."""
        return {"images": self.images, "mean": self.mean, "variance": self.variance, "latest": self.latest}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned.

        Raises:
            ValueError: if it is something else; nothing is changed then.
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
