# SPDX-License-Identifier: Apache-2.0
"""Alignment (Eq. 2) and calibrated normalisation (Eq. 6) at the norm layers of a frozen network.

:class:`AlignedNorms` replaces the forward of the chosen layers while it is attached. Classes, weights, buffers and
state-dict keys do not change, and ``detach`` leaves no trace. A layer normalises with a :class:`Blend` and is aligned
with a mean and a deviation. :class:`BlendedNorms` and :class:`mgipt_monai.networks.SiteNorms` choose other ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mgipt_monai.networks.alignment.fused import Blend, align, alignment_loss, calibrate, instance_statistics
from mgipt_monai.networks.alignment.layers import (
    find_listed_layers,
    find_norm_layers,
    has_stored_statistics,
    layer_features,
    stored_statistics,
)
from mgipt_monai.networks.alignment.shortcuts import ChannelsLast, ForwardEnd, ForwardEndedError, FrozenPReLU
from mgipt_monai.networks.alignment.source_statistics import SourceStatistics
from mgipt_monai.networks.alignment.windows import ForwardRoute, Windows, run_in_parts

__all__ = ["AlignedNorms", "BlendedNorms", "Normalization", "check_normalization"]

Normalization = Literal["instance", "calibrated", "source"]
"""``instance``: the image's own statistics; ``calibrated``: a blend of the source's and the image's;
``source``: the stored ones (plain evaluation)."""
FARTHEST = 10.0
"""Bound on each number of a signature."""
EPS = 1e-5
"""Added to the variances of a signature, so that silent channels do not divide by zero."""


def check_normalization(name: str, value: str) -> None:
    """Raise ValueError unless ``value`` is one of the three normalisations."""
    if value not in get_args(Normalization):
        raise ValueError(f"{name} must be one of {', '.join(get_args(Normalization))}; got {value!r}")


class AlignedNorms:
    """The norm layers of a frozen network, with three normalisations and a measurement of the alignment loss.

    Layers that store statistics (batch norm) use the chosen normalisation, always with their stored statistics in the
    blend. Other layers keep their own forward, and only their features are measured.

    Args:
        network: a network with batch norm, or any with ``statistics``; it is not changed until :meth:`attach`.
        layers: regular expression on the dotted names of the layers to align; None aligns all: those that store
            statistics, or those in ``statistics``. Other layers do not change and add nothing to the loss.
        source_weight: lambda of the calibrated normalisation (Eq. 6), in [0, 1].
        statistics: what the loss aligns with; None uses the stored statistics of the layers. The first forward checks
            that they were measured with the network's weights.
        route: how images go through the network; None runs whole images.

    Raises:
        ValueError: if no layer can be aligned, ``source_weight`` is outside [0, 1], or, at the first forward, the
            statistics belong to other weights.

    Attributes:
        signature: how far the image is from the source at the first layer: ``(mean - source_mean) / source_std`` and
            ``log(std / source_std)`` of each channel, (2, C). The first :meth:`loss` since :meth:`start` takes it, or
            the forwards within :meth:`signing`; None before.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> norms = AlignedNorms(network)
        >>> image = torch.rand(2, 3, 16, 16)
        >>> norms.loss(image).shape, norms.predict(image, "calibrated").shape
        (torch.Size([2]), torch.Size([2, 4, 14, 14]))
    """

    def __init__(
        self,
        network: nn.Module,
        layers: str | None = None,
        source_weight: float = 0.8,
        statistics: SourceStatistics | None = None,
        route: ForwardRoute | None = None,
    ) -> None:
        if not 0 <= source_weight <= 1:
            raise ValueError(f"source_weight must be in [0, 1], got {source_weight}")
        self.network = network
        if statistics is None:
            self.layers = find_norm_layers(network, layers)
        else:
            self.layers = find_listed_layers(network, statistics.layers, layers, statistics.origin)
        self.source_weight = source_weight
        self.statistics = statistics
        self.targets: dict[str, tuple[Tensor, Tensor]] = {}
        self.route = ForwardRoute() if route is None else route
        self.windows: Windows | None = None
        self.images = 0
        self.normalization: Normalization = "source"
        self.losses: list[Tensor] | None = None
        self.forwards = 0
        self.forward_end = ForwardEnd()
        self._layout = ChannelsLast()
        self._replaced: list[tuple[nn.Module, Any]] | None = None
        self.thread: int | None = None  # the one that aligns; in others the layers do what they always do
        self._ready_on: torch.device | None = None
        self.signature: Tensor | None = None
        self._signs: dict[str, list[Tensor]] | None = None
        self._ends_at_first = False

    def blend(self, name: str, mean: Tensor, std: Tensor) -> Blend | None:
        """Return the blend for a layer, given its features' own mean and deviation (B, C); None uses only these."""
        if self.normalization == "instance":
            return None
        source_mean, source_std = self.stored(name)
        return Blend(source_mean, source_std.square(), self.source_weight)

    def target(self, name: str, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and deviation that a layer's features are aligned with."""
        return self.targets.get(name) or self.stored(name)

    def stored(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the mean and deviation that a layer itself stores, (C,) each."""
        mean, variance = stored_statistics(self.layers[name])
        return mean.float(), variance.float().sqrt()

    def align(self, name: str, features: Tensor) -> Tensor:
        """Normalise a layer's features (B, C, \\*spatial) with their blend, and collect their loss if requested.

        Raises:
            ForwardEndedError: if only the loss is requested, and this is the last layer that it needs.
        """
        features = features.float()
        if self.forward_end.is_last(name):
            self.measure(name, features)  # ends the forward: the normalised features are not needed
        target = None if self.losses is None else lambda mean, std: self._sign(name, mean, std)
        aligned, loss = align(features, self.layers[name], lambda mean, std: self.blend(name, mean, std), target)
        if loss is not None:
            self._collect(name, loss)
        return aligned

    def measure(self, name: str, features: Tensor) -> None:
        """Collect the loss of a layer's features (B, C, \\*spatial), and what the signature needs of them."""
        mean, std = instance_statistics(features)
        target = self._sign(name, mean, std)
        if self.losses is not None:
            self._collect(name, alignment_loss(mean, std, *target))

    def measures(self, name: str) -> bool:
        """Whether a layer's features are needed for the loss or for the signature."""
        return self.losses is not None or self._signs_at(name)

    def _signs_at(self, name: str) -> bool:
        return self._signs is not None and (not self._signs or name in self._signs)

    def _sign(self, name: str, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's target; the statistics of the first layer go into the signature."""
        if self._signs is not None and self._signs_at(name):
            source_mean, source_std = AlignedNorms.target(self, name, mean, std)
            own, source = ((each.detach().square() + EPS).sqrt() for each in (std, source_std))
            sign = torch.stack([(mean.detach() - source_mean) / source, (own / source).log()])
            self._signs.setdefault(name, []).append(sign.clamp(-FARTHEST, FARTHEST).mean(dim=1))
            if self._ends_at_first:
                raise ForwardEndedError
        return self.target(name, mean, std)

    @contextmanager
    def signing(self) -> Iterator[None]:
        """Take the signature in the forwards of the block, if it is not known: the mean over them."""
        self._signs = {} if self.signature is None else None
        try:
            yield
            for signs in (self._signs or {}).values():
                self.signature = torch.stack(signs).mean(dim=0)
        finally:
            self._signs = None

    def sign(self, image: Tensor) -> None:
        """Take the signature of an image (1, C, \\*spatial), which runs up to the first layer: not a whole forward."""
        windows = Windows(ForwardRoute(), image) if self.windows is None else self.windows
        forwards, self._ends_at_first = self.forwards, True
        try:
            with torch.no_grad(), self._using(image, "source", None), self.signing():
                for window in windows.cut(image):
                    with suppress(ForwardEndedError):
                        self._run(window)
        finally:
            self.forwards, self._ends_at_first = forwards, False

    def _collect(self, name: str, loss: Tensor) -> None:
        assert self.losses is not None  # layers measure only while losses are collected
        self.losses.append(loss)
        self.forward_end.measured(name)

    def attach(self) -> None:
        """Replace the forward of the chosen layers (once). They act as before until a normalisation is chosen."""
        if self._replaced is not None:
            return
        forwards = {layer: _AlignedLayer(self, name, layer).forward for name, layer in self.layers.items()}
        forwards |= {layer: FrozenPReLU(layer).forward for layer in FrozenPReLU.layers(self.network)}
        forwards |= self._layout.forwards(self.network)
        self._replaced = [(layer, layer.__dict__.get("forward")) for layer in forwards]
        for layer, forward in forwards.items():
            layer.forward = forward

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach within the block; what is attached already stays so."""
        was_attached = self._replaced is not None
        self.attach()
        try:
            yield
        finally:
            if not was_attached:
                self.detach()

    def detach(self) -> None:
        """Restore the layers' own forward; no effect if nothing is attached."""
        for layer, forward in self._replaced or []:
            del layer.forward
            if forward is not None:
                layer.forward = forward
        self._replaced = None

    @contextmanager
    def _using(self, images: Tensor, normalization: Normalization, losses: list[Tensor] | None) -> Iterator[None]:
        check_normalization("normalization", normalization)
        if self.network.training:
            raise RuntimeError("the network is in training mode and would change its own statistics: call eval() first")
        device = self.route.device_of(images)
        if self.statistics is not None and self._ready_on != device:
            self._prepare(self.statistics, device)
        self.normalization, self.losses, self.thread = normalization, losses, threading.get_ident()
        try:
            with self.attached():
                yield
        finally:
            self.normalization, self.losses, self.thread = "source", None, None

    def _prepare(self, statistics: SourceStatistics, device: torch.device) -> None:
        """Check the statistics and move them to the device; not done for each image, since it reads all weights."""
        statistics.check(self.network)
        self.targets = {
            name: (statistics.layers[name].mean.to(device), statistics.layers[name].std.to(device))
            for name in self.layers
        }
        self._ready_on = device

    def start(self, image: Tensor) -> None:
        """Start an image (1, C, \\*spatial): count its forwards, and choose the windows of its loss."""
        self.forwards, self.signature = 0, None
        # the order of the layers is recorded once per image
        self.forward_end = ForwardEnd()
        self._layout.start()
        self.windows = Windows(self.route, image)

    @property
    def loss_windows(self) -> int:
        """Number of windows in which the image's loss is measured, each at the cost of one forward."""
        return 1 if self.windows is None else self.windows.count

    def _run(self, images: Tensor) -> Tensor:
        self.images = len(images)
        self.forwards += len(images)
        # without another normalisation, predictions are bit-identical to the network's own
        if self.normalization == "source" or not any(map(has_stored_statistics, self.layers.values())):
            return self._forward(images)
        return self._layout.run(self._forward, images)

    def _forward(self, images: Tensor) -> Tensor:
        """Run the network; a repeated forward starts again with no losses."""
        if self.forward_end.restart():
            self.losses = []
        return self.route.run(self.network, images)

    def predict(self, images: Tensor, normalization: Normalization = "source") -> Tensor:
        """Run the network, one forward per image or window: images (B, C, \\*spatial) to logits (B, K, \\*spatial)."""
        with self._using(images, normalization, None):
            return run_in_parts(lambda part: self.route.inferer(part, self._run), images)

    def run(self, images: Tensor, normalization: Normalization = "source") -> Tensor:
        """Run the network on images (B, C, \\*spatial) as they are, such as windows that an inferer has cut."""
        with self._using(images, normalization, None):
            return self._run(images)

    def predict_windows(self, images: Tensor, normalization: Normalization = "source") -> Tensor:
        """Run the network only where the loss is measured: logits of the windows side by side (B, K, ...)."""
        with self._using(images, normalization, None):
            windows = Windows(ForwardRoute(), images) if self.windows is None else self.windows
            return run_in_parts(lambda part: windows.predict(part, self._run), images)

    def predict_and_measure(self, image: Tensor, normalization: Normalization = "source") -> tuple[Tensor, float]:
        """Predict one image (1, C, \\*spatial) and measure its alignment loss in the same forwards.

        Returns:
            Logits (1, K, \\*spatial), and the mean loss over the aligned layers and, with windows, over all windows.
        """
        with self._using(image, normalization, []):
            logits = self.route.inferer(image, self._run)
            return logits, torch.cat(self._measurements()).mean().item()

    def loss(self, images: Tensor, normalization: Normalization = "instance") -> Tensor:
        """Run the network for its alignment loss L (Eq. 2), the mean over the aligned layers and the windows.

        Args:
            images: (B, C, \\*spatial).
            normalization: the layers' normalisation during the forward.

        Raises:
            RuntimeError: if the network is in training mode, or no aligned layer takes part.

        Returns:
            One loss per image (B,), differentiable with respect to the images.
        """
        with self._using(images, normalization, []), self.signing():
            windows = Windows(ForwardRoute(), images) if self.windows is None else self.windows
            return windows.loss(images, self._measured)

    def _measured(self, images: Tensor) -> Tensor:
        with self.forward_end.forward():
            self._run(images)
        return torch.stack(self._measurements()).mean(dim=0)

    def _measurements(self) -> list[Tensor]:
        """Return the losses that the layers have measured since ``losses`` was emptied."""
        if not self.losses:
            raise RuntimeError(f"none of the aligned layers took part in the forward: {', '.join(self.layers)}")
        return self.losses


def _in_backward() -> bool:
    """Whether this thread is in a backward pass, where activation checkpointing runs parts of a network again."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


class _AlignedLayer:
    """Replaces one layer's forward; as a bound method it survives deepcopy and pickle."""

    def __init__(self, norms: AlignedNorms, name: str, layer: nn.Module) -> None:
        self.norms, self.name, self.layer = norms, name, layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do what the layer does, with the chosen normalisation, and measure its loss."""
        norms, layer = self.norms, self.layer
        # somebody else runs the network meanwhile; a recomputed checkpoint runs in autograd's own thread on a GPU
        if norms.thread != threading.get_ident() and not _in_backward():
            return type(layer).forward(layer, x, *args, **kwargs)
        # a layer without stored statistics already normalises each image by itself, or is not a norm layer
        if norms.normalization != "source" and has_stored_statistics(layer):
            features = layer_features(layer, x, x, norms.images)
            if features is not None:
                aligned = norms.align(self.name, features).to(x.dtype)
                return aligned if len(x) == norms.images else aligned.movedim(2, 1).flatten(0, 1)
        output = type(layer).forward(layer, x, *args, **kwargs)
        if norms.measures(self.name):
            features = layer_features(layer, x, output, norms.images)
            if features is not None:
                norms.measure(self.name, features.float())
        return output


class BlendedNorms(AlignedNorms):
    """VPTTA's norm layers: with ``calibrated`` they are aligned with the same blend that they normalise with.

    The blend's mean and variance are ``source_weight * source + (1 - source_weight) * image``. The blend is treated as
    a constant: no gradient flows through it, neither in the target nor in the normalisation. The logits equal those of
    :class:`AlignedNorms`; with other normalisations the loss does too. With ``statistics`` these are the source's part
    of the target, also at layers that keep their own forward.

    Args:
        network: see :class:`AlignedNorms`.
        layers: see :class:`AlignedNorms`.
        source_weight: weight of the source in the blend; may be changed for each image.
        statistics: see :class:`AlignedNorms`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> image = torch.rand(1, 3, 16, 16)
        >>> near, far = (BlendedNorms(network, source_weight=weight).loss(image, "calibrated") for weight in (0.1, 0.9))
        >>> bool(near < far)
        True
    """

    def target(self, name: str, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blend without gradient for ``calibrated``, otherwise the source's statistics."""
        source = super().target(name, mean, std)
        if self.normalization != "calibrated":
            return source
        target_mean, target_variance = calibrate(mean.detach(), std.detach(), *source, self.source_weight)
        return target_mean, target_variance.sqrt()

    def blend(self, name: str, mean: Tensor, std: Tensor) -> Blend | None:
        """Return the blend of :class:`AlignedNorms`, without gradient for ``calibrated``."""
        blend = super().blend(name, mean, std)
        return blend if blend is None or self.normalization != "calibrated" else blend._replace(fixed=True)
