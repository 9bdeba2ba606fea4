# SPDX-License-Identifier: Apache-2.0
"""Which files an image was read from, and what went wrong, in words that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.utils import CommonKeys, ensure_tuple

__all__ = ["file_names", "naming", "root_cause"]


def file_names(batch: Any) -> list[str]:
    """Return the names of the files of a batch's images, as far as their meta data has them.

    Args:
        batch: images, or a dict with images under ``image``, as an evaluator or a ``DataLoader`` has them.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> file_names({"image": MetaTensor(torch.rand(1, 3, 8, 8), meta={"filename_or_obj": ["eye.png"]})})
        ['eye.png']
    """
    images = batch.get(CommonKeys.IMAGE) if isinstance(batch, Mapping) else batch
    return [str(name) for name in ensure_tuple(getattr(images, "meta", {}).get("filename_or_obj", ()))]


def naming(message: str, files: Sequence[str]) -> str:
    """Return a message about files that names one: as it is if it does, else with the first one's name before it.

    Example:
        >>> naming("too dark", ["eye.png"]), naming("eye.png is too dark", ["eye.png"]), naming("too dark", [])
        ('eye.png: too dark', 'eye.png is too dark', 'too dark')
    """
    return message if not files or any(file in message for file in files) else f"{files[0]}: {message}"


def root_cause(error: BaseException) -> str:
    """Return the first cause's own message: MONAI wraps errors in the names of the transforms they went through.

    Example:
        >>> try:
        ...     try:
        ...         raise ValueError("too dark")
        ...     except ValueError as cause:
        ...         raise RuntimeError("applying transform") from cause
        ... except RuntimeError as error:
        ...     root_cause(error)
        'too dark'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip() or type(error).__name__
