# SPDX-License-Identifier: Apache-2.0
"""One layer while its network is aligned: how it normalises, and how far its features are from the source (Eq. 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .calibration import calibrate
from .fused_normalization import align, alignment_loss, instance_statistics
from .layer_features import layer_features
from .norm_layers import has_stored_statistics

if TYPE_CHECKING:
    from .alignment import AlignedNorms

__all__ = ["AlignedLayer"]


class AlignedLayer:
    """What one layer of :class:`AlignedNorms` does while it is attached.

    The layer's forward is a bound method of it, which survives deepcopy and pickle. Another alignment overrides
    ``target``, or
    ``blend`` along with ``share``.
    """

    def __init__(self, norms: AlignedNorms, name: str) -> None:
        self.norms, self.name, self.layer = norms, name, norms.layers[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do what the layer does, with the chosen normalisation, and measure its loss.

        Raises:
            ForwardEndedError: if the loss is all that is asked for, and this is the last layer that it needs.
        """
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
                self.measure(features)
        return output

    def align(self, features: Tensor) -> Tensor:
        """Normalise features (B, C, \\*spatial) with the image's part in it, and measure their loss."""
        if self.norms.end.is_last(self.name):
            self.measure(features)  # it ends the forward: nobody looks at the normalised features
        target = None if self.norms.losses is None else self.target
        aligned, loss = align(features, self.layer, self.blend, self.share(), target)
        if loss is not None:
            self.add(loss)
        return aligned

    def measure(self, features: Tensor) -> None:
        """Measure the loss of features."""
        mean, std = instance_statistics(features)
        self.add(alignment_loss(mean, std, *self.target(mean, std)))

    def add(self, loss: Tensor) -> None:
        """Add the layer's loss to those collected."""
        self.norms.losses.append(loss)
        self.norms.end.measured(self.name)

    def target(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation to align with."""
        return self.norms.targets.get(self.name) or self.stored()

    def blend(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance to normalise with."""
        if self.norms.normalization == "instance":
            return mean, std.square()
        return calibrate(mean, std, *self.stored(), self.norms.source_weight)

    def share(self) -> float:
        """How much the blend changes with the image's own mean and variance; 0 lets no gradient through it."""
        return 1.0 if self.norms.normalization == "instance" else 1 - self.norms.source_weight

    def stored(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation that the layer itself stores."""
        return self.layer.running_mean, self.layer.running_var.sqrt()
