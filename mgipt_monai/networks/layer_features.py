# SPDX-License-Identifier: Apache-2.0
"""What is measured at a layer: the features that go into a norm layer, or that come out of a convolution."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["layer_features"]


def layer_features(layer: nn.Module, taken: Tensor, given: Tensor, images: int) -> Tensor | None:
    """Lay a layer's features out by image, channel and place.

    Args:
        layer: a norm layer or a convolution. The channels of a layer norm are its last axis.
        taken: what the layer took, (N, ...). N is the number of images, or a multiple of it where a network folds the
            windows of an image into the batch, those of the first image first.
        given: what it gave.
        images: number of images in this forward.

    Returns:
        Features (images, C, \\*spatial), an image's windows as the first spatial axis where there are several. None
        where there are no spatial axes, so that one image has no statistics, or where N is no multiple.
    """
    features = given if isinstance(layer, _ConvNd) else taken
    if features.ndim < 3 or len(features) % images:
        return None
    if isinstance(layer, nn.LayerNorm):
        features = features.movedim(-1, 1)
    return features if len(features) == images else features.unflatten(0, (images, -1)).movedim(1, 2)
