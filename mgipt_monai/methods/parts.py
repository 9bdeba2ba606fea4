# SPDX-License-Identifier: Apache-2.0
"""What methods are built of: the settings of their parts, and the keyword that all of them take."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any, TypeVar

from monai.transforms import Randomizable
from torch import nn

from mgipt_monai.networks.alignment.windows import Output

__all__ = ["TakesOutput", "build_part", "plain_settings"]

NOT_SETTINGS = {"network", "training", "images_seen", "last", "uncertainty", "unadapted", "side_by_side"}

Part = TypeVar("Part")


class TakesOutput(ABCMeta):
    """Lets every method take ``output``, so that no constructor has to repeat it."""

    def __call__(cls, *args: Any, output: Output | None = None, **settings: Any) -> Any:
        """Build a method."""
        if isinstance(output, bool) or not (output is None or isinstance(output, (str, int)) or callable(output)):
            raise TypeError(f"output must be a key, an index or a function of the network's output, got {output!r}")
        method = super().__call__(*args, **settings)
        if output is not None:
            method.route.output = output
        return method


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
