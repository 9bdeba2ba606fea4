# SPDX-License-Identifier: Apache-2.0
"""One layer while its network is aligned: how it normalises, and how far its features are from the source (Eq. 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .calibration import calibrate, instance_statistics, normalize
from .layer_features import layer_features
from .norm_layers import has_stored_statistics

if TYPE_CHECKING:
    from .alignment import AlignedNorms

__all__ = ["AlignedLayer", "alignment_loss"]


def alignment_loss(mean: Tensor, std: Tensor, source_mean: Tensor, source_std: Tensor) -> Tensor:
    """Distance of a layer's input statistics from the source's (Eq. 2).

    Args:
        mean: (B, C).
        std: (B, C).
        source_mean: (C,).
        source_std: (C,).

    Returns:
        One loss per sample (B,): mean over the channels of the absolute differences of mean and of deviation.
    """
    return (mean - source_mean).abs().mean(dim=1) + (std - source_std).abs().mean(dim=1)


class AlignedLayer:
    """What one layer of :class:`AlignedNorms` does while it is attached.

    The layer's forward is a bound method of it, which survives deepcopy and pickle. Another alignment overrides
    ``target`` or ``blend``.
    """

    def __init__(self, norms: AlignedNorms, name: str) -> None:
        self.norms, self.name, self.layer = norms, name, norms.layers[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do what the layer does, with the chosen normalisation, and measure its loss."""
        norms, layer = self.norms, self.layer
        # a layer that stores no statistics normalises each image by itself already, or is no norm layer
        if norms.normalization != "source" and has_stored_statistics(layer):
            features = layer_features(layer, x, x, norms.images)
            if features is not None:
                aligned = self.align(features)
                return aligned if len(x) == norms.images else aligned.movedim(2, 1).flatten(0, 1)
        output = type(layer).forward(layer, x, *args, **kwargs)
        if norms.losses is not None:
            features = layer_features(layer, x, output, norms.images)
            if features is not None:
                self.measure(*instance_statistics(features))
        return output

    def align(self, features: Tensor) -> Tensor:
        """Normalise features (B, C, \\*spatial) with the image's part in it, and measure their loss."""
        mean, std = instance_statistics(features)
        self.measure(mean, std)
        return normalize(features, *self.blend(mean, std), self.layer)

    def measure(self, mean: Tensor, std: Tensor) -> None:
        """Add the layer's loss where losses are collected."""
        if self.norms.losses is not None:
            self.norms.losses.append(alignment_loss(mean, std, *self.target(mean, std)))

    def target(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation to align with."""
        return self.norms.targets.get(self.name) or self.stored()

    def blend(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance to normalise with."""
        if self.norms.normalization == "instance":
            return mean, std.square()
        return calibrate(mean, std, *self.stored(), self.norms.source_weight)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation that the layer itself stores."""
        return self.layer.running_mean, self.layer.running_var.sqrt()
