# SPDX-License-Identifier: Apache-2.0
"""What the handlers need from their evaluator: its method, run, images and position in the stream."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.utils import ensure_tuple
from torch.utils.data import SequentialSampler, Subset

from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.methods.base import AdaptationMethod

__all__ = [
    "agree_on_method",
    "check_evaluator",
    "names_of_item",
    "records_of",
    "site_of",
    "skip_done",
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


def names_of_item(engine: SupervisedEvaluator, position: int) -> list[str]:
    """Return the strings in the dataset's item at ``position`` that identify an image: its name and file paths.

    An item that is not a dict, or a dataset without a list of items, has none.
    """
    data = getattr(getattr(engine.data_loader, "dataset", None), "data", None)
    item = data[position] if isinstance(data, Sequence) and position < len(data) else None
    values = [value for key, value in item.items() if key != "site"] if isinstance(item, Mapping) else []
    flat = [part for value in values for part in (value if isinstance(value, (list, tuple)) else [value])]
    return [str(part) for part in flat if isinstance(part, (str, os.PathLike))]


def skip_done(
    engine: SupervisedEvaluator, position: int, rows: list[dict[str, Any]], shown: Callable[[str], str] = str
) -> None:
    """Make an evaluator that is about to start continue after the first ``position`` images of its loader.

    Args:
        engine: the evaluator, at its ``STARTED`` event.
        position: number of images done.
        rows: their records, to check that the stream is the same; may be empty.
        shown: maps a name to its form in the records.

    Raises:
        ValueError: if the loader does not keep the order, or its images have changed.
    """
    loader = engine.data_loader
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, SequentialSampler):
        raise ValueError("resume needs a monai DataLoader that keeps the order of its dataset")
    for row, item in zip(rows, getattr(loader.dataset, "data", []), strict=False):
        if isinstance(item, dict) and "name" in item and shown(item["name"]) != row["name"]:
            raise ValueError(
                f"the stream has changed since it was interrupted ({row['name']}): start again without resume"
            )
    data, size = loader.dataset, loader.batch_size or 1
    count = len(data)  # type: ignore[arg-type] # a SequentialSampler has taken its length
    if position > count:
        raise ValueError(
            f"the stream has changed since it was interrupted ({position} done of {count}): start again without resume"
        )
    if position == count:
        logger.info("all %d images of the stream are done", position)
        engine.terminate()
        return
    engine.state.dataloader = DataLoader(
        Subset(data, range(position, count)),
        batch_size=size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )
    # ignite counts from here, so the run ends at the right image and the progress bar is correct
    engine.state.iteration = position // size
    logger.info("resuming the stream at image %d of %d", position + 1, count)
