# SPDX-License-Identifier: Apache-2.0
"""No adaptation: the baseline for all methods."""

from __future__ import annotations

from torch import Tensor

from mgipt_monai.methods.base import AdaptationMethod, Prediction

__all__ = ["Source"]


class Source(AdaptationMethod):
    """The unadapted source network, behind the interface of the adaptation methods.

    Adapts nothing and keeps nothing between images. Cost: 1 F (one forward of the network).

    Args:
        network: the source network.

    Example:
        >>> import torch
        >>> source = Source(torch.nn.Conv2d(3, 2, 1))
        >>> source(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    takes_windows = True

    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        logits, forwards = self._predict_unadapted(image)
        return Prediction(logits, {"forwards": forwards, "backwards": 0}, unadapted=logits)
