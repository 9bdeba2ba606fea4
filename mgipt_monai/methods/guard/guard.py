# SPDX-License-Identifier: Apache-2.0
"""The guard's decision: which signal each threshold bounds, what is refused, and what is learnt from an image."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mgipt_monai.methods.guard.loss_memory import LossMemory
from mgipt_monai.utils.state_checks import check_keys

__all__ = ["THRESHOLDS", "Guard", "Lasting", "Threshold", "Verdict", "area_change"]

SMALL_SHARE = 1e-4
"""Share of the image that is added to an area, so that an empty class has a ratio."""


class Threshold(NamedTuple):
    """The meaning of one limit.

    Attributes:
        signal: the signal that it bounds.
        range: smallest and largest allowed value of the limit.
        words: the reason given when the signal crosses the limit, with placeholders for signal and limit.
        is_least: whether the limit is a minimum; otherwise it is a maximum.
        refuses: whether crossing it refuses the adapted prediction; otherwise it only prevents learning.
    """

    signal: str
    range: tuple[float, float]
    words: str
    is_least: bool = False
    refuses: bool = True

    def check_limit(self, name: str, limit: float | None) -> None:
        """Raise ValueError for a limit that is no number or out of range; None disables it."""
        lowest, highest = self.range
        is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (is_number and lowest <= limit <= min(highest, sys.float_info.max)):
            wanted = f"in [{lowest}, {highest}]" if math.isfinite(highest) else f"at least {lowest}"
            raise ValueError(f"{name} must be {wanted}, or None to switch it off; got {limit!r}")

    def is_crossed(self, limit: float | None, signals: Mapping[str, float]) -> bool:
        """Whether the signal crosses the limit; False if either is missing."""
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
        "tuning reduced the alignment loss by a share of {:.3g}, less than {:.3g}",
        is_least=True,
    ),
    "max_prompt": Threshold("prompt", (0, math.inf), "a factor of the prompts is {:.3g} away from 1, more than {:.3g}"),
    "max_distance": Threshold(
        "distance",
        (0, math.inf),
        "the image is {:.3g} standard deviations from the stream's mean, more than {:.3g}",
        refuses=False,
    ),
    "max_drift": Threshold(
        "drift",
        (0, math.inf),
        "the global prompts would drift {:.3g} away from 1, more than {:.3g}",
        refuses=False,
    ),
}


class Lasting(Protocol):
    """What a method keeps between images and the guard may restore."""

    def adaptation_state(self) -> dict[str, Any]:
        """Return a copy of it."""
        ...

    def load_adaptation_state(self, state: dict[str, Any]) -> None:
        """Restore it."""
        ...

    def check_adaptation_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless ``state`` fits."""
        ...


@dataclass
class Verdict:
    """The guard's decision on one image.

    Attributes:
        accept: whether the adapted prediction is used; otherwise the unadapted one is.
        learn: whether the method keeps what it learnt from the image.
        reasons: why not, with value and threshold; empty if both are granted.
    """

    accept: bool
    learn: bool
    reasons: list[str] = field(default_factory=list)


