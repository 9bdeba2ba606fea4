# SPDX-License-Identifier: Apache-2.0
"""An evaluator for streams: one image at a time, in order, across sites."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence, Sized
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import EventEnum, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from monai.metrics import CumulativeIterationMetric
from monai.utils import CommonKeys
from torch import nn

from mgipt_monai.data.dataset import FAILURE, KIND, MACHINE, MEMORY, PLACE
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.metrics import UNADAPTED, ImageMeasures, mask_dice
from mgipt_monai.networks.alignment.windows import NetworkOutputError, network_turn
from mgipt_monai.stream.records import is_number, json_types
from mgipt_monai.stream.signals import stopping_at_once, stopping_cleanly
from mgipt_monai.stream.summary import StreamSummary, aligned, image_means
from mgipt_monai.stream.terminal import StreamBar, beside_bars
from mgipt_monai.utils.files import atomic_path, file_names, first_cause, root_cause, with_file_name
from mgipt_monai.utils.machine import MachineFailureError, machine_failure, out_of_memory

__all__ = ["AdaptationEvents", "MachineFailureError", "StreamFailedError", "StreamingAdaptationEvaluator"]

logger = logging.getLogger(__name__)

UNREADABLE_IN_A_ROW = 3
"""Images after one another that cannot be read, at which the disk is taken as gone."""


class AdaptationEvents(EventEnum):
    """Events of :class:`StreamingAdaptationEvaluator` in addition to ignite's and MONAI's."""

    IMAGE_FAILED = "image_failed"
    """Fired instead of ``ITERATION_COMPLETED`` for an image that could not be processed."""


class StreamFailedError(RuntimeError):
    """Some images of a stream failed; the others were processed and recorded."""


class StreamingAdaptationEvaluator(SupervisedEvaluator):
    """One pass over an ordered stream of sites, adapting to each image, with results per site and overall.

    A bad image (unreadable, NaN, wrong number of channels, missing mask) is recorded as failed and leaves the
    adaptation state bit-identical. The stream continues, and ``run`` ends with a :class:`StreamFailedError` that names
    the failed images. A failure of the machine (no space, no memory, an I/O error, no permission to write) ends the run
    with a :class:`MachineFailureError` and is not recorded, so that the stream can be resumed at that image. An I/O
    error of an image's own file is that image's failure, of the ``kind`` ``unreadable``; the third one in a row ends
    the run. A network whose output is no logits, or does not fit the classes, ends it at the first image. SIGTERM and
    SIGHUP end it as Ctrl-C does, with exit status 128 + the signal's number. A progress bar shows the site, the mean
    DSC so far, the chosen prompt size and the seconds per image.

    After each image ``state.record`` holds its record: ``name``, ``site``, ``round`` if the item has one, ``status``,
    ``seconds``, ``metrics`` if there is a label, and what the method did. ``state.metrics`` has the image's mean of
    each metric, and ``state.output[0]["figures"]`` all of the record's numbers, by name, for MONAI's handlers that
    track them. From ``EPOCH_COMPLETED`` on ``state.summary`` (a :class:`StreamSummary`) holds the results and
    ``state.metrics`` the overall mean of each metric (``dsc``), and those of its classes (``dsc_disc``).

    In a ``torch.distributed`` process group each process runs its own stream (see :func:`share_stream`). Results are
    gathered at the end: the metrics, the failed images and the summary file, which the first process writes, cover all
    processes.

    Args:
        device: where to run.
        val_data_loader: a DataLoader with batch size 1 that keeps the order, ideally over a :class:`StreamDataset`.
        network: the source network.
        inferer: an :class:`AdaptiveInferer`, or any other inferer to run without adaptation.
        image_metrics: name to MONAI metric (``reduction="none"``), computed for each image with a label.
        probability_metrics: the same for the probability map, which the postprocessing stores under ``prob``.
        class_names: names of the prediction's channels; None numbers them.
        stop_on_failure: whether the first failed image ends the run.
        progress: whether to show the progress bar.
        summary_path: JSON file for the summary, written at the end; None writes none.
        review_path: CSV file for the images, those to look at first in front, written at the end; None writes none.
        places: what the run writes, and where; what is there is named at the end.
        kwargs: as for ``SupervisedEvaluator``.

    Raises:
        ValueError: at construction, if the loader's batches hold several images.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: DataLoader,
        network: nn.Module,
        inferer: Inferer | None = None,
        image_metrics: Mapping[str, CumulativeIterationMetric] | None = None,
        probability_metrics: Mapping[str, CumulativeIterationMetric] | None = None,
        class_names: Sequence[str] | None = None,
        stop_on_failure: bool = False,
        progress: bool = True,
        summary_path: str | os.PathLike | None = None,
        review_path: str | os.PathLike | None = None,
        places: Mapping[str, str | os.PathLike] | None = None,
        **kwargs: Any,
    ) -> None:
        if getattr(val_data_loader, "batch_size", 1) != 1:
            raise ValueError(
                f"a stream is processed one image at a time: set batch_size=1, got {val_data_loader.batch_size}"
            )
        self.measures = ImageMeasures(image_metrics, probability_metrics, class_names)
        self.stop_on_failure = stop_on_failure
        self.summary_path, self.review_path = summary_path, review_path
        self.places = dict(places or {})
        self.postprocessing = kwargs.get("postprocessing")  # which MONAI itself does not keep
        events = [*(kwargs.pop("event_names", None) or []), AdaptationEvents]
        super().__init__(
            device=torch.device(device),
            val_data_loader=val_data_loader,
            network=network,
            inferer=inferer,
            event_names=events,
            **kwargs,
        )
        self.state.record = {}
        self.state.summary = StreamSummary()
        self._unreadable = 0  # images in a row
        self._measured: list[dict[str, dict[str, float]]] = []  # metrics of this run's images
        self._settled = False
        self._bar = StreamBar(self._progress, Events.ITERATION_COMPLETED | AdaptationEvents.IMAGE_FAILED)
        if progress:
            self._bar.attach(self)
        self.logger.addFilter(_is_news)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override] # MONAI's evaluators differ from ignite's too
        """Run the stream once.

        Raises:
            MachineFailureError: at an image, if the machine failed.
            StreamFailedError: at the end, if images failed in any process.
            ValueError: if the stream is empty.
        """
        if isinstance(self.data_loader, Sized):
            # the data may have changed since construction
            self.state.epoch_length = len(self.data_loader)
            if self.state.epoch_length == 0:
                raise ValueError("the stream has no images: give val_data_loader a non-empty dataset")
        self.state.summary = StreamSummary()
        self.state.metrics, self.state.metric_details = {}, {}
        self._measured, self._settled, self._unreadable = [], False, 0
        try:
            with beside_bars(), stopping_cleanly():
                super().run(global_epoch)
        finally:
            self._bar.close()
        self._settle()  # a stream that was ended early has completed no epoch
        summary = self.state.summary
        count = len(summary)
        if not count:
            raise ValueError("the stream gave no images: a generator can be iterated only once")
        failures = summary.failures
        failed = f"{len(failures)} of {count} images failed, the others are done:\n  " + "\n  ".join(failures)
        if idist.get_rank() == 0:
            self._tell_places()
            if failures and idist.get_world_size() > 1:
                logger.error(failed)
        # the launcher may stop all processes when the first one raises: finish all work before
        idist.barrier()
        if failures:
            raise StreamFailedError(failed)

    def _settle(self) -> None:
        """Gather the results of all processes, which each must call once a run, and report them."""
        if self._settled:
            return
        self._settled = True
        self._bar.close()
        with stopping_at_once():  # while processes wait for each other no signal would be heard
            self.state.summary = self.state.summary.of_all_processes()
            gathered = cast("list[list[dict[str, dict[str, float]]]]", idist.all_gather(self._measured))
        measured = [row for rows in gathered for row in rows]
        figures = self.state.summary.figures()
        self.state.metrics |= _overall(figures["all"])
        for name, classes in (measured[0] if measured else {}).items():
            self.state.metric_details[name] = np.array([[row[name][each] for each in classes] for row in measured])
        if len(self.state.summary) and idist.get_rank() == 0:
            self._report(figures)

    def _report(self, figures: dict[str, dict[str, Any]]) -> None:
        if figures["all"]["images"]:
            logger.info("stream of %d images done\n%s", figures["all"]["images"], self.state.summary.table())
            for sentence in self.state.summary.verdict():
                logger.info(sentence)
        for alarm in self.state.summary.drift:
            logger.warning(alarm)
        if self.summary_path is not None:
            with atomic_path(self.summary_path) as part:
                part.write_text(json.dumps(json_types(figures), indent=2) + "\n", encoding="utf-8")
        if self.review_path is not None:
            self.state.summary.write_review(self.review_path)

    def _tell_places(self) -> None:
        found = [[what, os.fspath(path)] for what, path in self.places.items() if os.path.exists(path)]
        if found:
            logger.info("written:\n%s", aligned(found, texts=2))

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> Any:
        method: AdaptationMethod | None = getattr(self.inferer, "method", None)
        if method is None and isinstance(self.network, AdaptationMethod):
            method = self.network
        start = time.perf_counter()
        files = file_names(batchdata)
        place = {key: _first(batchdata[key]) for key in PLACE if key in batchdata}
        record = {"name": files[0] if files else "", "site": "", **place}
        # an image that could be read may have a key of this name for something else
        kind = {KIND: _first(batchdata[KIND])} if FAILURE in batchdata and KIND in batchdata else {}
        stopped: MachineFailureError | None = None
        output: Any = None
        try:
            # a method without an inferer of its own takes its turn by itself
            with network_turn(self.network) if method is None else method.transaction():
                self._unreadable = self._unreadable + 1 if kind else 0
                if FAILURE in batchdata:
                    _raise_failure(batchdata, self._unreadable)
                output = super()._iteration(engine, batchdata)
                # without the time of the metrics
                record["seconds"] = time.perf_counter() - start
                done = method.last[0] if method is not None else {}
                record |= {"status": "ok", **self._measure(engine.state.output[0]), **done}
                engine.state.output[0]["figures"] = _figures(record)
        except Exception as error:
            if (what := machine_failure(error)) is not None:
                stopped = MachineFailureError(
                    f"at {record['name']}: {what}. The machine failed, not the image, so it is not recorded: put that "
                    "right and resume",
                    out_of_memory(error),
                )
                stopped.__context__ = error
            elif self.stop_on_failure:
                raise
            elif isinstance(cause := first_cause(error), NetworkOutputError):
                raise cause from None
            output = None
            record |= {"status": "failed", "reason": with_file_name(root_cause(error), files), **kind}
        if stopped is not None:
            raise stopped  # not from the error, whose message would be shown in its place
        handler = getattr(self, "adaptation_handler", None)
        if record["status"] == "failed" and handler is None:
            logger.error("%s failed: %s", record["name"], record["reason"])  # the handler logs each image itself
        record.setdefault("seconds", time.perf_counter() - start)
        engine.state.record = record
        engine.state.summary.add(record, None if handler is None else handler.shown(record["name"]))
        engine.state.metrics |= image_means(record)
        if record.get("metrics"):
            self._measured.append(record["metrics"])
        return output

    def _measure(self, output: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a record says about the masks of an image."""
        found: dict[str, Any] = {"metrics": self.measures(output)}
        if UNADAPTED in output:
            found["unadapted_metrics"] = self.measures(output, UNADAPTED)
            found["agreement"] = self.measures.by_class(mask_dice(output[CommonKeys.PRED], output[UNADAPTED]))
        if "quality" in output:
            found["quality"] = self.measures.by_class(output["quality"])
        return found

    def _fire_event(self, event_name: Any, *args: Any, **kwargs: Any) -> None:
        # a failed image has no output, so metrics and other ITERATION_COMPLETED handlers must not run
        if event_name == Events.ITERATION_COMPLETED and self.state.record.get("status") == "failed":
            event_name = AdaptationEvents.IMAGE_FAILED
        # handlers of several processes may wait for each other at COMPLETED, so only one process settles before
        if event_name == Events.EPOCH_COMPLETED or (event_name == Events.COMPLETED and idist.get_world_size() == 1):
            self._settle()
        super()._fire_event(event_name, *args, **kwargs)

    def _progress(self) -> dict[str, Any]:
        record, summary = self.state.record, self.state.summary
        means = {name.upper(): f"{mean:.3f}" for name, mean in summary.means.items()}
        failed = len(summary.failures)
        shown = {"site": record["site"], **means, **({"failed": failed} if failed else {})}
        if "instance_size" in record:
            shown["size"] = record["instance_size"]
        return shown | {"s/image": f"{record['seconds']:.2f}"}


def _is_news(note: logging.LogRecord) -> bool:
    """Whether a log line says more than that the engine starts or ends, which the bar and the table show."""
    return not re.match(r"Engine run (starting|resuming|finished)|Epoch\[\d+\] Complete", note.getMessage())


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return an image's metrics and other figures by class, their means first, and the other numbers of its record."""
    tables = {f"unadapted_{name}": classes for name, classes in (record.get("unadapted_metrics") or {}).items()}
    tables |= {key: record[key] for key in ("quality", "agreement") if record.get(key)} | (record["metrics"] or {})
    own = {key: value for key, value in record.items() if key not in (*PLACE, "index") and is_number(value)}
    return {**image_means({"metrics": tables}), **_by_name(tables), **own}


def _overall(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures over all images that are means: of each metric, without adaptation, the gain, the quality."""
    tables = {f"unadapted_{name}": values for name, values in figures.get("unadapted_metrics", {}).items()}
    tables |= {f"gain_{name}": {"mean": gain["mean"]} for name, gain in figures.get("gain", {}).items()}
    tables |= {key: {"mean": figures[key]} for key in ("quality", "agreement") if is_number(figures.get(key))}
    return _by_name({**figures["metrics"], **tables})


def _by_name(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Return metrics flat, by names that every tracker takes: ``dsc`` for the mean, ``dsc_disc`` for a class."""
    found = {}
    for metric, values in metrics.items():
        for key, value in values.items():
            if value is not None and not math.isnan(value):
                found[metric if key == "mean" else re.sub(r"[^\w.-]", "_", f"{metric}_{key}")] = value
    return found


def _raise_failure(batch: Mapping[str, Any], unreadable: int) -> None:
    """Raise the error of an image that could not be loaded."""
    if MACHINE in batch:
        raise MachineFailureError(_first(batch[MACHINE]), bool(_first(batch[MEMORY])))
    if unreadable == UNREADABLE_IN_A_ROW:
        raise MachineFailureError(f"{unreadable} images in a row give I/O errors: is the disk or the network gone?")
    raise ValueError(_first(batch[FAILURE]))


def _first(value: Any) -> Any:
    """Return the plain value of the batch's only image."""
    value = value.tolist() if isinstance(value, torch.Tensor) else value
    return value[0] if isinstance(value, list) else value
