# SPDX-License-Identifier: Apache-2.0
"""What the handlers need of their evaluator: its method, its run, its images, and where a resumed stream continues."""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.utils import ensure_tuple
from torch.utils.data import SequentialSampler, Subset

from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.stream.records import AuditTrail
from mgipt_monai.stream.safeguards import describe, file_text

__all__ = [
    "StreamImages",
    "agree_on_method",
    "check_evaluator",
    "only_run_of",
    "pipeline_of",
    "records_of",
    "site_of",
    "wrap_run",
]

logger = logging.getLogger(__name__)


def check_evaluator(handler: Any, engine: Engine) -> SupervisedEvaluator:
    """Return the engine if it is a ``SupervisedEvaluator``, which runs a network through an inferer.

    Raises:
        TypeError: for any other engine.
    """
    if not isinstance(engine, SupervisedEvaluator):
        raise TypeError(
            f"{type(handler).__name__} works with MONAI's SupervisedEvaluator, not with a {type(engine).__name__}: "
            "with an ignite evaluator, pass the method as the network: create_supervised_evaluator(MGIPT(network))"
        )
    return engine


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


def records_of(engine: SupervisedEvaluator, method: AdaptationMethod, seconds: float) -> list[dict[str, Any]]:
    """Return the records of the iteration that just ended, one per image.

    A ``StreamingAdaptationEvaluator`` makes its own. For other evaluators they combine the method's records, the file
    names in the images' metadata, and an equal share of the time.
    """
    if getattr(engine.state, "record", None):
        return [engine.state.record]
    output = engine.state.output
    items = output if isinstance(output, list) else [{}] * len(method.last)
    rows = []
    for item, done in zip(items, method.last, strict=True):
        meta = getattr(item.get("image"), "meta", {})
        row = {"name": str(meta.get("filename_or_obj", done["index"])), "site": "", "status": "ok"}
        rows.append({**row, **done, "seconds": seconds / len(items)})
    return rows


def site_of(batch: Any, needed: bool) -> Any:
    """Return the site of a batch's images; None if the batch has no site and none is needed.

    Raises:
        ValueError: if it is needed, and the batch has no site or images from several sites.
    """
    if not isinstance(batch, Mapping) or "site" not in batch:
        if not needed:
            return None
        raise ValueError("reset_at_site needs each image's site: add a 'site' to the dataset's items")
    sites = batch["site"].tolist() if isinstance(batch["site"], torch.Tensor) else batch["site"]
    site, *others = dict.fromkeys(ensure_tuple(sites))
    if others and needed:
        raise ValueError(f"reset_at_site needs batch size 1: a batch has images of the sites {[site, *others]}")
    return site


DIED = (
    "the process ended {} times at this image, so it is passed over: was it out of memory, or is the file broken? Look "
    "at its size; resume with retry_failed to take it once more"
)


