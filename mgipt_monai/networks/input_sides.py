# SPDX-License-Identifier: Apache-2.0
"""The one thing that the published source networks ask of an image: sides that they can halve so often."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_sides"]


def check_sides(x: Tensor, stride: int) -> None:
    """Raise ValueError unless ``x`` is (B, C, H, W) with H and W positive multiples of ``stride``."""
    if x.ndim != 4 or any(side == 0 or side % stride for side in x.shape[2:]):
        raise ValueError(
            f"input of shape {tuple(x.shape)}: expected (B, C, H, W) with H and W multiples of {stride}; "
            f"resize or pad the image, for example with monai.transforms.DivisiblePad(k={stride})"
        )
