# SPDX-License-Identifier: Apache-2.0
"""Checks of images and of a saved state, which may contain anything, before any of it is used."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_finite",
    "check_image",
    "check_keys",
    "check_number",
    "check_tensor",
    "check_tensors",
    "is_finite",
    "is_whole",
]

LARGEST = 2.0**63


def is_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number, of numpy too, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite, without a temporary tensor of their size, which counts for volumes."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def check_image(image: Tensor) -> None:
    """Check a batch of images (B, C, \\*spatial) before adapting to it.

    Raises:
        ValueError: if it has no spatial axis, contains NaN or infinite values, or one of its images is constant.
    """
    if image.ndim < 3:
        raise ValueError(f"expected a batch of images (B, C, *spatial), got shape {tuple(image.shape)}")
    if not is_finite(image):
        bad = int((~torch.isfinite(image)).sum())
        raise ValueError(f"the image has {bad} NaN or infinite values: repair the file or leave it out")
    values = image.flatten(1)
    if (values.amax(dim=1) == values.amin(dim=1)).any():
        raise ValueError("the image is constant, there is nothing to adapt to: leave the file out")


def check_keys(name: str, value: Any, keys: set[str]) -> None:
    """Raise ValueError unless ``value`` is a dict with all these keys."""
    if not isinstance(value, dict):
        raise ValueError(f"the {name} must be a dict, got {type(value).__name__}")
    if missing := sorted(keys - set(value)):
        raise ValueError(f"the {name} lacks {', '.join(missing)}")


def check_number(name: str, value: Any, least: float = -LARGEST, most: float = LARGEST, whole: bool = False) -> None:
    """Raise ValueError unless ``value`` is a finite number from ``least`` to ``most``, an integer if ``whole``."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "whole number" if whole else "number"
        raise ValueError(f"the state's {name} must be a {kind} from {least:g} to {most:g}, got {_short(value)}")


def check_tensor(name: str, value: Any, dtype: torch.dtype = torch.float32) -> None:
    """Raise ValueError unless ``value`` is a dense tensor of this data type."""
    if not isinstance(value, Tensor):
        raise ValueError(f"the state's {name} must be a tensor, got {_short(value)}")
    if value.layout != torch.strided or value.is_meta or value.is_nested or value.dtype != dtype:
        kind = f"{value.dtype}, {value.layout}, on {value.device}"
        raise ValueError(f"the state's {name} must be a dense tensor of {dtype}, got {kind}")


def check_tensors(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a list of dense 32-bit floating-point tensors."""
    if not isinstance(value, list):
        raise ValueError(f"the state's {name} must be a list of tensors, got {_short(value)}")
    for tensor in value:
        check_tensor(name, tensor)


def check_finite(name: str, *tensors: Tensor) -> None:
    """Raise ValueError unless all values of the tensors are finite."""
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(f"the state's {name} are not finite")


def _short(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, float, str)) or (isinstance(value, int) and abs(value) < LARGEST)
    return repr(value)[:60] if plain else f"a {type(value).__name__}"
