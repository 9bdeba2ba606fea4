# SPDX-License-Identifier: Apache-2.0
"""Where an evaluator stands in its stream: what was just done, and what to skip when it goes on later."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.utils import ensure_tuple
from torch.utils.data import SequentialSampler, Subset

from mgipt_monai.methods.base import AdaptationMethod

__all__ = ["names_of", "records_of", "site_of", "skip_done"]

logger = logging.getLogger(__name__)


def records_of(engine: Engine, method: AdaptationMethod, seconds: float) -> list[dict[str, Any]]:
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
    """Return the site that a batch's images are from; None if it does not say and it is not needed.

    Raises:
        ValueError: if it is needed, and the batch does not say, or they are from several.
    """
    if not isinstance(batch, Mapping) or "site" not in batch:
        if not needed:
            return None
        raise ValueError("reset_at_site needs to know each image's site: give the data set's items a 'site'")
    sites = batch["site"].tolist() if isinstance(batch["site"], torch.Tensor) else batch["site"]
    site, *others = dict.fromkeys(ensure_tuple(sites))
    if others and needed:
        raise ValueError(f"reset_at_site needs batch size 1: a batch has images of the sites {[site, *others]}")
    return site


def names_of(engine: Engine, place: int) -> list[str]:
    """Return the texts of the data set's item at ``place`` that name an image: its name and the paths of its files.

    An item that is no dict, or a data set without a list of items, has none.
    """
    data = getattr(getattr(engine.data_loader, "dataset", None), "data", None)
    item = data[place] if isinstance(data, Sequence) and place < len(data) else None
    values = [value for key, value in item.items() if key != "site"] if isinstance(item, Mapping) else []
    flat = [part for value in values for part in (value if isinstance(value, (list, tuple)) else [value])]
    return [str(part) for part in flat if isinstance(part, (str, os.PathLike))]


def skip_done(engine: Engine, position: int, rows: list[dict[str, Any]], shown: Callable[[str], str] = str) -> None:
    """Let an evaluator that is about to start go on after the first ``position`` images of its loader.

    Args:
        engine: the evaluator, at its ``STARTED`` event.
        position: images that are done.
        rows: their records, to see that the stream is the same; may be empty.
        shown: how the records write a name.

    Raises:
        ValueError: if the loader does not keep an order that can be gone on with, or its images are other ones.
    """
    loader = engine.data_loader
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, SequentialSampler):
        raise ValueError("resume needs a monai DataLoader that keeps the order of its dataset")
    for row, item in zip(rows, getattr(loader.dataset, "data", []), strict=False):
        if isinstance(item, dict) and "name" in item and shown(item["name"]) != row["name"]:
            raise ValueError(f"the stream has changed since it was interrupted ({row['name']}): start it anew")
    count = len(loader.dataset)
    if position > count:
        raise ValueError(f"the stream has changed since it was interrupted ({position} done of {count}): start it anew")
    if position == count:
        logger.info("all %d images of the stream are done", position)
        engine.terminate()
        return
    engine.state.dataloader = DataLoader(
        Subset(loader.dataset, range(position, count)),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )
    # ignite counts on from here, so that the pass ends, and the bar stands, where they should
    engine.state.iteration = position // loader.batch_size
    logger.info("resuming the stream at image %d of %d", position + 1, count)