class Guard(nn.Module):
    """Judges each image by label-free signals and thresholds; None disables a threshold.

    If the adapted prediction is refused, the unadapted one is used, and the global prompts are restored to before the
    image, so that they learn nothing from it. Three more conditions prevent learning: the image is far from the
    stream's others, it repeats the previous image, or its step moves the global prompts out of range. The guard's own
    state has constant size and no image content: mean and variance of the log loss, the latest loss, and the last good
    global prompts.

    Args:
        min_agreement: smallest Dice between the adapted and the unadapted mask, over all classes at once, in [0, 1].
        max_area_change: largest ratio, at least 1, by which the area of a class may grow or shrink. A class that
            disappears or appears changes by a large ratio.
        max_inconsistency: largest early-stop consistency score of the chosen prompt size, in [0, 1]; 0 is full
            agreement between the image and its jittered view. Not judged if sizes are not compared.
        min_loss_drop: smallest share by which tuning the instance prompt must reduce the alignment loss, in [0, 1]. Not
            judged without an instance prompt.
        max_prompt: largest distance from 1 of a factor in the instance prompt or the global prompts' teachers.
        max_distance: largest distance of the unadapted image's alignment loss from the mean of the stream, in standard
            deviations of its logarithm; beyond it nothing is learnt from the image.
        max_drift: largest distance from 1 of a factor in the global prompts' teachers; beyond it they are reset to the
            last ones learnt within half of it. At most ``max_prompt``.
        warm_up: number of images before ``max_distance`` applies, at least 2.

    Raises:
        ValueError: at construction, for a threshold out of range, or ``max_drift`` above ``max_prompt``.

    Attributes:
        memory: statistics of the stream's losses.
        good: what the method kept after the last good image; until then, what it keeps before the first image.

    Example:
        >>> guard = Guard(min_agreement=0.6)
        >>> guard.judge({"finite": 1.0, "repeated": 0.0, "agreement": 0.41}).reasons
        ['the adapted mask agrees with the unadapted one by 0.41, less than 0.6']
    """

    def __init__(
        self,
        min_agreement: float | None = 0.9,
        max_area_change: float | None = 1.1,
        max_inconsistency: float | None = 0.2,
        min_loss_drop: float | None = 0.0,
        max_prompt: float | None = 1.5,
        max_distance: float | None = 4.0,
        max_drift: float | None = 1.0,
        warm_up: int = 10,
    ) -> None:
        super().__init__()
        self.min_agreement, self.max_area_change = min_agreement, max_area_change
        self.max_inconsistency, self.min_loss_drop, self.max_prompt = max_inconsistency, min_loss_drop, max_prompt
        self.max_distance, self.max_drift, self.warm_up = max_distance, max_drift, warm_up
        for name, threshold in THRESHOLDS.items():
            threshold.check_limit(name, getattr(self, name))
        if max_drift is not None and max_prompt is not None and max_drift > max_prompt:
            raise ValueError(
                f"max_drift ({max_drift}) would never be reached, since max_prompt ({max_prompt}) refuses such images: "
                "set it to at most max_prompt"
            )
        self.memory = LossMemory(warm_up)
        self.reset()

    def extra_repr(self) -> str:
        """Return the thresholds and the warm-up."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in [*THRESHOLDS, "warm_up"])

    def reset(self, start: dict[str, Any] | None = None) -> None:
        """Forget the stream.

        Args:
            start: what the guarded method keeps before its first image, which counts as good; None stands for empty
                global prompts.
        """
        self.memory.reset()
        self.good: dict[str, Any] = {"students": [], "teachers": []} if start is None else start

    def compare(self, loss: float) -> dict[str, float]:
        """Return the signals of an image with this unadapted alignment loss that depend on the stream's losses.

        ``repeated`` is 1 if the loss is exactly that of the previous image, else 0; ``distance`` is left out during the
        warm-up.
        """
        distance = self.memory.distance(loss)
        signals = {"loss": loss, "repeated": float(loss == self.memory.latest)}
        return signals if distance is None else {**signals, "distance": distance}

    def judge(self, signals: Mapping[str, float]) -> Verdict:
        """Judge an image by its signals; a threshold without a signal is ignored.

        Args:
            signals: ``finite`` and ``repeated`` (1 or 0), and any of ``agreement``, ``area_change``, ``inconsistency``,
                ``loss_drop``, ``prompt``, ``distance`` and ``drift``, defined as in the arguments of the class.
        """
        if not signals["finite"]:
            return Verdict(accept=False, learn=False, reasons=["the adapted prediction is not finite"])
        crossed = [name for name in THRESHOLDS if self._is_crossed(name, signals)]
        reasons = [
            THRESHOLDS[name].words.format(signals[THRESHOLDS[name].signal], getattr(self, name)) for name in crossed
        ]
        if signals["repeated"]:
            reasons.append("the image repeats the previous one")
        accept = not any(THRESHOLDS[name].refuses for name in crossed)
        return Verdict(accept, learn=not reasons, reasons=reasons)

    def settle(self, verdict: Verdict, signals: Mapping[str, float], lasting: Lasting, before: dict[str, Any]) -> None:
        """Keep or undo what the method learnt from the image, and remember the image's loss.

        Args:
            verdict: the result of :meth:`judge`.
            signals: the image's signals.
            lasting: what the method keeps between images, after the image (MGIPT: its global prompts).
            before: its state before the image.
        """
        if self._is_crossed("max_drift", signals) and not signals["repeated"]:
            lasting.load_adaptation_state(self.good)
        elif not verdict.learn:
            lasting.load_adaptation_state(before)
        elif self.max_drift is not None and signals.get("drift", math.inf) <= self.max_drift / 2:
            self.good = lasting.adaptation_state()
        if not signals["repeated"]:
            self.memory.add(signals["loss"])

    def adaptation_state(self) -> dict[str, Any]:
        """Return the guard's state: plain numbers, and copies of the last good global prompts."""
        return {**self.memory.state(), **copy.deepcopy(self.good)}

    def load_adaptation_state(self, state: dict[str, Any], lasting: Lasting) -> None:
        """Restore what :meth:`adaptation_state` returned.

        Args:
            state: the state.
            lasting: what the method keeps between images, which the state must fit.

        Raises:
            ValueError: if it does not fit; nothing is changed then.
        """
        own = copy.deepcopy(lasting.adaptation_state())
        check_keys("guard's state", state, {*self.memory.state(), *own})
        lasting.check_adaptation_state(state)
        self.memory.load_state(state)
        # as the method takes it up, without what it passes over
        lasting.load_adaptation_state({key: state[key] for key in own})
        self.good = copy.deepcopy(lasting.adaptation_state())
        lasting.load_adaptation_state(own)

    def _is_crossed(self, name: str, signals: Mapping[str, float]) -> bool:
        return THRESHOLDS[name].is_crossed(getattr(self, name), signals)


def area_change(masks: Tensor, others: Tensor) -> float:
    """Return the largest ratio, at least 1, between the areas of a class in two predictions of one image.

    A ten-thousandth of the image is added to both areas: a class that disappears or appears gives a large ratio, a few
    voxels of a nearly empty class do not.

    Args:
        masks: of 0 and 1, (1, K, \\*spatial).
        others: same shape.

    Example:
        >>> whole, half = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
        >>> half[:, :, 4:] = 0
        >>> round(area_change(whole, half), 2)
        2.0
    """
    one, other = (each.flatten(2).mean(dim=2) + SMALL_SHARE for each in (masks, others))
    return torch.maximum(one / other, other / one).max().item()
