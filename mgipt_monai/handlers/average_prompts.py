# SPDX-License-Identifier: Apache-2.0
"""Several streams, one per process, that average what they have learnt every so many images."""

from __future__ import annotations

import logging
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from mgipt_monai.engines import AdaptationEvents
from mgipt_monai.methods.base import AdaptationMethod

__all__ = ["AveragePromptsHandler"]

logger = logging.getLogger(__name__)


class AveragePromptsHandler:
    """Averages a method's prompts over all processes of ``torch.distributed`` after every so many images of each.

    Processes wait for each other there; an image that failed counts. Averaging ends where the shortest stream does, and
    the others go on with what they have then. A process that has no prompts yet, since all its images failed, takes the
    mean of the others. Without other processes the mean is the prompts themselves.

    Attach it before :class:`TestTimeAdaptationHandler`, which then saves the averaged prompts with the image that they
    follow, so that a failed image, or one that was cut off, never undoes an averaging. A run that all processes resume
    averages where one go would have. Where some had saved an averaging and others had not, it is left out for these, a
    warning says so, and the next one is the first that none has done.

    Args:
        method: the method that adapts: MGIPT with global prompts.
        every: images of each process between two averagings (batches, where an evaluator takes several images at once).

    Raises:
        TypeError: at construction, for a method that has nothing to average.
        ValueError: at construction, if ``every`` is less than 1; at the start, for a stream of unknown length.
    """

    def __init__(self, method: AdaptationMethod, every: int) -> None:
        if not method.averaged:
            raise TypeError(f"{type(method).__name__} has no prompts to average: use MGIPT with global prompts")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.method, self.every = method, every

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator.

        Raises:
            RuntimeError: if an adaptation handler is attached already.
        """
        if getattr(engine, "adaptation_handler", None) is not None:
            raise RuntimeError("attach AveragePromptsHandler first: the adaptation handler saves what it leaves")
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._image_done)
        engine.register_events(*AdaptationEvents)
        engine.add_event_handler(AdaptationEvents.IMAGE_FAILED, self._image_done)
        engine.add_event_handler(Events.COMPLETED, self._stop)

    def _start(self, engine: Engine) -> None:
        if engine.state.epoch_length is None:
            raise ValueError("to average, the length of the stream must be known: give the evaluator a DataLoader")
        self._length = engine.state.epoch_length
        self._agreed = False
        self._next = self._last = 0

    def _image_done(self, engine: Engine) -> None:
        done = engine.state.iteration
        self._agree(done - 1)
        if done == self._next * self.every and self._next <= self._last:
            self._average()

    def _stop(self, engine: Engine) -> None:
        # a resumed stream with nothing left to do comes here without an image
        self._agree(self._length)
        # a stream that another handler ended early must not leave the others waiting
        while self._next <= self._last:
            self._average()

    def _agree(self, done: int) -> None:
        """Agree with the other processes, once a run, on which averagings there will be."""
        if self._agreed:
            return
        self._agreed = True
        places: list[tuple[int, int]] = _gather((done, self._length))
        self._last = min(length for _, length in places) // self.every
        averagings = [min(done // self.every, self._last) for done, _ in places]
        self._next = max(averagings) + 1
        if min(averagings) < max(averagings):
            logger.warning("not every process had saved its latest averaging: it is left out for those that had not")

    def _average(self) -> None:
        own = self.method.adaptation_state()
        states: list[dict[str, list[Tensor]]] = _gather({name: own[name] for name in self.method.averaged})
        begun = [state for state in states if all(state.values())]
        if begun:
            # gathered and not reduced, so that the order of the sum, and so the mean, is the same in every process
            mean = {
                name: [torch.stack(tensors).mean(0) for tensors in zip(*(s[name] for s in begun), strict=True)]
                for name in self.method.averaged
            }
            self.method.load_adaptation_state({**own, **mean})
        logger.info("averaged the prompts of %d processes after %d images", len(begun), self._next * self.every)
        self._next += 1


def _gather(value: Any) -> list[Any]:
    """Return the value of each process, in the order of their ranks."""
    return list(idist.all_gather(value))  # type: ignore[arg-type] # any object may be gathered
