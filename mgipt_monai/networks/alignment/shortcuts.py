# SPDX-License-Identifier: Apache-2.0
"""What makes a forward of a frozen network cheaper and leaves its numbers as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ChannelsLast", "ForwardEnd", "ForwardEndedError", "FrozenPReLU"]


class ForwardEndedError(BaseException):
    """Leaves the network at the last measured layer; it is no ``Exception``, so that the network does not catch it."""


class ForwardEnd:
    """The order in which layers are measured, seen in a whole forward, by which later ones know their last layer.

    A forward ends early where the same layers were measured in the same order, and as often, as in the latest whole
    forward. One that differs is run whole, and its order is the one to know from then on.

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
        """Run a forward within it that may end early."""
        self._seen = []
        try:
            yield
            self._known = self._seen
        except ForwardEndedError:
            pass
        finally:
            self._seen = None

    def begin(self) -> bool:
        """Begin the forward, or begin it anew, with nothing measured; return whether it is one that may end early."""
        if self._seen is not None:
            self._seen = []
        return self._seen is not None

    def is_last(self, name: str) -> bool:
        """Whether this forward ends at the layer, if it is measured now."""
        return self._seen is not None and [*self._seen, name] == self._known

    def measured(self, name: str) -> None:
        """Take note of a layer that has been measured.

        Raises:
            ForwardEndedError: if it was the last one.
        """
        last = self.is_last(name)
        if self._seen is not None:
            self._seen.append(name)
        if last:
            raise ForwardEndedError


class ChannelsLast:
    """Runs a network on 2D images with the channels innermost (``torch.channels_last``).

    The numbers are the same up to rounding. Weights stay as they are: convolutions follow the image's order, and other
    layers the convolutions'. A network that cannot take it, since it calls ``view`` on features, is given the images as
    they are, from then on.

    Attributes:
        refused: whether the network could not take it.
    """

    def __init__(self) -> None:
        self.refused = False

    def run(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return the network's output for images (B, C, \\*spatial)."""
        if self.refused or images.ndim != 4 or images.device.type != "cpu":
            return network(images)
        try:
            # a copy: with one channel the strides of both orders can be the same, and the first layer takes its pick
            return network(images.clone(memory_format=torch.channels_last)).contiguous()
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            self.refused = True
            return network(images)


class FrozenPReLU:
    """What a ``PReLU`` with one slope does while its network is aligned.

    Its forward is a bound method, as that of :class:`AlignedLayer`.
    """

    def __init__(self, layer: nn.PReLU) -> None:
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer returns, bit for bit."""
        weight = self.layer.weight
        if weight.requires_grad or not x.requires_grad or x.device.type != "cpu":
            return nn.PReLU.forward(self.layer, x)
        return functional.leaky_relu(x, weight.item())

    @staticmethod
    def layers(network: nn.Module) -> list[nn.PReLU]:
        """Return the layers of a network that are a PReLU with one slope."""
        return [layer for layer in network.modules() if type(layer) is nn.PReLU and layer.num_parameters == 1]
