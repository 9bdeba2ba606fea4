# SPDX-License-Identifier: Apache-2.0
"""Adapts to the next image while the evaluator still postprocesses, measures, writes and records the current one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from torch import Tensor, nn

from mgipt_monai.handlers.evaluators import check_evaluator, wrap_run
from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.methods.base import AdaptationMethod

__all__ = ["WorkAheadHandler"]

END = object()


class WorkAheadHandler:
    """Loads the next image and adapts to it in a background thread while the current one is finished.

    Outputs, records and state are bit-identical to those without it, except that a record's ``seconds`` are the time
    that the stream waited for the image. The thread works with a twin of the method (a copy that shares the network).
    Its result is used only if the image and the adaptation state that it started from match the actual ones. Otherwise
    (an image could not be written, the method was reset at a new site, prompts were averaged) it is discarded, and that
    image costs its forwards again.

    It pays off where images are large, metrics are computed or the method is cheap: reading and writing then take
    longer than adapting. Other handlers must not run the network. A twin is small for methods that keep the
    network frozen; for others it has the size of the network.

    Attach it after :class:`TestTimeAdaptationHandler`. Near an image at which the process has died it does not work
    ahead, so that the handler knows the right one if that happens again.

    Example:
        >>> from mgipt_monai import MGIPT, TestTimeAdaptationHandler
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
        >>> images = [{"image": torch.rand(1, 1, 16, 16)} for _ in range(2)]
        >>> handlers = [TestTimeAdaptationHandler(MGIPT(network, steps=1)), WorkAheadHandler()]
        >>> SupervisedEvaluator("cpu", images, network=network, val_handlers=handlers).run()
    """

    def __init__(self) -> None:
        self._ahead: _AheadInferer | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator.

        Raises:
            TypeError: for an engine that is not a ``SupervisedEvaluator``; at its start, if it does not adapt.
        """
        evaluator = check_evaluator(type(self).__name__, engine)
        engine.add_event_handler(Events.STARTED, self._start)
        wrap_run(engine, lambda: self._running(evaluator))

    def _start(self, engine: SupervisedEvaluator) -> None:
        if not isinstance(engine.inferer, AdaptiveInferer):
            raise TypeError(
                "the evaluator does not adapt, so there is nothing to do ahead: attach TestTimeAdaptationHandler first"
            )
        self._ahead = _AheadInferer(engine, engine.inferer)
        engine.state.dataloader = self._ahead.batches(engine.state.dataloader)
        engine.inferer = self._ahead

    @contextmanager
    def _running(self, engine: SupervisedEvaluator) -> Iterator[None]:
        try:
            yield
        finally:
            if self._ahead is not None:
                self._ahead.close()
                # the adaptation handler may have restored the evaluator's own inferer already
                if engine.inferer is self._ahead:
                    engine.inferer = self._ahead.inferer
                self._ahead = None


class _Prediction(NamedTuple):
    """Work done ahead: the image and the method's state that it started from, the twin that did it, and the result."""

    inputs: Tensor
    start: list[dict[str, Any]]
    twin: AdaptationMethod
    logits: Tensor


class _AheadInferer(Inferer):
    """Wraps an :class:`AdaptiveInferer` and starts the next image ahead."""

    def __init__(self, engine: SupervisedEvaluator, inferer: AdaptiveInferer) -> None:
        self.engine, self.inferer = engine, inferer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="work_ahead")
        self._batch: Future[Any] | None = None
        self._prediction: Future[_Prediction] | None = None

    @property
    def method(self) -> AdaptationMethod:
        return self.inferer.method

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield a loader's batches, each as soon as it is loaded."""
        self._source = iter(loader)
        while (batch := self._next_batch()) is not END:
            yield batch

    def __call__(  # type: ignore[override] # as in AdaptiveInferer
        self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Predict, using the work done ahead if it matches, and start the next image."""
        ahead, self._prediction = self._prediction, None
        self.inferer.bind(network)
        # work ahead fails at the end of the stream, or for a bad image, which then fails again below
        done = ahead.result() if ahead is not None and ahead.exception() is None else None
        if done is not None and not args and not kwargs and self._matches(done, inputs):
            self.method.become(done.twin)
            logits = done.logits
        else:
            logits = self.inferer(inputs, network, *args, **kwargs)
        if getattr(getattr(self.engine, "adaptation_handler", None), "may_work_ahead", True):
            self._batch = self._thread.submit(next, self._source, END)
            self._prediction = self._thread.submit(self._predict, self._batch, self.method.twin())
        return logits

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown(cancel_futures=True)

    def _next_batch(self) -> Any:
        loading, self._batch = self._batch, None
        return next(self._source, END) if loading is None else loading.result()

    def _predict(self, batch: Future[Any], twin: AdaptationMethod) -> _Prediction:
        engine, start = self.engine, _start_of(twin)
        inputs, *_ = engine.prepare_batch(batch.result(), engine.state.device, engine.non_blocking, **engine.to_kwargs)
        return _Prediction(inputs, start, twin, self.inferer.with_method(twin)(inputs, twin.network))

    def _matches(self, done: _Prediction, inputs: Tensor) -> bool:
        same_network = done.twin.network is self.method.network
        return same_network and _same(done.inputs, inputs) and _same(done.start, _start_of(self.method))


def _start_of(method: AdaptationMethod) -> list[dict[str, Any]]:
    """Return everything that a prediction depends on, except the network and the image."""
    return [method.settings(), method.adaptation_state()]


def _same(one: Any, other: Any) -> bool:
    """Whether two states or images are bit-identical."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other)
