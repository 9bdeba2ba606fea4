# SPDX-License-Identifier: Apache-2.0
"""The MONAI inferer that adapts: what an evaluator, MONAI Label and MONAI Deploy all call."""

from __future__ import annotations

from typing import Any

from monai.inferers import Inferer
from torch import Tensor, nn

from .methods.base import AdaptationMethod

__all__ = ["AdaptiveInferer"]


class AdaptiveInferer(Inferer):
    """Adapts to each image, then predicts it; it owns the update of the adaptation state.

    Args:
        method: the adaptation method, for instance :class:`mgipt_monai.MGIPT`.

    Raises:
        TypeError: if ``method`` is not an adaptation method.

    Example:
        >>> import torch
        >>> from mgipt_monai import MGIPT
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> inferer = AdaptiveInferer(MGIPT(network, steps=1))
        >>> with torch.no_grad():  # as MONAI's engines call it
        ...     inferer(inputs=torch.rand(1, 3, 32, 32), network=network).shape
        torch.Size([1, 2, 30, 30])
    """

    def __init__(self, method: AdaptationMethod) -> None:
        if not isinstance(method, AdaptationMethod):
            raise TypeError(f"method must be an adaptation method such as MGIPT(network), got {type(method).__name__}")
        self.method = method

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Adapt and predict.

        Args:
            inputs: images (B, C, \\*spatial); meta data is kept.
            network: the source network. Another object than the method's (a server's copy, a reloaded network) is
                taken over, with the adaptation state kept.
            args: not supported.
            kwargs: not supported.

        Returns:
            Logits (B, K, \\*spatial).

        Raises:
            RuntimeError: if ``network`` itself adapts with another method: each image would be adapted to twice.
            TypeError: for further arguments to the network.
        """
        if args or kwargs:
            raise TypeError(f"AdaptiveInferer gives the network images alone, got also {[*args, *kwargs]}")
        if isinstance(network, AdaptationMethod):
            if network is not self.method:
                raise RuntimeError(
                    f"the network is itself a {type(network).__name__}: with this {type(self.method).__name__} inferer "
                    "each image would be adapted to twice; keep one of the two"
                )
        elif network is not self.method.network:
            self.method.bind(network)
        return self.method(inputs)
