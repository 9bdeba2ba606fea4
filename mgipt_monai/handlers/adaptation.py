# SPDX-License-Identifier: Apache-2.0
"""The Ignite handler that enables test-time adaptation in an evaluator and keeps its state and records."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator

from mgipt_monai.engines import AdaptationEvents
from mgipt_monai.handlers.evaluators import (
    agree_on_method,
    check_evaluator,
    names_of_item,
    records_of,
    site_of,
    skip_done,
    wrap_run,
)
from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.stream.records import AuditTrail, Identifiers, in_words
from mgipt_monai.stream.state_file import StreamFile
from mgipt_monai.utils.naming import file_names, root_cause

__all__ = ["TestTimeAdaptationHandler"]

logger = logging.getLogger(__name__)


class TestTimeAdaptationHandler:
    """Enables test-time adaptation in any ``SupervisedEvaluator`` while it runs; the evaluator is restored at the end.

    During the run the evaluator's inferer is an :class:`AdaptiveInferer` with ``method``, which makes the updates. The
    handler loads the adaptation state before the first image, logs and records each image, and saves the state after
    each image and at the end, however the run ends. An interrupted image leaves no trace.

    Args:
        method: the adaptation method; None uses that of the evaluator's own ``AdaptiveInferer``.
        state_path: file for the adaptation state and the position in the stream; None saves no state.
        record_path: file for the records, see :class:`mgipt_monai.stream.records.AuditTrail`; None writes none.
        resume: continue an interrupted stream at the position saved in ``state_path``, with the same results as an
            uninterrupted run. The stream must be the same. False starts a new stream with new files.
        start_from: state file of an earlier stream whose adaptation this one continues; not with ``resume``.
        save_every: number of images between two saves of the state; it is also saved at the end.
        reset_at_site: reset the method before an image whose site (the batch's ``site``) differs from that of the
            previous image. That image may have failed, or be the last one of ``start_from`` or of the previous run.
        windows: maximum number of windows in which the alignment loss is measured, if the evaluator has a
            ``SlidingWindowInferer`` (see :class:`AdaptiveInferer`).
        snapshot_every: number of images between two snapshots in the state file (see :class:`mgipt_monai.StreamFile`);
            the state before the first image of a new site is kept as well.
        snapshots: number of snapshots in the file; 0 keeps none (for methods that change weights, whose states are
            large).
        identifiers: whether the records contain the images' ``names`` or hide them (``hashed``). Logs contain names.

    Raises:
        ValueError: at construction, for ``save_every`` below 1 or settings that exclude each other.

    Example:
        >>> import torch
        >>> from monai.engines import SupervisedEvaluator
        >>> from mgipt_monai import MGIPT
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 1, 1))
        >>> evaluator = SupervisedEvaluator("cpu", [{"image": torch.rand(1, 1, 16, 16)}], network=network)
        >>> TestTimeAdaptationHandler(MGIPT(network, steps=1)).attach(evaluator)
        >>> evaluator.run()
    """

    __test__ = False  # its name looks like a test class to pytest

    def __init__(
        self,
        method: AdaptationMethod | None = None,
        state_path: str | os.PathLike[str] | None = None,
        record_path: str | os.PathLike[str] | None = None,
        resume: bool = False,
        start_from: str | os.PathLike[str] | None = None,
        save_every: int = 1,
        reset_at_site: bool = False,
        windows: int = 2,
        snapshot_every: int = 100,
        snapshots: int = 5,
        identifiers: Identifiers = "names",
    ) -> None:
        if resume and state_path is None:
            raise ValueError("resume needs state_path: the file with the position at which the stream stopped")
        if resume and start_from is not None:
            raise ValueError("resume continues this stream, start_from starts a new one: set only one of them")
        if save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {save_every}")
        self._method, self.start_from = method, start_from
        self.stream = None if state_path is None else StreamFile(state_path, snapshot_every, snapshots)
        self.records = None if record_path is None else AuditTrail(record_path, identifiers)
        self.resume, self.save_every, self.reset_at_site, self.windows = resume, save_every, reset_at_site, windows
        self._own_inferer: Any = None  # the evaluator's own, while it is replaced
        self._image = ExitStack()  # the transaction of the current image
        self._position, self._site = 0, None
        self._adaptation: dict[str, Any] = {}  # the state after the latest complete image, copied once per image
        self._files: list[str] = []  # of the current image

    @property
    def method(self) -> AdaptationMethod:
        """The adaptation method.

        Raises:
            TypeError: if no method was given and the evaluator's own is not known yet.
        """
        if self._method is None:
            raise TypeError("no method to adapt with: give the handler one, such as MGIPT(network)")
        return self._method

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator.

        Raises:
            RuntimeError: if another adaptation handler is attached, or the evaluator adapts with another method.
            TypeError: if the engine is not a ``SupervisedEvaluator``, the method cannot predict through its inferer, or
                there is no method.
        """
        evaluator = check_evaluator(self, engine)
        if getattr(evaluator, "adaptation_handler", None) is not None:
            raise RuntimeError(
                "the evaluator already has an adaptation handler: with two, each image would be adapted to twice"
            )
        # handlers passed to an engine's constructor are attached before it has an inferer; _start checks those
        if hasattr(evaluator, "inferer"):
            self._method = agree_on_method(evaluator, self._method, self.windows)
        evaluator.adaptation_handler = self  # type: ignore[attr-defined] # lets users find the handler
        evaluator.register_events(*AdaptationEvents)
        evaluator.add_event_handler(Events.STARTED, self._start)
        evaluator.add_event_handler(Events.ITERATION_STARTED, self._image_starts)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._image_done)
        evaluator.add_event_handler(AdaptationEvents.IMAGE_FAILED, self._image_done)
        evaluator.add_event_handler(Events.COMPLETED, self._stop)
        wrap_run(evaluator, lambda: self._running(evaluator))

    @contextmanager
    def _running(self, engine: SupervisedEvaluator) -> Iterator[None]:
        """Roll back an interrupted image, save, and restore the evaluator."""
        try:
            with self._image:
                yield
        except BaseException as error:
            if self._own_inferer is not None:
                at = f", at {', '.join(self._files)}" if self._files else ""
                logger.error("the stream stopped after %d images%s: %s", self._position, at, root_cause(error))
            raise
        finally:
            if self._own_inferer is not None:
                self._stop(engine)

    def _start(self, engine: SupervisedEvaluator) -> None:
        method = self._method = agree_on_method(engine, self._method, self.windows)
        position, rows = 0, []
        if self.stream is not None:
            self.stream.acquire()
        try:
            if self.resume and self.stream is not None and self.stream.exists():
                position = self._load(self.stream)
                rows = [] if self.records is None else self.records.keep(position)
                skip_done(engine, position, rows, str if self.records is None else self.records.shown)
            else:
                if self.stream is not None:
                    self.stream.start(method)
                if self.start_from is not None:
                    self._load(StreamFile(self.start_from))
            if self.records is not None:
                self.records.begin(method, position)
        except BaseException:
            self._release()
            raise
        for row in rows if hasattr(engine.state, "summary") else []:
            engine.state.summary.add(row)
        self._remember(position)
        self._own_inferer = engine.inferer
        if not isinstance(engine.inferer, AdaptiveInferer):
            engine.inferer = AdaptiveInferer(method, engine.inferer, self.windows)

    def _load(self, stream: StreamFile) -> int:
        """Load the adaptation and its latest site from a state file; return its position."""
        content = stream.load(self.method)
        self._site = content["site"]
        return content["position"]

    def _image_starts(self, engine: SupervisedEvaluator) -> None:
        self._since, self._files = time.perf_counter(), file_names(engine.state.batch)
        site = site_of(engine.state.batch, self.reset_at_site)
        is_new_site = self._site is not None and site != self._site
        if is_new_site and self.stream is not None:
            self.stream.snapshot(self._state(), always=True)
        self._image.enter_context(self._at(site))
        if is_new_site and self.reset_at_site:
            # a failed image rolls back to this state, so the reset stays
            self.method.reset()
            self._adaptation = self.method.adaptation_state()
        self._image.enter_context(self.method.transaction(self._adaptation))

    @contextmanager
    def _at(self, site: Any) -> Iterator[None]:
        """Enter a site; if the run ends during this image, undo it."""
        before, adaptation, self._site = self._site, self._adaptation, site
        try:
            yield
        except BaseException:
            self._site, self._adaptation = before, adaptation
            self.method.load_adaptation_state(adaptation)
            raise

    def _image_done(self, engine: SupervisedEvaluator) -> None:
        rows = records_of(engine, self.method, time.perf_counter() - self._since)
        before = self._position
        for position, row in enumerate(rows, start=before + 1):
            logger.info("image %d: %s", position, in_words(row))
            if self.records is not None:
                self.records.append(row, [*self._files, *names_of_item(engine, position - 1)])
        self._image.close()
        self._remember(before + len(rows))
        if self.stream is not None:
            self.stream.snapshot(self._state())
        if self._position // self.save_every > before // self.save_every:
            self._save()

    def _remember(self, position: int) -> None:
        """Remember the state after a complete image, the only one that is saved or restored."""
        self._position, self._adaptation, self._files = position, self.method.adaptation_state(), []

    def _state(self) -> dict[str, Any]:
        return {"adaptation": self._adaptation, "position": self._position, "site": self._site}

    def _save(self) -> None:
        if self.stream is not None:
            self.stream.save(self.method, self._state())

    def _release(self) -> None:
        if self.stream is not None:
            self.stream.release()

    def _stop(self, engine: SupervisedEvaluator) -> None:
        self._save()
        self._release()
        engine.inferer, self._own_inferer = self._own_inferer, None
