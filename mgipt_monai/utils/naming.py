# SPDX-License-Identifier: Apache-2.0
"""File names of images, and error messages that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.utils import CommonKeys, ensure_tuple

__all__ = ["file_names", "naming", "root_cause", "with_file_name"]


def file_names(batch: Any) -> list[str]:
    """Return the file names of the images of a batch, if their metadata have them.

    Args:
        batch: images, or a dict with images under ``image``, as from an evaluator or a ``DataLoader``.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> file_names({"image": MetaTensor(torch.rand(1, 3, 8, 8), meta={"filename_or_obj": ["eye.png"]})})
        ['eye.png']
    """
    images = batch.get(CommonKeys.IMAGE) if isinstance(batch, Mapping) else batch
    return [str(name) for name in ensure_tuple(getattr(images, "meta", {}).get("filename_or_obj", ()))]


def with_file_name(message: str, files: Sequence[str]) -> str:
    """Return a message that names one of the files: unchanged if it does, otherwise with the first name in front.

    Example:
        >>> with_file_name("too dark", ["eye.png"]), with_file_name("eye.png is too dark", ["eye.png"])
        ('eye.png: too dark', 'eye.png is too dark')
    """
    return message if not files or any(file in message for file in files) else f"{files[0]}: {message}"


naming = with_file_name
"""Former name of :func:`with_file_name`."""


def root_cause(error: BaseException) -> str:
    """Return the message of the first cause, without the transform names that MONAI wraps around it.

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
