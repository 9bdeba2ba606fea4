# SPDX-License-Identifier: Apache-2.0
"""Adapts to the next image while an evaluator still postprocesses, measures, writes and records this one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer
from torch import Tensor, nn

from mgipt_monai.handlers.evaluators import check_engine, hear_of_failure
from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.methods.base import AdaptationMethod

__all__ = ["WorkAheadHandler"]

END = object()


class WorkAheadHandler:
    """Loads the next image, and adapts to it, in a thread of its own while this one is finished.

    Outputs, records and state are bit for bit what they are without it: what was done ahead is used only if the image
    and the adaptation that it began from turn out to be those at hand. Otherwise (an image could not be written, the
    method was reset at a new site, prompts were averaged) it is thrown away, which costs that image's forwards once
    more. A record's ``seconds`` are then those that the stream had to wait for the image.

    It pays where images are large or measured, or the method is cheap: there, reading and writing take longer than
    adapting. Other handlers must not run the network meanwhile. A copy of the method is made for each image: small for
    methods that keep the network frozen, the network's size for others.

    Attach it after :class:`TestTimeAdaptationHandler`.

    Example:
        >>> from monai.engines import SupervisedEvaluator
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
            TypeError: for an engine that is no ``SupervisedEvaluator``; when it starts, if it does not adapt by then.
        """
        check_engine(self, engine)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._stop)
        hear_of_failure(engine, self._stop)

    def _start(self, engine: Engine) -> None:
        if not isinstance(engine.inferer, AdaptiveInferer):
            raise TypeError(
                "there is nothing to do ahead, the evaluator does not adapt: attach TestTimeAdaptationHandler first"
            )
        self._ahead = _AheadInferer(engine, engine.inferer)
        engine.state.dataloader = self._ahead.batches(engine.state.dataloader)
        engine.inferer = self._ahead

    def _stop(self, engine: Engine, _error: BaseException | None = None) -> None:
        if self._ahead is None:
            return
        self._ahead.close()
        # the adaptation handler may have put the evaluator's own inferer back already
        if engine.inferer is self._ahead:
            engine.inferer = self._ahead.inferer
        self._ahead = None


class _Prediction(NamedTuple):
    """What was done ahead: from which image and adaptation, by which method, and what came of it."""

    inputs: Tensor
    before: list[dict[str, Any]]
    method: AdaptationMethod
    logits: Tensor


class _AheadInferer(Inferer):
    """Stands in front of an :class:`AdaptiveInferer`."""

    def __init__(self, engine: Engine, inferer: AdaptiveInferer) -> None:
        self.engine, self.inferer = engine, inferer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="work_ahead")
        self._batch: Future | None = None
        self._prediction: Future | None = None

    @property
    def method(self) -> AdaptationMethod:
        return self.inferer.method

    def batches(self, loader: Iterable) -> Iterator[Any]:
        """Give a loader's batches, each as soon as it is loaded."""
        self._source = iter(loader)
        while (batch := self._next_batch()) is not END:
            yield batch

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Predict, with what was done ahead if it fits, and begin with the next image."""
        done, self._prediction = self._prediction, None
        prediction = done and done.result()
        self.inferer.bind(network)
        if prediction and not args and not kwargs and self._fits(prediction, inputs):
            # everything that the method has of this image, for those who hold the method
            self.method.__dict__ = prediction.method.__dict__
            logits = prediction.logits
        else:
            logits = self.inferer(inputs, network, *args, **kwargs)
        ahead = copy.copy(self.inferer)
        ahead.method = _twin(self.method)
        self._batch = self._thread.submit(next, self._source, END)
        self._prediction = self._thread.submit(self._predict, self._batch, ahead)
        return logits

    def close(self) -> None:
        """Let the thread end what it is at."""
        self._thread.shutdown(cancel_futures=True)

    def _next_batch(self) -> Any:
        loading, self._batch = self._batch, None
        return next(self._source, END) if loading is None else loading.result()

    def _predict(self, batch: Future, ahead: AdaptiveInferer) -> _Prediction | None:
        engine, method = self.engine, ahead.method
        before = _basis(method)
        try:
            device, non_blocking = engine.state.device, engine.non_blocking
            inputs, *_ = engine.prepare_batch(batch.result(), device, non_blocking, **engine.to_kwargs)
            return _Prediction(inputs, before, method, ahead(inputs, method.network))
        except Exception:
            # the stream's end, or a bad image, which the evaluator comes upon in its turn
            return None

    def _fits(self, prediction: _Prediction, inputs: Tensor) -> bool:
        same_network = prediction.method.network is self.method.network
        return same_network and _same(prediction.inputs, inputs) and _same(prediction.before, _basis(self.method))


def _twin(method: AdaptationMethod) -> AdaptationMethod:
    """Return a copy of the method around the same source network."""
    return copy.deepcopy(method, {id(module): module for module in method.network.modules()})


def _basis(method: AdaptationMethod) -> list[dict[str, Any]]:
    """Return all that a prediction depends on, beside the network and the image."""
    return [method.settings(), method.adaptation_state()]


def _same(one: Any, other: Any) -> bool:
    """Whether two states, or images, are bit-identical."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return one == other
