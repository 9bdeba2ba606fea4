# SPDX-License-Identifier: Apache-2.0
"""Views of an image whose predictions can be mapped back onto it, and the mean of these predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mgipt_monai.methods.weight_updates.losses import probabilities
from mgipt_monai.networks.prompts.early_stop import Head

__all__ = ["View", "mean_probabilities", "scales_and_flips", "turns_and_flips"]


class View(NamedTuple):
    """How an image becomes a view, and how the view's prediction is mapped back onto the image."""

    apply: Callable[[Tensor], Tensor]
    undo: Callable[[Tensor], Tensor]


def mean_probabilities(predict: Callable[[Tensor], Tensor], image: Tensor, views: Sequence[View], head: Head) -> Tensor:
    """Predict each view in turn, map the probabilities back onto the image, and return their mean."""
    first, *others = views
    total = first.undo(probabilities(predict(first.apply(image)), head))
    for view in others:
        total = total + view.undo(probabilities(predict(view.apply(image)), head))
    return total / len(views)


def turns_and_flips() -> list[View]:
    """Return the image, its two flips and its rotations by 90, 180 and 270 degrees, in the first two spatial axes.

    In a MONAI volume these are the axes within a slice.
    """
    flips = [View(partial(torch.flip, dims=(axis,)), partial(torch.flip, dims=(axis,))) for axis in (2, 3)]
    turns = [View(partial(torch.rot90, k=k, dims=(2, 3)), partial(torch.rot90, k=-k, dims=(2, 3))) for k in (1, 2, 3)]
    return [View(lambda x: x, lambda x: x), *flips, *turns]


def scales_and_flips(size: Sequence[int], output_size: Sequence[int], scales: Sequence[float]) -> list[View]:
    """Return the image at each scale, original and flipped (left-right for an image of rows and columns).

    Args:
        size: the image's spatial size.
        output_size: the spatial size of its prediction.
        scales: scale factors.

    Returns:
        Two views per scale.

    Example:
        >>> views = scales_and_flips((32, 32), (32, 32), (0.5, 1))
        >>> [view.apply(torch.rand(1, 3, 32, 32)).shape[-1] for view in views]
        [32, 32, 32, 32]
        >>> scales_and_flips((64, 64), (64, 64), (0.5,))[0].apply(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 3, 32, 32])
    """
    axis = min(3, len(size) + 1)
    back = partial(_resize, size=output_size)
    views = []
    for scale in scales:
        scaled = [_scaled(side, scale) for side in size]
        to_scale = partial(_resize, size=scaled)
        views += [
            View(to_scale, back),
            View(partial(_flipped_after, to_scale, axis), partial(_flipped_before, back, axis)),
        ]
    return views


def _scaled(side: int, scale: float) -> int:
    # keep the side's powers of two, up to 32: a network that downsamples then accepts the view as well as the image
    step = min(side & -side, 32)
    return max(round(side * scale / step), 1) * step


def _flipped_after(resize: Callable[[Tensor], Tensor], axis: int, x: Tensor) -> Tensor:
    return resize(x).flip(axis)


def _flipped_before(resize: Callable[[Tensor], Tensor], axis: int, x: Tensor) -> Tensor:
    return resize(x.flip(axis))


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[2:] == tuple(size):
        return x
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=False)
