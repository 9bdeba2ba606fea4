# SPDX-License-Identifier: Apache-2.0
"""Speed-ups for the forwards of a frozen network, with the same numbers up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ChannelsLast", "ForwardEnd", "ForwardEndedError", "FrozenConv", "FrozenPReLU"]


class ForwardEndedError(BaseException):
    """Leaves the network at the last measured layer; not an ``Exception``, so that the network does not catch it."""


class ForwardEnd:
    """Ends forwards at the last measured layer, which it knows from the latest complete forward.

    A forward ends early if the same layers were measured in the same order, and equally often, as in the latest
    complete forward. One that differs runs completely, and its order replaces the known one.

    Example:
        >>> end = ForwardEnd()
        >>> def run(*layers: str) -> list[str]:
        ...     done = []
        ...     with end.forward():
        ...         for layer in layers:
        ...             done.append(layer)
        ...             end.measured(layer)
        ...         done.append("head")
        ...     return done
        >>> run("encoder", "decoder"), run("encoder", "decoder")
        (['encoder', 'decoder', 'head'], ['encoder', 'decoder'])
    """

    def __init__(self) -> None:
        self._known: list[str] = []
        self._seen: list[str] | None = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Let the forward within the block end early."""
        self._seen = []
        try:
            yield
            self._known = self._seen
        except ForwardEndedError:
            pass
        finally:
            self._seen = None

    def restart(self) -> bool:
        """Start the forward, or start it again, with no layer measured; return whether it may end early."""
        if self._seen is not None:
            self._seen = []
        return self._seen is not None

    def is_last(self, name: str) -> bool:
        """Whether the forward ends at this layer, if it is measured now."""
        return self._seen is not None and [*self._seen, name] == self._known

    def measured(self, name: str) -> None:
        """Note that a layer has been measured.

        Raises:
            ForwardEndedError: if it was the last one.
        """
        last = self.is_last(name)
        if self._seen is not None:
            self._seen.append(name)
        if last:
            raise ForwardEndedError


class ChannelsLast:
    """Runs a network on 2D images in the memory format ``torch.channels_last``, on a CPU.

    The numbers are the same up to rounding. Weights keep their format: convolutions follow the format of the image, and
    other layers that of the convolutions. If the network fails because it calls ``view`` on features, images keep their
    format from then on.

    Attributes:
        refused: whether the network failed with it.
        weights: copies of weights in that format, which :class:`FrozenConv` keeps for one image.
    """

    def __init__(self) -> None:
        self.refused = False
        self.weights: dict[nn.Module, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the copies out of pickles and deep copies."""
        return {"refused": self.refused, "weights": None}

    def start(self) -> None:
        """Start an image: weights may have changed since the last one."""
        self.weights = {}

    def forwards(self, network: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """Return the forwards that convolutions of a network have while it is aligned."""
        layers = [layer for layer in network.modules() if type(layer) is nn.Conv2d]
        return {layer: FrozenConv(layer, self).forward for layer in layers if not layer.weight.requires_grad}

    def run(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return the network's output for images (B, C, \\*spatial)."""
        if self.refused or images.ndim != 4 or images.device.type != "cpu":
            return network(images)
        try:
            # copied: with one channel both formats can have the same strides, and the first layer picks either
            return network(images.clone(memory_format=torch.channels_last)).contiguous()
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            self.refused = True
            return network(images)


class FrozenConv:
    """A faster forward for a frozen ``Conv2d`` while its network is aligned, bit-identical.

    Torch brings the weights to the format of the image in each forward and once more in each backward. Here an image
    does so once. Nothing is kept outside an image, nor for weights that are trained.
    """

    def __init__(self, layer: nn.Conv2d, layout: ChannelsLast) -> None:
        self.layer, self.layout = layer, layout

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        weight, kept = self.layer.weight, self.layout.weights
        innermost = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if kept is None or not innermost or x.device.type != "cpu" or weight.requires_grad:
            return nn.Conv2d.forward(self.layer, x)
        if self.layer not in kept:
            kept[self.layer] = weight.detach().contiguous(memory_format=torch.channels_last)
        return self.layer._conv_forward(x, kept[self.layer], self.layer.bias)


class FrozenPReLU:
    """A faster forward for a ``PReLU`` with one slope while its network is aligned.

    The forward is a bound method, which survives deepcopy and pickle.
    """

    def __init__(self, layer: nn.PReLU) -> None:
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, bit-identical."""
        weight = self.layer.weight
        if weight.requires_grad or not x.requires_grad or x.device.type != "cpu":
            return nn.PReLU.forward(self.layer, x)
        return functional.leaky_relu(x, weight.item())

    @staticmethod
    def layers(network: nn.Module) -> list[nn.PReLU]:
        """Return a network's ``PReLU`` layers with one slope."""
        return [layer for layer in network.modules() if type(layer) is nn.PReLU and layer.num_parameters == 1]
