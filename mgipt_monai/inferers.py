# SPDX-License-Identifier: Apache-2.0
"""The MONAI inferer that adapts: what an evaluator, MONAI Label and MONAI Deploy all call."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from monai.inferers import Inferer, SimpleInferer, SliceInferer
from torch import Tensor, nn

from .methods.base import AdaptationMethod

__all__ = ["AdaptiveInferer"]

Slices = Literal["shared", "own"]


class AdaptiveInferer(Inferer):
    """Adapts to each image, then predicts it; it owns the update of the adaptation state.

    Args:
        method: the adaptation method, for instance :class:`mgipt_monai.MGIPT`.
        inferer: what the method runs the network through: None for whole images, or a pipeline's
            ``SlidingWindowInferer`` or ``SliceInferer``. Every window sees its part of the prompted whole image.
        windows: in how many windows an image is looked at while it is adapted to.
        slices: with a ``SliceInferer`` (a 2D network on volumes), whether the volume is one image whose prompt all
            slices share (``shared``: one scanner made them all, and neighbours stay alike), or each slice is an image
            with a prompt of its ``own``, which costs as many adaptations; constant slices are then predicted without.

    Raises:
        TypeError: if ``method`` is not an adaptation method, or cannot predict through ``inferer``.
        ValueError: for fewer than one window.

    Example:
        >>> import torch
        >>> from mgipt_monai import MGIPT
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> inferer = AdaptiveInferer(MGIPT(network, steps=1))
        >>> with torch.no_grad():  # as MONAI's engines call it
        ...     inferer(inputs=torch.rand(1, 3, 32, 32), network=network).shape
        torch.Size([1, 2, 30, 30])
    """

    def __init__(
        self, method: AdaptationMethod, inferer: Inferer | None = None, windows: int = 2, slices: Slices = "shared"
    ) -> None:
        if not isinstance(method, AdaptationMethod):
            raise TypeError(f"method must be an adaptation method such as MGIPT(network), got {type(method).__name__}")
        self.method = method
        self.inferer = SimpleInferer() if inferer is None else inferer
        self.windows = windows
        self.slices = slices
        if slices not in get_args(Slices):
            raise ValueError(f"slices must be one of {', '.join(get_args(Slices))}; got {slices!r}")
        if slices == "own" and not isinstance(self.inferer, SliceInferer):
            raise ValueError(f"slices='own' needs a SliceInferer, got {type(self.inferer).__name__}")
        method.predict_through(*self._route())

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
        self.bind(network)
        self.method.predict_through(*self._route())
        return self._slice_by_slice(inputs) if self.slices == "own" else self.method(inputs)

    def bind(self, network: nn.Module) -> None:
        """Let the method adapt this network, if it is another one than before.

        Raises:
            RuntimeError: if it is itself an adaptation method, and not this inferer's.
        """
        if isinstance(network, AdaptationMethod):
            if network is not self.method:
                raise RuntimeError(
                    f"the network is itself a {type(network).__name__}: with this {type(self.method).__name__} inferer "
                    "each image would be adapted to twice; keep one of the two"
                )
        elif network is not self.method.network:
            self.method.bind(network)

    def _route(self) -> tuple[Inferer, int]:
        return (SimpleInferer() if self.slices == "own" else self.inferer), self.windows

    def _slice_by_slice(self, volumes: Tensor) -> Tensor:
        axis = self.inferer.spatial_dim + 2
        before, outputs, records = self.method.adaptation_state(), [], []
        try:
            for volume in volumes.split(1):
                logits, done = zip(*(self._one_slice(one) for one in volume.unbind(axis)), strict=True)
                outputs.append(torch.stack(logits, axis))
                costs = {key: sum(each[key] for each in done) for key in ("forwards", "backwards")}
                adapted = [each["index"] for each in done if "index" in each]
                records.append({"index": min(adapted, default=None), "adapted_slices": len(adapted), **costs})
        except BaseException:
            self.method.load_adaptation_state(before)
            raise
        self.method.last = records
        return torch.cat(outputs)

    def _one_slice(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        if image.min() == image.max():
            with torch.no_grad():
                return self.method.network(image), {"forwards": 1, "backwards": 0}
        return self.method(image), self.method.last[0]
