# SPDX-License-Identifier: Apache-2.0
"""The images of a stream: which one stands where, whether they are the same ones, and which are left to be taken."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader
from monai.utils import ensure_tuple
from torch.utils.data import SequentialSampler, Subset

from mgipt_monai.stream.records import AuditTrail

__all__ = ["StreamImages", "site_of"]

logger = logging.getLogger(__name__)


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
    """The images of a loader, those that are postponed at the end.

    Args:
        loader: the loader; only one that keeps the order of its dataset can be resumed.
        records: the stream's records, which may hide names; None writes none.
    """

    def __init__(self, loader: Any, records: AuditTrail | None = None) -> None:
        self._loader, self._records = loader, records
        self._data = getattr(getattr(loader, "dataset", None), "data", None)
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

    def file(self, position: int) -> str:
        """Return the file of the item's image, the first one of several; empty if it has none."""
        item = self.item(position)
        files = item.get("image") if isinstance(item, Mapping) else None
        file = files[0] if isinstance(files, (list, tuple)) and files else files
        return os.fspath(file) if isinstance(file, (str, os.PathLike)) else ""

    def source(self, position: int) -> dict[str, str]:
        """Return the fingerprint of an item's files, as it stands in the records."""
        text = _file_text(self.item(position))
        return {} if text is None or self._records is None else {"source": self._records.sealed(text)}

    def loader(self) -> DataLoader:
        """Return the loader, which must keep the order of its dataset.

        Raises:
            ValueError: if it does not.
        """
        if not isinstance(self._loader, DataLoader) or not isinstance(self._loader.sampler, SequentialSampler):
            raise ValueError("resume needs a monai DataLoader that keeps the order of its dataset")
        return self._loader

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

    def rest(self, position: int, alone_until: int) -> tuple[Iterable[Any], int]:
        """Return the batches of the images that are left, and the number of batches done.

        Args:
            position: number of images done.
            alone_until: the images before this position are loaded one by one, in this process.
        """
        loader, count = self.loader(), self.count()
        size = loader.batch_size or 1
        left = range(position, count) if self._order is None else self._order[position:]
        if not left:
            logger.info("all %d images of the stream are done", position)
            return (), position // size
        alone = min(len(left), size * math.ceil(max(0, alone_until - position) / size))
        loaders = [
            DataLoader(Subset(loader.dataset, part), batch_size=size, num_workers=workers, collate_fn=loader.collate_fn)
            for part, workers in ((left[:alone], 0), (left[alone:], loader.num_workers))
            if part
        ]
        logger.info("resuming the stream at image %d of %d", position + 1, count)
        return _InTurn(loaders), position // size


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


def _file_text(item: Any) -> str | None:
    """Return the names and sizes of an item's files in one text; None if it has none, or one is not there.

    Example:
        >>> _file_text({"image": "absent.png"})
    """
    if not isinstance(item, Mapping):
        return None
    files = []
    for key in ("image", "label"):
        value = item.get(key)
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(path, (str, os.PathLike)):
                try:
                    files.append([key, Path(path).name, os.stat(path).st_size])
                except (OSError, ValueError):
                    return None
    return json.dumps(files) if files else None
