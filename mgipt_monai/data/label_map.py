# SPDX-License-Identifier: Apache-2.0
"""One image of grey values from a mask per structure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

__all__ = ["LabelMapd", "draw_label_map"]


def draw_label_map(masks: Tensor, values: Sequence[int]) -> Tensor:
    """Draw masks over each other, later channels over earlier ones: (C, \\*spatial) of 0 and 1 to (1, \\*spatial).

    Raises:
        ValueError: if there are not as many channels as values.

    Example:
        >>> draw_label_map(torch.tensor([[[1, 1, 0]], [[0, 1, 0]]]), values=[1, 2])
        tensor([[[1, 2, 0]]])
    """
    if masks.shape[0] != len(values):
        raise ValueError(f"the prediction has {masks.shape[0]} channels, mask_values has {len(values)}")
    drawn = torch.zeros_like(masks[:1])
    for channel, value in zip(masks, values, strict=True):
        drawn[0][channel > 0] = value
    return drawn


class LabelMapd(MapTransform):
    """Turn masks into the array that a MONAI Label server writes: unsigned bytes without a channel axis.

    Its writer takes axes as MONAI's readers give them by default: photographs columns first (W, H), and volumes with
    all axes of the file, that of a single slice included.

    Args:
        keys: masks of 0 and 1 in the input's geometry, one channel per structure (C, \\*spatial), with its meta data.
        values: the value that each channel's structure gets; a later channel is drawn over an earlier one.
        reverse_indexing: whether photographs were read columns first already.

    Raises:
        ValueError: when called, if there are not as many channels as values.

    Example:
        >>> from monai.data import MetaTensor
        >>> masks = MetaTensor(torch.ones(2, 4, 6), meta={"filename_or_obj": "eye.png"})  # four rows
        >>> drawn = LabelMapd("pred", values=[1, 2])({"pred": masks})["pred"]
        >>> drawn.shape, drawn.dtype
        (torch.Size([6, 4]), torch.uint8)
    """

    def __init__(self, keys: KeysCollection, values: Sequence[int] = (1,), reverse_indexing: bool = False) -> None:
        super().__init__(keys)
        self.values = values
        self.reverse_indexing = reverse_indexing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw each key's masks."""
        result = dict(data)
        for key in self.keys:
            masks = data[key]
            drawn = draw_label_map(masks, self.values)[0].to(torch.uint8)
            if str(masks.meta["filename_or_obj"]).lower().endswith((".nii", ".nii.gz")):
                missing = len(masks.meta.get("spatial_shape", ())) - drawn.ndim
                result[key] = drawn.reshape(*drawn.shape, *[1] * missing)
            else:
                result[key] = drawn if self.reverse_indexing else drawn.T
        return result
