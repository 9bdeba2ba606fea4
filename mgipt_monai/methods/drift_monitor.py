# SPDX-License-Identifier: Apache-2.0
"""An alarm for drift after commissioning, whose rate of false alarms is stated and holds at any time."""

from __future__ import annotations

import logging
import math
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from mgipt_monai.utils.state_checks import check_keys, check_number, is_whole

__all__ = ["DriftMonitor"]

logger = logging.getLogger(__name__)

FEWEST = 2
"""Fewest reference values with which a signal is watched."""
FIRST_SHIFTS = (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0)
LATER_SHIFTS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
LATER_SPREAD = 1.5
"""What is bet on, in standard deviations: shifts from the first image on, shifts from a later one on, more spread."""
PATIENCE = 20.0
"""Images that a change from a later image on is expected after; the stakes on image j fall like 1 / j^2 beyond."""
MOST = 1e200
"""Keeps evidence finite; less evidence than there is causes no false alarm."""
HALVINGS = 16
ROOT = math.sqrt(0.5)
NORMAL = NormalDist()


class DriftMonitor:
    """Watches whether later images are like the labelled images of a site, by any numbers that describe an image.

    Each value of a signal is ranked among those before it, the reference's included. If all images are exchangeable,
    such as independent images of one site, the ranks are independent and all equally likely, whatever the signal's
    distribution (conformal prediction; the order of equal values is drawn at random). A test martingale bets against
    that: its value is the factor by which a gambler's money has grown who expects ranks to become low, high or
    extreme. Half of the money bets that the images differ from the reference from the first one on, where every
    deviating image also makes the next one look more usual. The other half is split over all later images as the
    start of a change. No bet has a positive expected gain while the images are exchangeable. So the money of a signal
    ever grows by ``signals / false_alarms`` with a probability of at most ``false_alarms / signals`` (Ville's
    inequality), and any signal's with a probability of at most ``false_alarms``, over a stream of any length. The alarm
    stays on until :meth:`reset`. It is no measure of harm: a harmless change raises it too.

    The signals are summed up by their largest evidence, not by their mean: each martingale is one only for whoever sees
    its own signal alone, so that their mean has no such guarantee.

    What the guarantee needs:

    - Images of a site in random order, or at least without trend. Visits of one patient in a row, or days that differ,
      are a dependence that the alarm is right to report, as the certificate assumes that there is none.
    - Reference images that are a random sample of the site, not its extremes.
    - Signals that depend on the image alone. One from a method that still learns drifts with the method.

    An image without a signal (absent or NaN) leaves that signal as it is. Memory is constant: beyond ``horizon`` values
    a signal's further ones are only counted between those kept, with which ranks stay exactly uniform (Polya's urn).

    Sources: V. Vovk, A. Gammerman and G. Shafer, Algorithmic Learning in a Random World, 2022, part III (conformal test
    martingales); J. Shin, A. Ramdas and A. Rinaldo, E-detectors: a nonparametric framework for sequential change
    detection, 2023 (mixtures over the time of a change); Y. J. Choe and A. Ramdas, Combining evidence across
    filtrations, 2024 (why means of several need care).

    Args:
        reference: a signal's name to its values on the labelled images. NaN and None are left out, and a signal with
            fewer than two values is not watched.
        false_alarms: probability of an alarm at any time without drift, above 0 and below 1.
        horizon: number of values that are kept per signal.
        seed: of the draws, which depend on the number of images alone.

    Raises:
        ValueError: at construction, for a setting out of range, or if there is no signal to watch.

    Attributes:
        images: number of images observed.
        alarm: name of the signal that raised the alarm; None without an alarm.

    Example:
        >>> monitor = DriftMonitor({"brightness": [0.41, 0.45, 0.39, 0.43, 0.40, 0.44, 0.42, 0.38]})
        >>> monitor.observe({"brightness": 0.425})["alarm"]
        False
        >>> seen = [monitor.observe({"brightness": 0.6 + image / 1000}) for image in range(12)]
        >>> [number for number, one in enumerate(seen, start=1) if one["alarm"]][0]
        4
        >>> monitor.alarm
        'brightness'
    """

    def __init__(
        self,
        reference: Mapping[str, Sequence[float | None]],
        false_alarms: float = 0.05,
        horizon: int = 200,
        seed: int = 0,
    ) -> None:
        if not 0 < false_alarms < 1:
            raise ValueError(f"false_alarms must be a probability above 0 and below 1, got {false_alarms}")
        if not is_whole(horizon) or horizon < FEWEST:
            raise ValueError(f"horizon must be a whole number of values from {FEWEST}, got {horizon}")
        if not is_whole(seed) or seed < 0:
            raise ValueError(f"seed must be a whole number from 0, got {seed}")
        finite = {
            name: [float(value) for value in values if value is not None and math.isfinite(value)]
            for name, values in sorted(reference.items())
        }
        self.reference = {name: values for name, values in finite.items() if len(values) >= FEWEST}
        if not self.reference:
            raise ValueError(f"no signal has {FEWEST} reference values: give those of all labelled images")
        if (longest := max(map(len, self.reference.values()))) > horizon:
            raise ValueError(f"horizon must be at least the {longest} reference values, got {horizon}")
        self.false_alarms, self.horizon, self.seed = float(false_alarms), int(horizon), int(seed)
        self.reset()

    def reset(self) -> None:
        """Forget all images but the reference, and end the alarm."""
        self.images = 0
        self.alarm: str | None = None
        draws = self._draws(max(map(len, self.reference.values())))
        self._signals = {
            name: _Signal(list(zip(values, ties.tolist(), strict=False)))
            for (name, values), ties in zip(self.reference.items(), draws, strict=True)
        }

    @property
    def limit(self) -> float:
        """Decimal logarithm of the evidence that raises the alarm, ``1 / false_alarms``."""
        return -math.log10(self.false_alarms)

    def observe(self, signals: Mapping[str, float | None]) -> dict[str, Any]:
        """Add an image and return what its record says.

        Args:
            signals: a signal's name to the image's value. Those without a reference are left out.

        Returns:
            ``signals``, the values that were watched; ``p``, for each the share of images, so far, that are at least as
            unusual (low or high); ``evidence_against``, the decimal logarithm of the evidence that the images have
            changed; ``limit``, where that raises the alarm; ``alarm``, whether it is on; and ``signal``, which raised
            it, or has the most evidence so far.
        """
        self.images += 1
        watched, places = {}, {}
        for (name, signal), tie in zip(self._signals.items(), self._draws(1)[:, 0].tolist(), strict=True):
            value = signals.get(name)
            if value is not None and math.isfinite(value):
                watched[name] = float(value)
                low, high = signal.add(float(value), tie, self.horizon)
                places[name] = min(1.0, 2 * high, 2 * (1 - low))
        strongest = max(self._signals, key=lambda name: self._signals[name].evidence)
        evidence = math.log10(self._signals[strongest].evidence / len(self._signals))
        if self.alarm is None and evidence >= self.limit:
            self.alarm = strongest
            logger.warning("the images have changed since commissioning, by their %s", strongest)
        return {
            "signals": watched,
            "p": places,
            "evidence_against": evidence,
            "limit": self.limit,
            "alarm": self.alarm is not None,
            "signal": self.alarm or strongest,
        }

    def adaptation_state(self) -> dict[str, Any]:
        """Return the state: plain numbers, up to ``horizon`` values of each signal among them."""
        signals = {name: signal.state() for name, signal in self._signals.items()}
        return {"images": self.images, "alarm": self.alarm, "signals": signals}

    def load_adaptation_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`adaptation_state` returned.

        Raises:
            ValueError: if it does not fit, such as that of another reference; nothing is changed then.
        """
        check_keys("state of the drift monitor", state, {"images", "alarm", "signals"})
        check_number("images", state["images"], least=0, whole=True)
        check_keys("signals", state["signals"], set(self.reference))
        names = [*self.reference, None]
        if len(state["signals"]) != len(self.reference) or state["alarm"] not in names:
            raise ValueError(f"the state has other signals than {', '.join(self.reference)}")
        loaded = {
            name: _Signal.loaded(name, values, state["signals"][name], state["images"], self.horizon)
            for name, values in self.reference.items()
        }
        self.images, self.alarm, self._signals = state["images"], state["alarm"], loaded

    def _draws(self, count: int) -> np.ndarray:
        """Return uniform numbers (signals, count) of the current image."""
        return np.random.default_rng([self.seed, self.images]).random((len(self.reference), count))


class _Signal:
    """The values of one signal, and the money that bets on their ranks have made.

    Args:
        bag: reference values, each with the number that decides its order among equal ones.
    """

    def __init__(self, bag: Sequence[tuple[float, float]]) -> None:
        self.bag, self.counts = sorted(bag), [0] * (len(bag) + 1)
        self.references, self.seen = len(bag), 0
        self.first = [1.0] * len(FIRST_SHIFTS)
        self.later = [0.0] * (len(LATER_SHIFTS) + 1)

    @property
    def evidence(self) -> float:
        """The factor by which the money has grown."""
        unused = PATIENCE / (self.seen + PATIENCE)
        return (_mean(self.first) + _mean(self.later) + unused) / 2

    def add(self, value: float, tie: float, horizon: int) -> tuple[float, float]:
        """Bet on a value's rank among those before, and add it.

        Returns:
            The rank's part of (0, 1): the shares of values before that part and up to its end, the value included.
        """
        at = bisect(self.bag, (value, tie))
        below, count = at + sum(self.counts[:at]), self.references + self.seen + 1
        low, high = below / count, (below + 1 + self.counts[at]) / count
        self._bet(low, high)
        if len(self.bag) < horizon:
            self.bag.insert(at, (value, tie))
            self.counts.insert(at, 0)
        else:
            self.counts[at] += 1
        self.seen += 1
        return low, high

    def _bet(self, low: float, high: float) -> None:
        for i, shift in enumerate(FIRST_SHIFTS):
            before, upto = (newer_share(rank, shift, self.references, self.seen) for rank in (low, high))
            self.first[i] = min(MOST, self.first[i] * max(0.0, upto - before) / (high - low))
        start, end = quantile(low), quantile(high)
        shares = [normal_share(end - shift) - normal_share(start - shift) for shift in LATER_SHIFTS]
        shares.append(normal_share(end / LATER_SPREAD) - normal_share(start / LATER_SPREAD))
        stake = PATIENCE / ((self.seen + PATIENCE) * (self.seen + 1 + PATIENCE))
        self.later = [
            min(MOST, (money + stake) * share / (high - low)) for money, share in zip(self.later, shares, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """Return the values, counts and money."""
        values, ties = (list(column) for column in zip(*self.bag, strict=True))
        kept = {"seen": self.seen, "values": values, "ties": ties}
        return {**kept, "counts": list(self.counts), "first": list(self.first), "later": list(self.later)}

    @classmethod
    def loaded(cls, name: str, reference: Sequence[float], state: Any, images: int, horizon: int) -> _Signal:
        """Return the signal with this state; raise ValueError if it does not fit."""
        check_keys(name, state, {"seen", "values", "ties", "counts", "first", "later"})
        check_number(f"seen of {name}", state["seen"], least=0, most=images, whole=True)
        kept = min(horizon, len(reference) + state["seen"])
        lengths = {"values": kept, "ties": kept, "counts": kept + 1}
        lengths |= {"first": len(FIRST_SHIFTS), "later": len(LATER_SHIFTS) + 1}
        ranges = {"ties": (0, 1), "counts": (0, state["seen"]), "first": (0, MOST), "later": (0, MOST)}
        for key, length in lengths.items():
            if not isinstance(state[key], list) or len(state[key]) != length:
                raise ValueError(f"the state's {key} of {name} must be a list of {length} numbers")
            for number in state[key]:
                least, most = ranges.get(key, (-MOST, MOST))
                check_number(f"{key} of {name}", number, least, most, whole=key == "counts")
        signal = cls(list(zip(map(float, state["values"]), map(float, state["ties"]), strict=True)))
        signal.counts, signal.references, signal.seen = list(state["counts"]), len(reference), state["seen"]
        signal.first, signal.later = (list(map(float, state[key])) for key in ("first", "later"))
        if signal.state()["values"] != state["values"] or sum(signal.counts) != len(reference) + signal.seen - kept:
            raise ValueError(f"the state's values and counts of {name} do not fit each other")
        if Counter(reference) - Counter(state["values"]):
            raise ValueError(f"the state's values of {name} are of another commissioning, with another reference")
        return signal


def newer_share(rank: float, shift: float, before: int, after: int) -> float:
    """Return the share of the newer of two populations that lies below a rank among both.

    A bet that an image is of the newer one gains this share's increase over the rank's part of (0, 1), divided by that
    of the rank itself. Over all parts the gains have the mean 1.

    Args:
        rank: share of both populations, in [0, 1].
        shift: of the newer population, whose values are normal with this mean; those of the older have the mean 0.
        before: number of values of the older population.
        after: number of values of the newer one.

    Example:
        >>> [round(newer_share(0.9, 3.0, before=10, after=after), 2) for after in (0, 1, 90)]
        [0.04, 0.15, 0.89]
    """
    if not 0 < rank < 1:
        return rank
    low, high = sorted((quantile(rank), quantile(rank) + shift))  # the quantiles of each population
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        share = before * normal_share(middle) + after * normal_share(middle - shift)
        low, high = (middle, high) if share < rank * (before + after) else (low, middle)
    return normal_share(low - shift)


def normal_share(value: float) -> float:
    """Return the share of the standard normal distribution below a value."""
    return 0.5 * math.erfc(-value * ROOT)


def quantile(rank: float) -> float:
    """Return the value of the standard normal distribution below which a share of it lies, infinite at 0 and 1."""
    return NORMAL.inv_cdf(rank) if 0 < rank < 1 else math.copysign(math.inf, rank - 0.5)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
