# SPDX-License-Identifier: Apache-2.0
"""The training loss of the source network of the polyp protocol."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BoundaryWeightedLoss"]


class BoundaryWeightedLoss(nn.Module):
    """Binary cross-entropy plus soft IoU loss, both with higher weights for pixels near a boundary of the mask.

    With mask g, probability p = sigmoid(logits) and the mean a of g over a square window around a pixel, the weight of
    the pixel is w = 1 + strength * |a - g|: 1 if the window has one class, almost 1 + strength if all other pixels in
    it are of the other class. For each image and channel, with sums over pixels::

        loss = sum(w * bce(p, g)) / sum(w)  +  1 - (sum(w * g * p) + 1) / (sum(w * (g + p - g * p)) + 1)

    The window ends at the image border, so that a structure cut off there has no boundary there. The 1 in the fraction
    gives empty masks a gradient.

    Source: the loss of PraNet (Fan et al., MICCAI 2020), from Wei et al., "F3Net", AAAI 2020. That paper divides the
    cross-entropy by the sum of w - 1, which is 0 for a mask of one class; here it is a weighted mean.

    Args:
        window: side of the window in pixels, odd; 31 is for images of 352 pixels.
        strength: additional weight of the boundary, at least 0; with 0 all pixels have the same weight.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> mask = torch.zeros(2, 1, 64, 64)
        >>> mask[..., 20:40, 20:40] = 1
        >>> BoundaryWeightedLoss()(20 * mask - 10, mask).item() < 0.001
        True
    """

    def __init__(self, window: int = 31, strength: float = 5.0) -> None:
        super().__init__()
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be a positive odd number of pixels, got {window}")
        if not strength >= 0:
            raise ValueError(f"strength must be at least 0, got {strength}")
        self.window = window
        self.strength = strength

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the mean loss over images and channels, a scalar, at least 0.

        Args:
            logits: (B, K, H, W), one channel per structure.
            mask: (B, K, H, W), in [0, 1].

        Raises:
            ValueError: if the shapes differ or are not 4-D.
        """
        if logits.ndim != 4 or logits.shape != mask.shape:
            raise ValueError(
                f"logits and mask need one shape (B, K, H, W), got {tuple(logits.shape)} and {tuple(mask.shape)}"
            )
        mask = mask.to(logits.dtype)
        around = functional.avg_pool2d(mask, self.window, stride=1, padding=self.window // 2, count_include_pad=False)
        weight = 1 + self.strength * (around - mask).abs()
        entropy = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        probability = torch.sigmoid(logits)
        both = (weight * mask * probability).sum(dim=(2, 3))
        either = (weight * (mask + probability)).sum(dim=(2, 3)) - both
        weighted_mean = (weight * entropy).sum(dim=(2, 3)) / weight.sum(dim=(2, 3))
        return (weighted_mean + 1 - (both + 1) / (either + 1)).mean()
