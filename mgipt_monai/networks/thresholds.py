# SPDX-License-Identifier: Apache-2.0
"""The thresholds of the guard: which signal each bounds, and what is said where one is crossed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["THRESHOLDS", "Threshold"]


class Threshold(NamedTuple):
    """What the limit of one name means.

    Attributes:
        signal: the signal that it bounds.
        range: lowest and highest value that the limit may have.
        words: what is said where the signal is beyond it, with places for the signal and the limit.
        is_least: whether the signal must be at least the limit; otherwise at most.
        refuses: whether the adapted prediction is then refused; otherwise it is only not learnt from.
    """

    signal: str
    range: tuple[float, float]
    words: str
    is_least: bool = False
    refuses: bool = True

    def check_limit(self, name: str, limit: float | None) -> None:
        """Raise ValueError for a limit out of the range; None is none."""
        lowest, highest = self.range
        if limit is not None and not (lowest <= limit <= highest and math.isfinite(limit)):
            wanted = f"in [{lowest}, {highest}]" if math.isfinite(highest) else f"at least {lowest}"
            raise ValueError(f"{name} must be {wanted}, or None to switch it off; got {limit}")

    def is_crossed(self, limit: float | None, signals: Mapping[str, float]) -> bool:
        """Whether the signal is beyond the limit; not where either is absent."""
        if limit is None or self.signal not in signals:
            return False
        value = signals[self.signal]
        return value < limit if self.is_least else value > limit


THRESHOLDS = {
    "min_agreement": Threshold(
        "agreement",
        (0, 1),
        "the adapted mask agrees with the unadapted one by {:.3g}, less than {:.3g}",
        is_least=True,
    ),
    "max_area_change": Threshold(
        "area_change", (1, math.inf), "a class's area changed by a factor of {:.3g}, more than {:.3g}"
    ),
    "max_inconsistency": Threshold(
        "inconsistency", (0, 1), "the adapted mask changes with brightness and contrast by {:.3g}, more than {:.3g}"
    ),
    "min_loss_drop": Threshold(
        "loss_drop",
        (0, 1),
        "tuning took a share of {:.3g} off the alignment loss, less than {:.3g}",
        is_least=True,
    ),
    "max_prompt": Threshold("prompt", (0, math.inf), "a factor of the prompts is {:.3g} away from 1, more than {:.3g}"),
    "max_distance": Threshold(
        "distance",
        (0, math.inf),
        "the image lies {:.3g} standard deviations from the stream's, more than {:.3g}",
        refuses=False,
    ),
    "max_drift": Threshold(
        "drift",
        (0, math.inf),
        "the global prompts would drift {:.3g} away from 1, more than {:.3g}",
        refuses=False,
    ),
}
