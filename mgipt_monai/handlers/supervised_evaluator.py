# SPDX-License-Identifier: Apache-2.0
"""What the handlers need to know of the engine that they are attached to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator

from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.methods.base import AdaptationMethod

__all__ = ["agree_on_method", "check_engine", "hear_of_failure"]


def agree_on_method(engine: Engine, method: AdaptationMethod | None, windows: int) -> AdaptationMethod:
    """Return the one method that an evaluator adapts with: its own, or ``method``, made to predict as it predicts.

    Raises:
        RuntimeError: if the evaluator has its own and ``method`` is another.
        TypeError: if there is none, or its way to predict does not go with the method.
    """
    own = engine.inferer.method if isinstance(engine.inferer, AdaptiveInferer) else None
    if own is None and isinstance(engine.network, AdaptationMethod):
        own = engine.network
    if own is not None and method is not None and own is not method:
        raise RuntimeError(
            f"the evaluator adapts with its own {type(own).__name__}, the handler with another "
            f"{type(method).__name__}: each image would be adapted to twice; give both the same object"
        )
    method = method if own is None else own
    if method is None:
        raise TypeError("no method to adapt with: give the handler one, such as MGIPT(network)")
    if not isinstance(engine.inferer, AdaptiveInferer):
        method.predict_through(engine.inferer, windows)
    return method


def check_engine(handler: Any, engine: Engine) -> None:
    """Raise TypeError unless ``engine`` has one network that it runs through an inferer, without training it."""
    if not isinstance(engine, SupervisedEvaluator):
        raise TypeError(
            f"{type(handler).__name__} works with MONAI's SupervisedEvaluator, not with a {type(engine).__name__}: "
            "in an evaluator of ignite put the method where the network stands, "
            "create_supervised_evaluator(MGIPT(network))"
        )


def hear_of_failure(engine: Engine, listener: Callable[[Engine, BaseException], None]) -> None:
    """Call ``listener`` with what ends a run early, before any other handler, and let it end the run all the same."""
    engine.add_event_handler(Events.EXCEPTION_RAISED, listener)
    # MONAI's StatsHandler raises the error anew, and handlers behind it would never hear of it
    listeners = engine._event_handlers[Events.EXCEPTION_RAISED]
    listeners.insert(0, listeners.pop())
    engine.add_event_handler(Events.EXCEPTION_RAISED, _raise)


def _raise(_engine: Engine, error: BaseException) -> None:
    # ignite takes an exception as handled once a handler has seen it
    raise error
