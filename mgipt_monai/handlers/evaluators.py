# SPDX-License-Identifier: Apache-2.0
"""What the handlers need to know of their evaluator: its method, its run, its images, and its place in the stream."""

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
    """Return the engine, one with a network that it runs through an inferer without training it.

    Raises:
        TypeError: for another engine.
    """
    if not isinstance(engine, SupervisedEvaluator):
        raise TypeError(
            f"{type(handler).__name__} works with MONAI's SupervisedEvaluator, not with a {type(engine).__name__}: "
            "in an evaluator of ignite pass the method as its network, "
            "create_supervised_evaluator(MGIPT(network))"
        )
    return engine


def agree_on_method(engine: SupervisedEvaluator, method: AdaptationMethod | None, windows: int) -> AdaptationMethod:
    """Return the one method that an evaluator adapts with: its own, or ``method``, made to predict as it predicts.

    Raises:
        RuntimeError: if the evaluator has its own and ``method`` is another.
        TypeError: if there is none, or the evaluator's inferer does not go with the method.
    """
    own = engine.inferer.method if isinstance(engine.inferer, AdaptiveInferer) else None
    if own is None and isinstance(engine.network, AdaptationMethod):
        own = engine.network
    if own is not None and method is not None and own is not method:
        raise RuntimeError(
            f"the evaluator adapts with its own {own.name}, the handler with another {method.name}: each image would "
            "be adapted to twice; give both the same object"
        )
    method = method if own is None else own
    if method is None:
        raise TypeError("no method to adapt with: give the handler one, such as MGIPT(network)")
    if not isinstance(engine.inferer, AdaptiveInferer):
        method.predict_through(engine.inferer, windows)
    return method


def wrap_run(engine: Engine, around: Callable[[], AbstractContextManager[None]]) -> None:
    """Run an engine inside a context from now on, so that a handler is told of every end, whatever other handlers do.

    Ignite's ``EXCEPTION_RAISED`` does not do: its handlers run in the order of their attachment, and MONAI's
    ``StatsHandler`` raises the error again before those behind it are called.
    """
    run = engine.run

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with around():
            return run(*args, **kwargs)

    engine.run = wrapped  # type: ignore[method-assign]


def records_of(engine: SupervisedEvaluator, method: AdaptationMethod, seconds: float) -> list[dict[str, Any]]:
    """Return the records of the iteration that has just ended, one per image.

    A ``StreamingAdaptationEvaluator`` makes its own. For another evaluator they are made from what the method did, the
    file names in the images' meta data, and an equal share of the time.
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
    """Return the site of a batch's images; None if the batch does not say and it is not needed.

    Raises:
        ValueError: if it is needed, and the batch does not say, or its images are from several sites.
    """
    if not isinstance(batch, Mapping) or "site" not in batch:
        if not needed:
            return None
        raise ValueError("reset_at_site needs each image's site: give the data set's items a 'site'")
    sites = batch["site"].tolist() if isinstance(batch["site"], torch.Tensor) else batch["site"]
    site, *others = dict.fromkeys(ensure_tuple(sites))
    if others and needed:
        raise ValueError(f"reset_at_site needs batch size 1: a batch has images of the sites {[site, *others]}")
    return site


def names_of_item(engine: SupervisedEvaluator, position: int) -> list[str]:
    """Return the texts of the data set's item at ``position`` that name an image: its name and the paths of its files.

    An item that is no dict, or a data set without a list of items, has none.
    """
    data = getattr(getattr(engine.data_loader, "dataset", None), "data", None)
    item = data[position] if isinstance(data, Sequence) and position < len(data) else None
    values = [value for key, value in item.items() if key != "site"] if isinstance(item, Mapping) else []
    flat = [part for value in values for part in (value if isinstance(value, (list, tuple)) else [value])]
    return [str(part) for part in flat if isinstance(part, (str, os.PathLike))]


def skip_done(
    engine: SupervisedEvaluator, position: int, rows: list[dict[str, Any]], shown: Callable[[str], str] = str
) -> None:
    """Let an evaluator that is about to start continue after the first ``position`` images of its loader.

    Args:
        engine: the evaluator, at its ``STARTED`` event.
        position: number of images that are done.
        rows: their records, to see that the stream is the same; may be empty.
        shown: how the records write a name.

    Raises:
        ValueError: if the loader does not keep an order, or its images are other ones.
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
    # ignite counts from here, so that the run ends, and the bar stands, where they should
    engine.state.iteration = position // size
    logger.info("resuming the stream at image %d of %d", position + 1, count)
