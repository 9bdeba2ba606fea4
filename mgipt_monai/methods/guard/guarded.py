# SPDX-License-Identifier: Apache-2.0
"""A guard around any method: each image is also predicted without adaptation, and the guard judges the difference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mgipt_monai.methods.base import AdaptationMethod, Prediction
from mgipt_monai.methods.guard.guard import Guard, area_change
from mgipt_monai.methods.parts import plain_settings
from mgipt_monai.methods.wrapped import WrappedMethod
from mgipt_monai.networks.ensemble import disagreement
from mgipt_monai.networks.prompts.early_stop import Head, binarize, consistency_score

__all__ = ["Guarded"]


class Guarded(WrappedMethod):
    """A method with a guard that can reject its predictions and undo its learning.

    Each image is also predicted without adaptation, with the network's own normalisation and through the same windows,
    which costs 1 F more. If the guard refuses the adapted prediction, the unadapted one is returned. If it does not let
    the method learn, the state from before the image is restored. Each record contains the guard's decision:
    ``decision`` (``adapted`` or ``unadapted``), ``learned``, ``reasons`` and ``signals``.

    Everything else is the wrapped method's: settings, state (with the guard's under ``guard``) and attributes.
    ``MGIPT(network, guard=Guard())`` builds one.

    Args:
        method: the method to guard.
        guard: None uses :class:`Guard` with its defaults.
        head: how logits become masks for the comparison; None uses the method's own, else ``sigmoid``.

    Raises:
        TypeError: if ``method`` is not an adaptation method, or is already guarded.
        ValueError: if the network stores no source statistics and the method has none, or the method's cost limit
            leaves no room for another forward.

    Example:
        >>> from torch import nn
        >>> from mgipt_monai import VPTTA
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> guarded = Guarded(VPTTA(network), Guard(min_agreement=0.9))
        >>> logits = guarded(torch.rand(1, 3, 32, 32))
        >>> guarded.last[0]["decision"] in ("adapted", "unadapted")
        True
    """

    def __init__(self, method: AdaptationMethod, guard: Guard | None = None, head: Head | None = None) -> None:
        if isinstance(method, WrappedMethod):
            found = type(method).__name__
            raise TypeError(f"method must be an adaptation method without a guard, such as MGIPT(network); got {found}")
        super().__init__(method)
        self.guard = Guard() if guard is None else guard
        self._head: Head = getattr(method, "head", "sigmoid") if head is None else head
        self.source_norms()
        method.reserve(1)
        self.guard.reset(method._state())

    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        method, guard, lasting = self.method, self.guard, _Lasting(self.method)
        before = lasting.adaptation_state()
        norms = method.source_norms()
        norms.start(image)
        with torch.no_grad():
            unadapted, loss = norms.predict_and_measure(image)
        own_forwards = norms.forwards
        if not (torch.isfinite(unadapted).all() and math.isfinite(loss)):
            raise ValueError("the unadapted prediction or its loss is not finite: check the network's weights")
        try:
            adapted = method._adapt_and_predict(image)
        except FloatingPointError:
            # a non-finite tuning step counts as a non-finite prediction
            adapted = self._not_finite(unadapted)
        signals = {**guard.compare(loss), **self._signals(adapted, unadapted)}
        verdict = guard.judge(signals)
        guard.settle(verdict, signals, lasting, before)
        record = {
            **adapted.record,
            "forwards": adapted.record["forwards"] + own_forwards,
            "decision": "adapted" if verdict.accept else "unadapted",
            "learned": verdict.learn,
            "reasons": verdict.reasons,
            "signals": signals,
        }
        return Prediction(adapted.logits if verdict.accept else unadapted, record, adapted.uncertainty, unadapted)

    def _not_finite(self, unadapted: Tensor) -> Prediction:
        logits, record = torch.full_like(unadapted, torch.nan), self.method._cost()
        if not self.has_uncertainty:
            return Prediction(logits, {**record})
        uncertainty, mean = disagreement(logits, self._head)
        return Prediction(logits, {"disagreement": mean, **record}, uncertainty)

    def _signals(self, adapted: Prediction, unadapted: Tensor) -> dict[str, float]:
        if not torch.isfinite(adapted.logits).all():
            return {"finite": 0.0}
        return {
            "finite": 1.0,
            "agreement": 1 - consistency_score(adapted.logits, unadapted, self._head),
            "area_change": area_change(binarize(adapted.logits, self._head), binarize(unadapted, self._head)),
            **self.method.signals(adapted.record),
        }

    def reserve(self, forwards: int) -> None:
        """Do nothing: the guard's own prediction without adaptation is within the limit already."""

    def adapted_input(self, image: Tensor) -> Tensor:
        """Return the latest image as passed to the network; unchanged if the unadapted prediction was returned."""
        if self.last and self.last[-1]["decision"] == "unadapted":
            return image
        return self.method.adapted_input(image)

    def settings(self) -> dict[str, Any]:
        """Return the wrapped method's settings, with the guard's thresholds under ``guard``."""
        return {**self.method.settings(), "guard": plain_settings(self.guard)}

    def reset(self) -> None:
        """Forget the stream, including the guard's memory."""
        super().reset()
        self.guard.reset(self.method._state())

    def _state(self) -> dict[str, Any]:
        return {**self.method._state(), "guard": self.guard.adaptation_state()}

    def _completed(self, state: dict[str, Any]) -> dict[str, Any]:
        state = self.method._completed(state)
        if not isinstance(state, dict) or "guard" not in state:
            return state
        return {**state, "guard": self.method._completed(state["guard"])}

    def _load_state(self, state: dict[str, Any]) -> None:
        lasting = _Lasting(self.method)
        lasting.check_adaptation_state(state)
        self.guard.load_adaptation_state(state["guard"], lasting)
        self.method._load_state(state)


class _Lasting:
    """Lets the guard read, check and restore what a method keeps between images."""

    def __init__(self, method: AdaptationMethod) -> None:
        self._method = method

    def adaptation_state(self) -> dict[str, Any]:
        return self._method._state()

    def load_adaptation_state(self, state: dict[str, Any]) -> None:
        self._method._load_state(state)

    def check_adaptation_state(self, state: dict[str, Any]) -> None:
        before = self._method._state()
        self._method._load_state(state)
        self._method._load_state(before)
