# SPDX-License-Identifier: Apache-2.0
"""The Ignite handler that enables test-time adaptation in an evaluator and keeps its state and records."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator

from mgipt_monai.engines import AdaptationEvents
from mgipt_monai.handlers.evaluators import (
    StreamImages,
    agree_on_method,
    check_evaluator,
    only_run_of,
    pipeline_of,
    records_of,
    site_of,
    wrap_run,
)
from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.stream.records import AuditTrail, Identifiers, in_words
from mgipt_monai.stream.safeguards import Attempts, WatchedFolders
from mgipt_monai.stream.signals import stopping_cleanly
from mgipt_monai.stream.state_file import StreamFile
from mgipt_monai.utils.files import file_names, root_cause
from mgipt_monai.utils.machine import out_of_memory

__all__ = ["TestTimeAdaptationHandler"]

logger = logging.getLogger(__name__)


class TestTimeAdaptationHandler:
    """Enables test-time adaptation in any ``SupervisedEvaluator`` while it runs; the evaluator is restored at the end.

    During the run the evaluator's inferer is an :class:`AdaptiveInferer` with ``method``, which makes the updates. The
    handler loads the adaptation state before the first image, logs and records each image, and saves the state after
    each image and at the end, however the run ends: by an error, by Ctrl-C, or by SIGTERM or SIGHUP (exit status 128 +
    the signal's number). An interrupted image leaves no trace. The files of an earlier stream in the same place are
    replaced when the first image is loaded, and the new stream can be resumed from then on.

    Args:
        method: the adaptation method; None uses that of the evaluator's own ``AdaptiveInferer``.
        state_path: file for the adaptation state and the position in the stream; None saves no state.
        record_path: file for the records, see :class:`mgipt_monai.stream.records.AuditTrail`; None writes none.
        resume: continue an interrupted stream at the position saved in ``state_path``, with the same results as an
            uninterrupted run. Weights, settings, transforms and images must be the same; images may be added at the
            end. False starts a new stream with new files.
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
        retry_failed: with ``resume``, take the images that have failed again, at the end of the stream. Their records
            are replaced.
        attempts: number of times that the process may die at an image, or memory run out, before a resumed stream
            records it as failed and passes it over; None tries for ever.
        settings: plain settings of the run that a resumed one must share, in addition to the method's and to what the
            transforms, readers and the inferer tell of themselves.
        key_path: file of the key for hidden names; None takes one beside the records.

    Raises:
        ValueError: at construction, for ``save_every`` or ``attempts`` below 1 or settings that exclude each other.

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
        retry_failed: bool = False,
        attempts: int | None = 2,
        settings: Mapping[str, Any] | None = None,
        key_path: str | os.PathLike[str] | None = None,
    ) -> None:
        if resume and state_path is None:
            raise ValueError("resume needs state_path: the file with the position at which the stream stopped")
        if resume and start_from is not None:
            raise ValueError("resume continues this stream, start_from starts a new one: set only one of them")
        if retry_failed and (not resume or record_path is None):
            raise ValueError("retry_failed needs resume and record_path: the records say which images have failed")
        for name, value in (("save_every", save_every), ("attempts", 1 if attempts is None else attempts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._method, self.start_from = method, start_from
        self.stream = None if state_path is None else StreamFile(state_path, snapshot_every, snapshots)
        self.records = None if record_path is None else AuditTrail(record_path, identifiers, key_path)
        self.resume, self.save_every, self.reset_at_site, self.windows = resume, save_every, reset_at_site, windows
        self.retry_failed, self.attempts, self.settings = retry_failed, attempts, settings or {}
        self._note = None if state_path is None else Attempts(f"{os.fspath(state_path)}.attempt")
        self._own_inferer: Any = None  # the evaluator's own, while it is replaced
        self._image = ExitStack()  # the transaction of the current image
        self._run = ExitStack()  # what is held while the evaluator runs
        self._folders = WatchedFolders()
        self._position, self._site = 0, None
        self._adaptation: dict[str, Any] = {}  # the state after the latest complete image, copied once per image
        self._files: list[str] = []  # of the current image
        self._alone_until = 0

    @property
    def method(self) -> AdaptationMethod:
        """The adaptation method.

        Raises:
            TypeError: if no method was given and the evaluator's own is not known yet.
        """
        if self._method is None:
            raise TypeError("no method to adapt with: give the handler one, such as MGIPT(network)")
        return self._method

    @property
    def may_work_ahead(self) -> bool:
        """Whether the next image may be begun before this one is done.

        Not where a process has died: the next death must be put down to the right image.
        """
        return self._position + 1 >= self._alone_until

    def shown(self, name: str) -> str:
        """Return an image's name as it appears in the records."""
        return name if self.records is None else self.records.shown(name)

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
        evaluator.add_event_handler(Events.GET_BATCH_STARTED, self._image_is_loaded)
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
                self._stop_after(engine, error)
            raise
        finally:
            if self._own_inferer is not None:
                self._stop(engine)

    def _start(self, engine: SupervisedEvaluator) -> None:
        method = self._method = agree_on_method(engine, self._method, self.windows)
        self._run.enter_context(only_run_of(method))
        try:
            if self.stream is not None:
                self.stream.acquire()
                self._run.callback(self.stream.release)
            kept = [self.stream, None if self.records is None else self.records.file]
            self._folders = WatchedFolders(part.path for part in kept if part is not None)
            self._run.callback(self._folders.close)
            self._images = StreamImages(engine, self.records)
            settings = {**self.settings, "windows": self.windows, "reset_at_site": self.reset_at_site}
            self._pipeline = pipeline_of(engine, **settings)
            self._is_new = not (self.resume and self.stream is not None and self.stream.exists())
            rows = self._begin() if self._is_new else self._continue(engine)
        except BaseException:
            self._run.close()
            raise
        for row in rows if hasattr(engine.state, "summary") else []:
            engine.state.summary.add(row)
        self._own_inferer = engine.inferer
        if not isinstance(engine.inferer, AdaptiveInferer):
            engine.inferer = AdaptiveInferer(method, engine.inferer, self.windows)
        self._run.enter_context(stopping_cleanly())

    def _begin(self) -> list[dict[str, Any]]:
        """Start a new stream; what an earlier one left stays until the first image is loaded."""
        if self.stream is not None:
            self.stream.start(self.method)
        if self.start_from is not None:
            self._site = StreamFile(self.start_from).load(self.method)["site"]
        if self.records is not None:
            self.records.begin(self.method, 0)
        self._alone_until = 0
        self._remember(0)
        return []

    def _continue(self, engine: SupervisedEvaluator) -> list[dict[str, Any]]:
        """Go on with a stream; return the records of the images done."""
        assert self.stream is not None
        assert self._note is not None
        content = self.stream.load(self.method, self._pipeline)
        position, rows, images = content["position"], [], self._images
        images.loader()
        if "postponed" in content:
            images.postpone(content["postponed"]["images"], content["postponed"]["base"])
        if self.records is not None:
            # killed between the two, the state says that failed images are postponed and the records do not yet
            rows = self.records.keep(position, failed=position > images.base or not images.postponed)
            images.check(rows, position)
        images.check([], position)
        self._site = content["site"]
        self._note.read()
        self._remember(position)
        if self.retry_failed and (failed := images.postpone_failed(rows)):
            before = position
            position -= len(failed)
            self.stream.renumber(lambda at: at - sum(one < at for one in failed))
            self._note.move(before, position)
            self._remember(position)
            self._save()
            assert self.records is not None
            rows = self.records.keep(position, failed=False)
            logger.info("%d failed images are taken again at the end of the stream", len(failed))
        if self.records is not None:
            self.records.begin(self.method, position)
        rows += self._pass_over()
        latest = self._note.latest
        self._alone_until = 0 if latest is None else latest + 1 + images.ahead()
        images.skip(self._position, self._alone_until)
        return rows

    def _pass_over(self) -> list[dict[str, Any]]:
        """Record the next image as failed if the process has died at it too often."""
        assert self._note is not None
        deaths = self._note.count(self._position)
        if self.attempts is None or deaths < self.attempts or self._position >= self._images.count():
            return []
        rows = self._images.failures(self._position, deaths)
        for position, row in enumerate(rows, start=self._position):
            logger.error("image %d: %s", position + 1, in_words(row))
            if self.records is not None:
                self.records.append({**row, **self._images.source(position)}, self._images.names(position))
        site = rows[-1]["site"] or self._site
        if self.reset_at_site and self._site is not None and site != self._site:
            self.method.reset()
        self._site = site
        self._remember(self._position + len(rows))
        self._save()
        self._note.clear()
        return rows

    def _image_is_loaded(self, _engine: SupervisedEvaluator) -> None:
        if self._note is not None and self._own_inferer is not None:
            self._folders.check()
            self._note.begin(self._position)

    def _image_starts(self, engine: SupervisedEvaluator) -> None:
        self._since, self._files = time.perf_counter(), file_names(engine.state.batch)
        site = site_of(engine.state.batch, self.reset_at_site)
        if self._is_new:
            self._replace_files()
        is_new_site = self._site is not None and site != self._site
        if is_new_site and self.stream is not None:
            self.stream.snapshot(self._state(), always=True)
        self._image.enter_context(self._at(site))
        if is_new_site and self.reset_at_site:
            # a failed image rolls back to this state, so the reset stays
            self.method.reset()
            self._adaptation = self.method.adaptation_state()
        self._image.enter_context(self.method.transaction(self._adaptation))

    def _replace_files(self) -> None:
        """Take the place of an earlier stream: its state first, so that this one can be resumed at any moment."""
        self._folders.check()
        self._save()
        if self.records is not None:
            self.records.keep(0)
        self._is_new = False

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
        self._folders.check()
        rows = records_of(engine, self.method, time.perf_counter() - self._since)
        before = self._position
        for position, row in enumerate(rows, start=before):
            logger.info("image %d: %s", position + 1, in_words(row))
            if self.records is not None:
                named = {**row, **self._images.source(position)}
                self.records.append(named, [*self._files, *self._images.names(position)])
        self._image.close()
        self._remember(before + len(rows))
        if self.stream is not None:
            self.stream.snapshot(self._state())
        # near an image at which the process died, none that is done may be lost
        every = 1 if before < self._alone_until else self.save_every
        if self._position // every > before // every:
            self._save()

    def _remember(self, position: int) -> None:
        """Remember the state after a complete image, the only one that is saved or restored."""
        self._position, self._adaptation, self._files = position, self.method.adaptation_state(), []
        self._saved = False

    def _state(self) -> dict[str, Any]:
        state = {"adaptation": self._adaptation, "position": self._position, "site": self._site}
        images = self._images
        if images.postponed:
            state["postponed"] = {"base": images.base, "images": images.postponed}
        return {**state, "pipeline": self._pipeline}

    def _save(self) -> None:
        if self.stream is not None:
            self.stream.save(self.method, self._state())
            self._saved = True

    def _save_rest(self) -> None:
        if not self._saved:
            self._save()

    def _stop(self, engine: SupervisedEvaluator) -> None:
        with self._restoring(engine):
            if not self._is_new:  # a new stream without an image leaves the files of an earlier one
                self._folders.check()
                self._save_rest()
            if self._note is not None:
                self._note.clear()

    def _stop_after(self, engine: SupervisedEvaluator, error: BaseException) -> None:
        """Stop because of an error, which a full disk must not hide behind a second one."""
        with self._restoring(engine):
            try:
                if not self._is_new:
                    self._folders.check()
                    self._save_rest()
            except Exception as second:
                logger.error("the state could not be saved: %s", root_cause(second))
            if self._note is not None and not out_of_memory(error):
                with suppress(OSError):
                    self._note.forgive()

    @contextmanager
    def _restoring(self, engine: SupervisedEvaluator) -> Iterator[None]:
        try:
            yield
        finally:
            self._run.close()
            engine.inferer, self._own_inferer = self._own_inferer, None
