# SPDX-License-Identifier: Apache-2.0
"""A dataset that returns bad items as failures instead of ending the run."""

from __future__ import annotations

import os
from typing import Any

from monai.data import Dataset
from monai.utils import ensure_tuple

from mgipt_monai.utils.naming import root_cause, with_file_name

__all__ = ["FAILURE", "PLACE", "StreamDataset"]

FAILURE = "failure"
PLACE = ("name", "site", "round")
"""The keys of an item that identify the image in the stream."""


class StreamDataset(Dataset):
    """A MONAI ``Dataset`` for streams that returns an item that cannot be read as a failure.

    A failure has the item's ``name``, ``site`` and ``round`` (those it has) and ``failure``, which names the file and
    the fix. :class:`mgipt_monai.StreamingAdaptationEvaluator` records it and continues. Constructed like
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


def check_file(key: str, path: str | os.PathLike[str]) -> None:
    """Raise an error that names the file if it does not exist or is empty."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{key} file {path} does not exist")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{key} file {path} is empty: copy it again or remove it")


def explain(error: BaseException, item: dict[str, Any]) -> str:
    """Return the message of the error's root cause, with a file name."""
    text = root_cause(error)
    if "cannot find a suitable reader" in text:
        text = "cannot be read as an image: copy it again, or convert it to PNG or NIfTI"
    if "Compressed file ended" in text:
        text = "is truncated: copy it again or remove it"
    return with_file_name(text, files_of(item) or [str(item.get("name"))])


def files_of(item: dict[str, Any]) -> list[str]:
    """Return the paths of an item's image and label files."""
    return [str(path) for key in ("image", "label") for path in ensure_tuple(item.get(key, ()))]
