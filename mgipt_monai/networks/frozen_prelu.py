# SPDX-License-Identifier: Apache-2.0
"""PReLU whose slope is not trained: a leaky ReLU, whose gradient takes a CPU a fraction of the time."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FrozenPReLU"]


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
    def fits(layer: nn.Module) -> bool:
        """Whether the layer is a PReLU with one slope."""
        return type(layer) is nn.PReLU and layer.num_parameters == 1
