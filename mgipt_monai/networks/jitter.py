# SPDX-License-Identifier: Apache-2.0
"""The photometric jitter of the consistency check."""

from __future__ import annotations

from monai.transforms import Randomizable
from torch import Tensor

__all__ = ["PhotometricJitter"]


class PhotometricJitter(Randomizable):
    """Random brightness and contrast within an image's own value range.

    Brightness scales the distance from the image's minimum, contrast the distance from its mean; the result is clipped
    to the image's range. So it fits images in [0, 1], standardised images and CT alike.

    Args:
        brightness: the factor is drawn from 1 - brightness to 1 + brightness.
        contrast: likewise.

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
