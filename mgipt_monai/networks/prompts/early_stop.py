# SPDX-License-Identifier: Apache-2.0
"""Early stop (Eq. 4): a label-free check of whether growing the instance prompt helps, and its jitter."""

from __future__ import annotations

from typing import Literal, get_args

from monai.losses import DiceLoss
from monai.networks.utils import one_hot
from monai.transforms import Randomizable
from torch import Tensor

__all__ = ["Head", "PhotometricJitter", "binarize", "consistency_score", "got_worse"]

Head = Literal["sigmoid", "softmax"]
"""How logits become a mask: each channel thresholded at 0.5, or the largest channel (channel 0 is background)."""


def check_head(head: str) -> None:
    """Raise ValueError unless ``head`` is one of the two."""
    if head not in get_args(Head):
        raise ValueError(f"head must be one of {', '.join(get_args(Head))}; got {head!r}")


def binarize(logits: Tensor, head: Head) -> Tensor:
    """Turn logits (B, K, \\*spatial) into masks of 0 and 1: K channels for sigmoid, K - 1 (no background) for softmax.

    Raises:
        ValueError: for a softmax head with one channel.
    """
    check_head(head)
    if head == "sigmoid":
        return (logits > 0).float()
    if logits.shape[1] < 2:
        raise ValueError("a softmax head needs at least two channels; use head='sigmoid' for this network")
    return one_hot(logits.argmax(dim=1, keepdim=True), num_classes=logits.shape[1])[:, 1:]


def consistency_score(logits: Tensor, jittered_logits: Tensor, head: Head = "sigmoid") -> float:
    """Dice distance between the masks of an image and of its jittered view; 0 is full agreement, 1 is none.

    Args:
        logits: (1, K, \\*spatial).
        jittered_logits: same shape.
        head: how logits become masks.

    Returns:
        One minus the Dice over all channels together, smoothed by 1e-5.

    Example:
        >>> import torch
        >>> consistency_score(torch.ones(1, 2, 8, 8), torch.ones(1, 2, 8, 8))
        0.0
    """
    dice = DiceLoss(smooth_nr=1e-5, smooth_dr=1e-5)
    # flattened, so that all channels share one Dice
    masks = [binarize(each, head).flatten(1)[:, None] for each in (logits, jittered_logits)]
    return float(dice(*masks))


def got_worse(previous: float, score: float) -> bool:
    """Whether growing made the consistency strictly worse, in which case the previous size is kept."""
    return previous < score


class PhotometricJitter(Randomizable):
    """Random brightness and contrast within an image's own value range.

    Brightness scales the distance from the image's minimum, contrast the distance from its mean; the result is clipped
    to the image's range. It therefore suits images in [0, 1], standardised images and CT alike.

    Args:
        brightness: the factor is drawn from 1 - brightness to 1 + brightness.
        contrast: the same for the contrast.

    Raises:
        ValueError: if a setting is outside [0, 1).

    Example:
        >>> import torch
        >>> jitter = PhotometricJitter().set_random_state(seed=0)
        >>> jitter(torch.rand(1, 3, 16, 16)).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(self, brightness: float = 0.2, contrast: float = 0.2) -> None:
        for name, value in (("brightness", brightness), ("contrast", contrast)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        self.brightness = brightness
        self.contrast = contrast

    def __call__(self, image: Tensor) -> Tensor:
        """Return a jittered copy of one image (1, C, \\*spatial)."""
        brightness = 1 + self.R.uniform(-self.brightness, self.brightness)
        contrast = 1 + self.R.uniform(-self.contrast, self.contrast)
        low, high = image.amin(), image.amax()
        brighter = ((image - low) * brightness + low).clamp(low, high)
        mean = brighter.mean()
        return ((brighter - mean) * contrast + mean).clamp(low, high)
