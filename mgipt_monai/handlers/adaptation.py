# SPDX-License-Identifier: Apache-2.0
"""The Ignite handler that switches test-time adaptation on for an evaluator, and keeps its state and records."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from ignite.engine import Engine, Events

from mgipt_monai.engines import AdaptationEvents
from mgipt_monai.handlers.evaluators import (
    agree_on_method,
    check_engine,
    hear_of_failure,
    names_of,
    records_of,
    site_of,
    skip_done,
)
from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.stream.records import AuditTrail, Identifiers, in_words
from mgipt_monai.stream.state_file import StreamFile
from mgipt_monai.utils.naming import file_names, root_cause

__all__ = ["TestTimeAdaptationHandler"]

logger = logging.getLogger(__name__)


class TestTimeAdaptationHandler:
    """Adapts any ``SupervisedEvaluator`` while it runs, and leaves it as it was.

    While the evaluator runs its inferer is an :class:`AdaptiveInferer` with ``method``, which owns the update; the
    handler restores the adaptation state before the first image, logs and records each image, and saves the state
    after it and at the end, whatever ends the run.

    Args:
        method: the adaptation method; None takes the one of the evaluator's own ``AdaptiveInferer``.
        state_path: file for the adaptation state and the place in the stream; None keeps no state.
        record_path: file for the records, see :class:`mgipt_monai.stream.records.AuditTrail`; None writes none.
        resume: go on with an interrupted stream where ``state_path`` says, giving what one go would have given. The
            stream must be the same. False starts the stream, and its files, anew.
        start_from: state file of an earlier stream whose adaptation this one continues; not with ``resume``.
        save_every: images between two savings of the state, which is also saved at the end.
        reset_at_site: reset the method before an image whose site (the batch's ``site``) is not the site of the image
            before it, be it one that failed, the last one of ``start_from`` or of the handler's earlier run.
        windows: where the evaluator has a ``SlidingWindowInferer``, through which the method then predicts, in how many
            windows an image is looked at while it is adapted to (see :class:`AdaptiveInferer`).
        snapshot_every: images between two snapshots in the state file (see :class:`mgipt_monai.StreamFile`); the state
            with which a new site begins is kept as well.
        snapshots: how many snapshots the file keeps; 0 for none, as for methods that change weights.
        identifiers: whether the records have the images' ``names``, or hide them (``hashed``). Logs have names.

    Raises:
        ValueError: at construction, for settings that exclude each other.

    Example:
        >>> import torch
        >>> from monai.engines import SupervisedEvaluator
        >>> from mgipt_monai import MGIPT
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 1, 1))
        >>> evaluator = SupervisedEvaluator("cpu", [{"image": torch.rand(1, 1, 16, 16)}], network=network)
        >>> TestTimeAdaptationHandler(MGIPT(network, steps=1)).attach(evaluator)
        >>> evaluator.run()
    """

    __test__ = False  # its name begins like a test class, it is none

    def __init__(
        self,
        method: AdaptationMethod | None = None,
        state_path: str | os.PathLike | None = None,
        record_path: str | os.PathLike | None = None,
        resume: bool = False,
        start_from: str | os.PathLike | None = None,
        save_every: int = 1,
        reset_at_site: bool = False,
        windows: int = 2,
        snapshot_every: int = 100,
        snapshots: int = 5,
        identifiers: Identifiers = "names",
    ) -> None:
        if resume and state_path is None:
            raise ValueError("resume needs state_path: the file that says where the stream stopped")
        if resume and start_from is not None:
            raise ValueError("resume goes on with this stream, start_from begins a new one: give one of them")
        if save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {save_every}")
        self.method, self.start_from = method, start_from
        self.stream = None if state_path is None else StreamFile(state_path, snapshot_every, snapshots)
        self.resume, self.save_every, self.reset_at_site, self.windows = resume, save_every, reset_at_site, windows
        self._inferer = self._site = None
        self.records = None if record_path is None else AuditTrail(record_path, identifiers)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator.

        Raises:
            RuntimeError: if another adaptation handler is attached, or the evaluator adapts with another method.
            TypeError: for an engine that is no ``SupervisedEvaluator``; if the evaluator's inferer cannot be replaced,
                or no method is given anywhere.
        """
        check_engine(self, engine)
        if getattr(engine, "adaptation_handler", None) is not None:
            raise RuntimeError(
                "the evaluator has an adaptation handler: with two, each image would be adapted to twice"
            )
        # handlers given to an engine's constructor are attached before it has an inferer: then STARTED checks
        if hasattr(engine, "inferer"):
            self.method = agree_on_method(engine, self.method, self.windows)
        engine.adaptation_handler = self
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._image_starts)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._image_done)
        if AdaptationEvents.IMAGE_FAILED in engine._allowed_events:
            engine.add_event_handler(AdaptationEvents.IMAGE_FAILED, self._image_done)
        engine.add_event_handler(Events.COMPLETED, self._stop)
        hear_of_failure(engine, self._failed)

    def _start(self, engine: Engine) -> None:
        self.method = agree_on_method(engine, self.method, self.windows)
        position, rows = 0, []
        if self.stream is not None:
            self.stream.acquire()
        try:
            if self.resume and self.stream.exists():
                position = self._take_up(self.stream)["position"]
                rows = [] if self.records is None else self.records.keep(position)
                skip_done(engine, position, rows, str if self.records is None else self.records.shown)
            else:
                if self.stream is not None:
                    self.stream.start(self.method)
                if self.start_from is not None:
                    self._take_up(StreamFile(self.start_from))
            if self.records is not None:
                self.records.begin(self.method, position)
        except BaseException:
            self._release()
            raise
        for row in rows if hasattr(engine.state, "summary") else []:
            engine.state.summary.add(row)
        self._note(position)
        self._inferer = engine.inferer
        if not isinstance(engine.inferer, AdaptiveInferer):
            engine.inferer = AdaptiveInferer(self.method, engine.inferer, self.windows)

    def _take_up(self, stream: StreamFile) -> dict[str, Any]:
        """Load the adaptation, and the site of its latest image, from a state file; return all that the file holds."""
        content = stream.load(self.method)
        self._site = content["site"]
        return content

    def _image_starts(self, engine: Engine) -> None:
        self._since, self._files = time.perf_counter(), file_names(engine.state.batch)
        before, self._site = self._site, site_of(engine.state.batch, self.reset_at_site)
        if before is not None and self._site != before:
            if self.stream is not None:
                self.stream.snapshot(self._done, always=True)
            # the evaluator takes the state that a failed image goes back to after this, so the reset stays
            if self.reset_at_site:
                self.method.reset()

    def _image_done(self, engine: Engine) -> None:
        rows = records_of(engine, self.method, time.perf_counter() - self._since)
        before = self._done["position"]
        for i, row in enumerate(rows, start=before + 1):
            logger.info("image %d: %s", i, in_words(row))
            if self.records is not None:
                self.records.append(row, [*self._files, *names_of(engine, i - 1)])
        self._note(before + len(rows))
        if self.stream is not None:
            self.stream.snapshot(self._done)
        if self._done["position"] // self.save_every > before // self.save_every:
            self._save()

    def _note(self, position: int) -> None:
        """Remember where the stream stands after a whole image: the only thing that is ever saved."""
        self._done = {"adaptation": self.method.adaptation_state(), "position": position, "site": self._site}
        self._files: list[str] = []  # of the image at hand

    def _save(self) -> None:
        if self.stream is not None:
            self.stream.save(self.method, self._done)

    def _release(self) -> None:
        if self.stream is not None:
            self.stream.release()

    def _stop(self, engine: Engine) -> None:
        self._save()
        self._release()
        engine.inferer, self._inferer = self._inferer, None

    def _failed(self, engine: Engine, error: BaseException) -> None:
        if self._inferer is None:
            return
        at = f", at {', '.join(self._files)}" if self._files else ""
        logger.error("the stream stopped after %d images%s: %s", self._done["position"], at, root_cause(error))
        # an image that was cut off half-way must leave no trace
        self.method.load_adaptation_state(self._done["adaptation"])
        self._site = self._done["site"]
        self._stop(engine)