class StreamImages:
    """The images of an evaluator's loader, those that are postponed at the end.

    Args:
        engine: the evaluator.
        records: the stream's records, which may hide names; None writes none.
    """

    def __init__(self, engine: SupervisedEvaluator, records: AuditTrail | None = None) -> None:
        self._engine, self._records = engine, records
        self._data = getattr(getattr(engine.data_loader, "dataset", None), "data", None)
        self._order: Sequence[int] | None = None  # None: as in the list
        self.postponed: list[int] = []
        self.base = 0

    def item(self, position: int) -> Any:
        """Return the dataset's item of the image at ``position`` of the stream; None if there is no list of them."""
        index = position if self._order is None else self._order[position] if position < len(self._order) else -1
        return self._data[index] if isinstance(self._data, Sequence) and 0 <= index < len(self._data) else None

    def names(self, position: int) -> list[str]:
        """Return the strings in an item that identify an image: its name and file paths."""
        item = self.item(position)
        values = [value for key, value in item.items() if key != "site"] if isinstance(item, Mapping) else []
        flat = [part for value in values for part in (value if isinstance(value, (list, tuple)) else [value])]
        return [os.fspath(part) for part in flat if isinstance(part, (str, os.PathLike))]

    def source(self, position: int) -> dict[str, str]:
        """Return the fingerprint of an item's files, as it stands in the records."""
        text = file_text(self.item(position))
        return {} if text is None or self._records is None else {"source": self._records.sealed(text)}

    def loader(self) -> DataLoader:
        """Return the evaluator's loader, which must keep the order of its dataset.

        Raises:
            ValueError: if it does not.
        """
        loader = self._engine.data_loader
        if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, SequentialSampler):
            raise ValueError("resume needs a monai DataLoader that keeps the order of its dataset")
        return loader

    def count(self) -> int:
        """Return the number of images."""
        return len(self.loader().dataset)  # type: ignore[arg-type] # a SequentialSampler has taken its length

    def postpone(self, images: Iterable[int], base: int) -> None:
        """Take these images of the list at the end, in this order; ``base`` is the number of images done before.

        Raises:
            ValueError: if there are fewer images.
        """
        self.postponed, self.base = list(images), base
        count, later = self.count(), set(self.postponed)
        if max(later, default=-1) >= count:
            raise ValueError(_changed(f"image {max(later) + 1} was taken of {count}"))
        self._order = [index for index in range(count) if index not in later] + self.postponed

    def postpone_failed(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """Postpone the images done so far that failed; return their positions before that."""
        failed = [position for position, row in enumerate(rows) if row["status"] != "ok"]
        if failed:
            order = range(self.count()) if self._order is None else self._order
            again = [order[position] for position in failed]
            kept = [index for index in self.postponed if index not in again]
            self.postpone([*kept, *again], len(rows) - len(failed))
        return failed

    def check(self, rows: Sequence[Mapping[str, Any]], position: int) -> None:
        """Check that the images done are those of the records.

        Raises:
            ValueError: if the list has changed; the message names the first image that differs.
        """
        if position > self.count():
            raise ValueError(_changed(f"{position} done of {self.count()}"))
        for done, row in enumerate(rows):
            item = self.item(done)
            if not isinstance(item, Mapping):
                continue
            if "name" in item and self._shown(item["name"]) != row["name"]:
                raise ValueError(_changed(f"image {done + 1} was {row['name']}, is {self._shown(item['name'])}"))
            if row.get("site") and "site" in item and item["site"] != row["site"]:
                raise ValueError(_changed(f"the site of {row['name']} was {row['site']}, is {item['site']}"))
            source = self.source(done).get("source")
            # a failed image may have been repaired, and one that is done may have been put away
            if row["status"] == "ok" and source is not None and row.get("source", source) != source:
                raise ValueError(_changed(f"the file of {row['name']} has another name or size"))

    def _shown(self, name: str) -> str:
        return name if self._records is None else self._records.shown(name)

    def failures(self, position: int, deaths: int) -> list[dict[str, Any]]:
        """Return the records of the batch at ``position``, at which the process died."""
        size = self.loader().batch_size or 1
        rows = []
        for one in range(position, min(position + size, self.count())):
            item = self.item(one)
            place = {key: item[key] for key in ("name", "site", "round") if isinstance(item, Mapping) and key in item}
            named = {"name": next(iter(self.names(one)), f"{one}"), "site": "", **place}
            rows.append({**named, "status": "failed", "reason": DIED.format(deaths), "seconds": 0.0})
        return rows

    def ahead(self) -> int:
        """Return how many images may be loaded or begun before the one that is processed is done."""
        loader = self.loader()
        return (1 + loader.num_workers * (loader.prefetch_factor or 0)) * (loader.batch_size or 1)

    def skip(self, position: int, alone_until: int) -> None:
        """Make the evaluator, which is about to start, go on at ``position``.

        Args:
            position: number of images done.
            alone_until: the images before this position are loaded one by one, in this process.
        """
        engine, loader, count = self._engine, self.loader(), self.count()
        size = loader.batch_size or 1
        if position == count:
            logger.info("all %d images of the stream are done", position)
            engine.terminate()
            return
        left = range(position, count) if self._order is None else self._order[position:]
        alone = min(len(left), size * math.ceil(max(0, alone_until - position) / size))
        parts = [(left[:alone], 0), (left[alone:], loader.num_workers)]
        engine.state.dataloader = _InTurn(
            [
                DataLoader(
                    Subset(loader.dataset, part), batch_size=size, num_workers=workers, collate_fn=loader.collate_fn
                )
                for part, workers in parts
                if part
            ]
        )
        # ignite counts from here, so the run ends at the right image and the progress bar is correct
        engine.state.iteration = position // size
        logger.info("resuming the stream at image %d of %d", position + 1, count)


class _InTurn:
    """Several loaders, one after the other."""

    def __init__(self, loaders: Sequence[DataLoader]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        for loader in self.loaders:
            yield from loader

    def __len__(self) -> int:
        return sum(map(len, self.loaders))


def _changed(how: str) -> str:
    return (
        f"the stream has changed since it was interrupted ({how}): give the same images in the same order, or start "
        "again without resume"
    )
