# SPDX-License-Identifier: Apache-2.0
"""Transforms of the bundle that MONAI does not provide."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import ensure_tuple
from torch import Tensor

from mgipt_monai.data.dataset import MAX_VALUES, check_file
from mgipt_monai.methods.base import check_image

__all__ = ["AdaptationResultd", "CheckFiled", "CheckImaged", "LabelToChannelsd"]


class CheckFiled(MapTransform):
    """Check files before they are loaded, as :class:`mgipt_monai.data.StreamDataset` does. Nothing is changed.

    Args:
        keys: paths of images or labels, or lists of paths.
        max_values: see :func:`mgipt_monai.data.check_declared_size`.

    Raises:
        FileNotFoundError: when called, if a file does not exist.
        ValueError: when called, if a file is empty, is no image, or declares more values than the limit.
    """

    def __init__(self, keys: KeysCollection, max_values: int = MAX_VALUES) -> None:
        super().__init__(keys)
        self.max_values = max_values

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check the files of each key."""
        for key in self.keys:
            for path in ensure_tuple(data[key]):
                check_file(str(key), path, self.max_values)
        return dict(data)


class CheckImaged(MapTransform):
    """Check that an image can be adapted to, with an error message that names the fix. The image is not changed.

    Args:
        keys: images (C, \\*spatial).
        channels: number of channels that the network expects.
        spatial_dims: number of spatial dimensions that the network expects.

    Raises:
        ValueError: when called, if the image is constant, has NaN or infinite values, another number of channels or
            dimensions, or a singular affine.

    Example:
        >>> CheckImaged("image", channels=3)({"image": torch.rand(3, 8, 8)})["image"].shape
        torch.Size([3, 8, 8])
    """

    def __init__(self, keys: KeysCollection, channels: int, spatial_dims: int = 2) -> None:
        super().__init__(keys)
        self.channels = channels
        self.spatial_dims = spatial_dims

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check the image of each key."""
        for key in self.keys:
            image = data[key]
            check_image(torch.as_tensor(image)[None])
            _check_affine(getattr(image, "affine", None))
            if image.ndim - 1 != self.spatial_dims:
                raise ValueError(
                    f"{image.ndim - 1} spatial dimensions where the network expects {self.spatial_dims}: "
                    "use images with that number of dimensions"
                )
            if image.shape[0] != self.channels:
                fix = (
                    "set color_mode (RGB for 3 channels, L for 1) to convert on reading"
                    if self.spatial_dims == 2
                    else "split it (the fourth axis of a NIfTI file holds the channels)"
                )
                raise ValueError(
                    f"{image.shape[0]} channels where the network expects {self.channels}: convert the file, or {fix}"
                )
        return dict(data)


def _check_affine(affine: Tensor | None) -> None:
    """Raise ValueError if voxels have no place in space, so that no mask could be written for them."""
    if affine is not None and not (torch.isfinite(affine).all() and torch.linalg.det(affine.double()) != 0):
        raise ValueError(
            "the header has no valid affine (a side of its voxels is zero or no number): repair sform, qform and "
            "pixdim, or convert the file again"
        )


class LabelToChannelsd(MapTransform):
    """Convert a mask of grey values to one channel of 0 and 1 per structure.

    Args:
        keys: masks (1, \\*spatial).
        ranges: lowest and highest value of each structure; structures may overlap (the cup is part of the disc).
        background: values of the background.

    Raises:
        ValueError: when called, if the mask has several channels or other values.

    Example:
        >>> coded = {"label": torch.tensor([[[0, 1, 2]]])}
        >>> LabelToChannelsd("label", ranges=[[1, 2], [2, 2]])(coded)["label"].tolist()
        [[[0.0, 1.0, 1.0]], [[0.0, 0.0, 1.0]]]
    """

    def __init__(
        self, keys: KeysCollection, ranges: Sequence[Sequence[float]], background: Sequence[float] = (0,)
    ) -> None:
        super().__init__(keys)
        self.ranges = ranges
        self.background = background

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Convert the mask of each key."""
        result = dict(data)
        for key in self.keys:
            result[key] = self._convert(data[key])
        return result

    def _convert(self, mask: Tensor) -> Tensor:
        if mask.shape[0] != 1:
            raise ValueError(f"the mask has {mask.shape[0]} channels: save it as one channel of grey values")
        channels = torch.cat([(mask >= low) & (mask <= high) for low, high in self.ranges])
        known = channels.any(dim=0) | torch.isin(mask[0], torch.as_tensor(self.background, dtype=mask.dtype))
        if not known.all():
            values = torch.unique(mask[0][~known])[:5].tolist()
            raise ValueError(
                f"the mask has values {values} outside the ranges {self.ranges} and the background {self.background}: "
                "set mask_ranges and mask_background to match it"
            )
        return channels.float()


class AdaptationResultd(MapTransform):
    """Add the adaptation record of the requested image to MONAI Label's JSON response, under ``adaptation``.

    Args:
        keys: the prediction as returned by :class:`mgipt_monai.PersistentInferer`. Transforms that replace its metadata
            (``Invertd``) come after this one.
        result: key of the dict with the server's response.

    Raises:
        ValueError: when called, if the prediction does not have the record of exactly one image.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> pred = MetaTensor(torch.rand(2, 8, 8), meta={"adaptation": [{"position": 3}]})
        >>> AdaptationResultd("pred")({"pred": pred})["result"]
        {'adaptation': {'position': 3}}
    """

    def __init__(self, keys: KeysCollection, result: str = "result") -> None:
        super().__init__(keys)
        self.result = result

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the record of each key; nothing else changes."""
        answer = dict(data.get(self.result, {}))
        for key in self.keys:
            rows = getattr(data[key], "meta", {}).get("adaptation", [])
            if len(rows) != 1:
                raise ValueError(
                    f"{key} has the adaptation records of {len(rows)} images, one is needed: predict with a "
                    "PersistentInferer, and put AdaptationResultd first in the postprocessing"
                )
            (answer["adaptation"],) = rows
        return {**data, self.result: answer}
