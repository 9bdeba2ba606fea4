# SPDX-License-Identifier: Apache-2.0
"""The Ignite handler that enables test-time adaptation in an evaluator and keeps its state and records."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator

from mgipt_monai.engines import AdaptationEvents
from mgipt_monai.handlers.evaluators import agree_on_method, check_evaluator, only_run_of, pipeline_of, wrap_run
from mgipt_monai.inferers import AdaptiveInferer, Slices
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.stream.progress import StreamProgress
from mgipt_monai.stream.records import Identifiers
from mgipt_monai.stream.signals import stopping_cleanly

__all__ = ["TestTimeAdaptationHandler"]


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
        slices: ``own`` treats each slice as an image with its own 2D prompts, if the evaluator has a ``SliceInferer``;
            ``shared`` treats a volume as one image.
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
        slices: Slices = "shared",
    ) -> None:
        self._stream = StreamProgress(
            state_path,
            record_path,
            resume,
            start_from,
            save_every,
            reset_at_site,
            snapshot_every,
            snapshots,
            identifiers,
            retry_failed,
            attempts,
            key_path,
        )
        self._method, self._settings = method, {**(settings or {}), "windows": windows, "reset_at_site": reset_at_site}
        self.windows, self.slices = windows, slices
        if slices != "shared":
            self._settings["slices"] = slices
        self._own_inferer: Any = None  # the evaluator's own, while it is replaced
        self._run = ExitStack()  # what is held while the evaluator runs

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
        return self._stream.may_work_ahead

    def shown(self, name: str) -> str:
        """Return an image's name as it appears in the records."""
        records = self._stream.records
        return name if records is None else records.shown(name)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator.

        Raises:
            RuntimeError: if another adaptation handler is attached, or the evaluator adapts with another method.
            TypeError: if the engine is not a ``SupervisedEvaluator``, the method cannot predict through its inferer, or
                there is no method.
        """
        evaluator = check_evaluator(type(self).__name__, engine)
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
            with self._stream.rolling_back():
                yield
        except BaseException as error:
            if self._own_inferer is not None:
                self._stop(engine, error)
            raise
        finally:
            if self._own_inferer is not None:
                self._stop(engine)

    def _start(self, engine: SupervisedEvaluator) -> None:
        method = self._method = agree_on_method(engine, self._method, self.windows)
        self._run.enter_context(only_run_of(method))
        try:
            self._run.callback(self._stream.close)
            rows = self._stream.open(method, engine.data_loader, pipeline_of(engine, **self._settings))
            if not self._stream.is_new:
                self._skip(engine)
        except BaseException:
            self._run.close()
            raise
        for row in rows if hasattr(engine.state, "summary") else []:
            engine.state.summary.add(row)
        self._own_inferer = engine.inferer
        if not isinstance(engine.inferer, AdaptiveInferer):
            engine.inferer = AdaptiveInferer(method, engine.inferer, self.windows, self.slices)
        self._run.enter_context(stopping_cleanly())

    def _skip(self, engine: SupervisedEvaluator) -> None:
        """Make the evaluator, which is about to start, go on behind the images done."""
        left, done = self._stream.rest()
        if not left:
            engine.terminate()
            return
        # ignite counts from here, so the run ends at the right image and the progress bar is correct
        engine.state.dataloader, engine.state.iteration = left, done

    def _image_is_loaded(self, _engine: SupervisedEvaluator) -> None:
        if self._own_inferer is not None:
            self._stream.loaded()

    def _image_starts(self, engine: SupervisedEvaluator) -> None:
        self._since = time.perf_counter()
        self._stream.begin(engine.state.batch)

    def _image_done(self, engine: SupervisedEvaluator) -> None:
        self._stream.done(records_of(engine, self.method, time.perf_counter() - self._since))

    def _stop(self, engine: SupervisedEvaluator, error: BaseException | None = None) -> None:
        try:
            self._stream.end(error)
        finally:
            self._run.close()
            engine.inferer, self._own_inferer = self._own_inferer, None


def records_of(engine: SupervisedEvaluator, method: AdaptationMethod, seconds: float) -> list[dict[str, Any]]:
    """Return the records of the iteration that just ended, one per image.

    A ``StreamingAdaptationEvaluator`` makes its own. For other evaluators they combine the method's records, the file
    names in the images' metadata, empty if there are none, and an equal share of the time.
    """
    if getattr(engine.state, "record", None):
        return [engine.state.record]
    output = engine.state.output
    items = output if isinstance(output, list) else [{}] * len(method.last)
    rows = []
    for item, done in zip(items, method.last, strict=True):
        meta = getattr(item.get("image"), "meta", {})
        row = {"name": str(meta.get("filename_or_obj", "")), "site": "", "status": "ok"}
        rows.append({**row, **done, "seconds": seconds / len(items)})
    return rows
