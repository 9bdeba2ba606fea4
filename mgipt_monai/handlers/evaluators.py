# SPDX-License-Identifier: Apache-2.0
"""What the handlers need of their evaluator: its method, its run, and the settings of its pipeline."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from ignite.engine import Engine
from monai.data import ImageReader
from monai.engines import EnsembleEvaluator, SupervisedEvaluator
from monai.inferers import Inferer
from monai.transforms import LoadImage, Transform
from torch import nn

from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.networks.alignment.windows import ForwardRoute

__all__ = ["agree_on_method", "check_evaluator", "describe", "network_of", "only_run_of", "pipeline_of", "wrap_run"]


def check_evaluator(handler: str, engine: Engine) -> SupervisedEvaluator:
    """Return the engine if it is a ``SupervisedEvaluator``, which runs a network through an inferer.

    Raises:
        TypeError: for any other engine.
    """
    if isinstance(engine, EnsembleEvaluator):
        raise TypeError(
            f"{handler} adapts one network, an EnsembleEvaluator has several: give each member a method "
            "of its own in the network's place, EnsembleEvaluator(networks=[MGIPT(one), MGIPT(other)], ...); with "
            "sliding windows run one SupervisedEvaluator for each member, and merge what they write"
        )
    if not isinstance(engine, SupervisedEvaluator):
        raise TypeError(
            f"{handler} works with MONAI's SupervisedEvaluator, not with a {type(engine).__name__}: "
            "with an ignite evaluator, pass the method as the network: create_supervised_evaluator(MGIPT(network))"
        )
    return engine


def network_of(engine: Engine) -> nn.Module:
    """Return an evaluator's network, once it is clear that adaptation can predict through its inferer.

    Whoever has an inferer that is not supported learns so before anything else is asked of the network.

    Raises:
        TypeError: for another engine than a ``SupervisedEvaluator``, or an inferer that is not supported.
    """
    evaluator = check_evaluator("adaptation", engine)
    if not isinstance(evaluator.inferer, AdaptiveInferer):
        ForwardRoute().change(evaluator.inferer, windows=1)
    return evaluator.network


def agree_on_method(engine: SupervisedEvaluator, method: AdaptationMethod | None, windows: int) -> AdaptationMethod:
    """Return the method that an evaluator adapts with, its own or ``method``, and let it predict through its inferer.

    Raises:
        RuntimeError: if the evaluator has its own method and ``method`` is another one.
        TypeError: if there is none, or it cannot predict through the evaluator's inferer.
    """
    own = engine.inferer.method if isinstance(engine.inferer, AdaptiveInferer) else None
    if own is None and isinstance(engine.network, AdaptationMethod):
        own = engine.network
    if own is not None and method is not None and own is not method:
        raise RuntimeError(
            f"the evaluator adapts with its own {own.name}, the handler with another {method.name}: each image would "
            "be adapted to twice; pass the same object to both"
        )
    method = method if own is None else own
    if method is None:
        raise TypeError("no method to adapt with: give the handler one, such as MGIPT(network)")
    if not isinstance(engine.inferer, AdaptiveInferer):
        method.predict_through(engine.inferer, windows)
    return method


_adapting: WeakSet[AdaptationMethod] = WeakSet()
_claiming = threading.Lock()


@contextmanager
def only_run_of(method: AdaptationMethod) -> Iterator[None]:
    """Hold a method for one run.

    Raises:
        RuntimeError: if another run holds it.
    """
    with _claiming:
        if method in _adapting:
            raise RuntimeError(
                f"this {method.name} adapts in another run at the same time, which would mix two streams: give each "
                "run a method of its own; they may share the network"
            )
        _adapting.add(method)
    try:
        yield
    finally:
        _adapting.discard(method)


def pipeline_of(engine: SupervisedEvaluator, **settings: Any) -> dict[str, Any]:
    """Return, as plain values, what an evaluator's transforms, readers and inferer are, and further settings."""
    dataset = getattr(engine.data_loader, "dataset", None)
    return describe(
        **settings,
        preprocessing=getattr(dataset, "transform", None),
        postprocessing=getattr(engine, "postprocessing", None),
        inferer=engine.inferer,
    )


def wrap_run(engine: Engine, around: Callable[[], AbstractContextManager[None]]) -> None:
    """Wrap an engine's ``run`` in a context, so that a handler is notified however the run ends.

    Ignite's ``EXCEPTION_RAISED`` is not enough: its handlers run in the order in which they were attached, and MONAI's
    ``StatsHandler`` re-raises the error before later ones are called.
    """
    run = engine.run

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with around():
            return run(*args, **kwargs)

    engine.run = wrapped  # type: ignore[method-assign]


DEEPEST, LARGEST = 8, 1000
PLACES = ("dir", "path", "folder", "root")
"""Ends of the names of attributes that say where files are, which may change between two runs."""
CHANGING = {"_do_transform", "_lazy", "_tracing", "filenames", "method"}
"""Attributes that change while a pipeline runs: a reader keeps the names of the files that it read last."""


def describe(**parts: Any) -> dict[str, Any]:
    """Return the plain settings of transforms, readers and inferers, flat: dotted name to value.

    Example:
        >>> from monai.transforms import ScaleIntensityd
        >>> describe(intensity=ScaleIntensityd("image", minv=0.5))["intensity.scaler.minv"]
        0.5
    """
    found: dict[str, Any] = {}
    for name, part in parts.items():
        _add(found, name, part, DEEPEST)
    return found


def _add(found: dict[str, Any], name: str, value: Any, depth: int) -> None:
    plain = _plain(value)
    if plain is not None:
        found[name] = plain
    elif depth and isinstance(value, Mapping):
        for key, item in value.items():
            _add(found, f"{name}.{key}", item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _add(found, f"{name}.{number}", item, depth - 1)
    elif depth and isinstance(value, (Transform, ImageReader, Inferer)):
        found[name] = type(value).__name__
        for key, item in vars(value).items():
            if not key.endswith(PLACES) and key not in CHANGING:
                if key == "readers" and isinstance(value, LoadImage):
                    # MONAI's own come first, and depend on which packages are installed
                    count = len(LoadImage().readers)
                    item = {"own": {type(reader).__name__: reader for reader in item[:count]}, "given": item[count:]}
                _add(found, f"{name}.{key}", item, depth - 1)
    elif isinstance(value, Callable) and hasattr(value, "__qualname__"):  # type: ignore[arg-type]
        found[name] = f"{value.__module__}.{value.__qualname__}"


def _plain(value: Any) -> Any:
    """Return a setting as a plain value; None for what is none."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # a NaN would differ from itself
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (torch.dtype, np.dtype)):
        return str(value)
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return str(value.tolist()) if np.prod(value.shape) <= LARGEST else None
    if isinstance(value, (list, tuple)) and 0 < len(value) <= LARGEST:
        values = [_plain(one) for one in value]
        return values if all(isinstance(one, (bool, int, float, str)) for one in values) else None
    return None
