# SPDX-License-Identifier: Apache-2.0
"""What the handlers need to know of the engine that they are attached to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator

__all__ = ["check_engine", "hear_of_failure"]


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
