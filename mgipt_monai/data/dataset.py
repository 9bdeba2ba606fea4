# SPDX-License-Identifier: Apache-2.0
"""A data set whose bad items come out as failures instead of ending the run."""

from __future__ import annotations

import os
from typing import Any

from monai.data import Dataset
from monai.utils import ensure_tuple

from mgipt_monai.utils.naming import naming, root_cause

__all__ = ["FAILURE", "PLACE", "StreamDataset"]

FAILURE = "failure"
PLACE = ("name", "site", "round")
"""The keys of an item that say which image of the stream it is."""


class StreamDataset(Dataset):
    """A MONAI ``Dataset`` for streams: an item that cannot be read comes out as a failure.

    It is ``{"name", "site", "round", "failure"}``, as far as the item has them; ``failure`` says which file and what to
    do. :class:`mgipt_monai.StreamingAdaptationEvaluator` records it and goes on. Constructed like
    ``monai.data.Dataset``, from the items of :func:`mgipt_monai.find_stream`.

    Example:
        >>> dataset = StreamDataset([{"image": "absent.png", "site": "A", "name": "A/absent"}])
        >>> dataset[0]["failure"]
        'image file absent.png does not exist'
    """

    def _transform(self, index: int) -> Any:
        item = self.data[index]
        try:
            for key in ("image", "label"):
                for path in ensure_tuple(item.get(key, ())):
                    check_file(key, path)
            return super()._transform(index)
        except Exception as error:
            place = {key: item[key] for key in PLACE if key in item}
            return {"name": next(iter(files_of(item)), ""), **place, FAILURE: explain(error, item)}


def check_file(key: str, path: str | os.PathLike) -> None:
    """Raise an error that names the file if it is not there or empty."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{key} file {path} does not exist")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{key} file {path} is empty: copy it again or leave it out")


def explain(error: BaseException, item: dict[str, Any]) -> str:
    """Return the first cause's own words, with the file's name in them."""
    text = root_cause(error)
    if "cannot find a suitable reader" in text:
        text = "cannot be read as an image: copy it again, or convert it to PNG or NIfTI"
    if "Compressed file ended" in text:
        text = "is cut off: copy it again or leave it out"
    return naming(text, files_of(item) or [str(item.get("name"))])


def files_of(item: dict[str, Any]) -> list[str]:
    """Return the paths of an item's image and label files."""
    return [str(path) for key in ("image", "label") for path in ensure_tuple(item.get(key, ()))]
