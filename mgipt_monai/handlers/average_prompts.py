# SPDX-License-Identifier: Apache-2.0
"""Averages the prompts of several streams, one per process, at regular intervals."""

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
    """Averages a method's prompts over all ``torch.distributed`` processes after every ``every`` images of each.

    Processes wait for each other at each averaging; failed images count. Averaging ends when the shortest stream ends;
    the others continue with their current prompts. A process without prompts, because all its images failed, takes the
    mean of the others. With a single process nothing changes.

    Attach it before :class:`TestTimeAdaptationHandler`, which then saves the averaged prompts together with the
    preceding image, so that a failed or interrupted image never undoes an averaging. If all processes resume, the run
    averages at the same images as an uninterrupted run. If only some of them had saved their latest averaging, the
    others skip it with a warning, and averaging continues with the first one that no process has done.

    Args:
        method: the method that adapts: MGIPT with global prompts.
        every: number of images of each process between two averagings (batches, if the evaluator processes several
            images at once).

    Raises:
        TypeError: at construction, for a method that has nothing to average.
        ValueError: at construction, if ``every`` is below 1; at the start, if the length of the stream is unknown.
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
            RuntimeError: if an adaptation handler is already attached.
        """
        if getattr(engine, "adaptation_handler", None) is not None:
            raise RuntimeError("attach AveragePromptsHandler first: the adaptation handler saves its result")
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
        # a resumed stream with no images left gets here without _image_done
        self._agree(self._length)
        # if another handler ended this stream early, the other processes still wait for it
        while self._next <= self._last:
            self._average()

    def _agree(self, done: int) -> None:
        """Agree with the other processes, once per run, on the remaining averagings."""
        if self._agreed:
            return
        self._agreed = True
        places: list[tuple[int, int]] = _gather((done, self._length))
        self._last = min(length for _, length in places) // self.every
        averagings = [min(done // self.every, self._last) for done, _ in places]
        self._next = max(averagings) + 1
        if min(averagings) < max(averagings):
            logger.warning("not every process had saved its latest averaging: the others skip it")

    def _average(self) -> None:
        own = self.method.adaptation_state()
        states: list[dict[str, list[Tensor]]] = _gather({name: own[name] for name in self.method.averaged})
        started = [state for state in states if all(state.values())]
        if started:
            # gathered rather than reduced: the same order of summation gives each process the same mean
            mean = {
                name: [torch.stack(tensors).mean(0) for tensors in zip(*(s[name] for s in started), strict=True)]
                for name in self.method.averaged
            }
            self.method.load_adaptation_state({**own, **mean})
        logger.info("averaged the prompts of %d processes after %d images", len(started), self._next * self.every)
        self._next += 1


def _gather(value: Any) -> list[Any]:
    """Return the value of each process, ordered by rank."""
    return list(idist.all_gather(value))  # type: ignore[arg-type] # any object may be gathered
