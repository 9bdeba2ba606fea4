# SPDX-License-Identifier: Apache-2.0
"""The parts that a method is built of, and their settings as plain values."""

from __future__ import annotations

from typing import Any, TypeVar

from monai.transforms import Randomizable
from torch import nn

__all__ = ["build_part", "plain_settings"]

NOT_SETTINGS = {"network", "training", "images_seen", "last", "uncertainty", "unadapted", "side_by_side"}

Part = TypeVar("Part")


def plain_settings(part: Any) -> dict[str, Any]:
    """Return the public plain attributes of a method and of its parts, except those that are None.

    Args:
        part: an adaptation method that has seen no image, or a part of one.

    Example:
        >>> from mgipt_monai.networks import PhotometricJitter
        >>> plain_settings(PhotometricJitter())
        {'brightness': 0.2, 'contrast': 0.2}
    """
    settings: dict[str, Any] = {}
    for key, value in {**vars(part), **getattr(part, "_modules", {})}.items():
        if key.startswith("_") or key in NOT_SETTINGS:
            continue
        if isinstance(value, (nn.Module, Randomizable)):
            settings[key] = plain_settings(value)
        elif isinstance(value, (bool, int, float, str)):
            settings[key] = value
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, float, str)) for v in value):
            settings[key] = list(value)
    return settings


def build_part(kind: type[Part], given: Part | None, shared: dict[str, Any], own: dict[str, Any]) -> Part:
    """Return the given part of a method, or build it from the settings that are not None.

    Raises:
        ValueError: if both a part and settings are given.
    """
    settings = {name: value for name, value in {**shared, **own}.items() if value is not None}
    if given is None:
        return kind(**settings)
    if settings:
        raise ValueError(f"set {', '.join(settings)} on the {kind.__name__} that is given, not in addition to it")
    return given
