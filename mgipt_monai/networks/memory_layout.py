# SPDX-License-Identifier: Apache-2.0
"""In which order features lie in memory: on a CPU, 2D convolutions are faster with the channels innermost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ChannelsLast"]


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
