# SPDX-License-Identifier: Apache-2.0
"""Alignment (Eq. 2): a frozen network whose norm layers measure how far an image is from the source.

:class:`AlignedNorms` puts its own forward over the chosen norm layers while it is attached. Classes, weights, buffers
and state-dict keys stay as they are, and ``detach`` leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Normalization, calibrate, check_normalization, instance_statistics, normalize
from .norm_layers import find_norm_layers

__all__ = ["AlignedNorms", "alignment_loss"]


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


class _AlignedForward:
    """What one norm layer does while it is attached. A bound method of it survives deepcopy and pickle."""

    def __init__(self, norms: AlignedNorms, layer: nn.Module) -> None:
        self.norms = norms
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        norms, layer = self.norms, self.layer
        # without spatial axes there are no statistics of one sample
        if x.ndim < 3 or (norms.normalization == "source" and norms.losses is None):
            return type(layer).forward(layer, x)
        return self.align(x)

    def align(self, x: Tensor) -> Tensor:
        """Measure the layer's loss where losses are collected, and normalise. Another alignment overrides this."""
        norms, layer = self.norms, self.layer
        source_mean, source_std = layer.running_mean, layer.running_var.sqrt()
        mean, std = instance_statistics(x)
        if norms.losses is not None:
            norms.losses.append(alignment_loss(mean, std, source_mean, source_std))
        if norms.normalization == "source":
            return type(layer).forward(layer, x)
        variance = std.square()
        if norms.normalization == "calibrated":
            mean, variance = calibrate(mean, std, source_mean, source_std, norms.source_weight)
        return normalize(x, mean, variance, layer)


class AlignedNorms:
    """The norm layers of a frozen network, able to normalise in three ways and to measure the alignment loss.

    Args:
        network: a network with batch norm; it is not changed until :meth:`attach`.
        layers: regular expression on the dotted names of the layers to align; None aligns all. The others keep
            normalising with their stored statistics and add nothing to the loss.
        source_weight: lambda of the calibrated normalisation (Eq. 6), in [0, 1].

    Raises:
        ValueError: if no layer can be aligned, or ``source_weight`` is outside [0, 1].

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> norms = AlignedNorms(network)
        >>> image = torch.rand(2, 3, 16, 16)
        >>> norms.loss(image).shape, norms.predict(image, "calibrated").shape
        (torch.Size([2]), torch.Size([2, 4, 14, 14]))
    """

    layer_forward = _AlignedForward

    def __init__(self, network: nn.Module, layers: str | None = None, source_weight: float = 0.8) -> None:
        if not 0 <= source_weight <= 1:
            raise ValueError(f"source_weight must be in [0, 1], got {source_weight}")
        self.network = network
        self.layers = find_norm_layers(network, layers)
        self.source_weight = source_weight
        self.normalization: Normalization = "source"
        self.losses: list[Tensor] | None = None
        self.forwards = 0
        self._covered: list[tuple[nn.Module, Any]] | None = None

    def attach(self) -> None:
        """Put the aligned forward over the chosen layers (once). They act as before until a normalisation is chosen."""
        if self._covered is not None:
            return
        self._covered = [(layer, layer.__dict__.get("forward")) for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.forward = self.layer_forward(self, layer).forward

    def detach(self) -> None:
        """Give the layers the forward back that they had; without effect where nothing is attached."""
        for layer, forward in self._covered or []:
            del layer.forward
            if forward is not None:
                layer.forward = forward
        self._covered = None

    @contextmanager
    def _using(self, normalization: Normalization, losses: list[Tensor] | None) -> Iterator[None]:
        check_normalization("normalization", normalization)
        if self.network.training:
            raise RuntimeError("the network is in training mode, it would change its own statistics: call eval() first")
        was_attached = self._covered is not None
        if not was_attached:
            self.attach()
        self.normalization, self.losses = normalization, losses
        try:
            yield
        finally:
            self.normalization, self.losses = "source", None
            if not was_attached:
                self.detach()

    def predict(self, images: Tensor, normalization: Normalization = "source") -> Tensor:
        """Run the network, one forward per image: images (B, C, \\*spatial) to logits (B, K, \\*spatial)."""
        with self._using(normalization, None):
            self.forwards += len(images)
            return self.network(images)

    def loss(self, images: Tensor, normalization: Normalization = "instance") -> Tensor:
        """Run the network for its alignment loss L (Eq. 2), the mean over the aligned layers.

        Args:
            images: (B, C, \\*spatial).
            normalization: how the layers normalise meanwhile.

        Raises:
            RuntimeError: if the network is in training mode, or no aligned layer takes part.

        Returns:
            One loss per image (B,), differentiable with respect to the images.
        """
        losses: list[Tensor] = []
        with self._using(normalization, losses):
            self.forwards += len(images)
            self.network(images)
        if not losses:
            raise RuntimeError(f"none of the aligned layers took part in the forward: {', '.join(self.layers)}")
        return torch.stack(losses).mean(dim=0)
