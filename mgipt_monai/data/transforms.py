# SPDX-License-Identifier: Apache-2.0
"""Transforms of the bundle that MONAI does not provide."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import CommonKeys, ensure_tuple
from torch import Tensor

from mgipt_monai.data.dataset import MAX_VALUES, check_file
from mgipt_monai.data.dicom import DICOM_VOLUME
from mgipt_monai.networks.alignment.windows import NetworkOutputError
from mgipt_monai.utils.state_checks import check_image

__all__ = ["AdaptationResultd", "CheckFiled", "CheckImaged", "CheckLogitsd", "LabelToChannelsd", "ToAxesOfd"]

FIT = "resample it to a mask that predict writes for this series, or give it that mask's affine if only that is wrong"
SAME_VOXEL = 0.1
"""Distance, in voxels, between the places that two headers give to the same voxel."""


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


class CheckLogitsd(MapTransform):
    """Check that a network's logits fit the classes and its input, before masks are made of them. Nothing is changed.

    Args:
        keys: logits (K, \\*spatial).
        channels: number of channels that the masks need.
        image: key of the network's input (C, \\*spatial).

    Raises:
        NetworkOutputError: when called, for another number of channels, or other sides than the image's.

    Example:
        >>> data = {"image": torch.rand(3, 8, 8), "pred": torch.rand(2, 8, 8)}
        >>> CheckLogitsd("pred", channels=2)(data)["pred"].shape
        torch.Size([2, 8, 8])
    """

    def __init__(self, keys: KeysCollection, channels: int, image: str = CommonKeys.IMAGE) -> None:
        super().__init__(keys)
        self.channels, self.image = channels, image

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check the logits of each key."""
        for key in self.keys:
            channels, *sides = data[key].shape
            if channels != self.channels:
                raise NetworkOutputError(
                    f"the network returns {channels} channels, class_names and head need {self.channels} (one per "
                    "class, with softmax also the background): set both to what the network was trained for, and "
                    "method#output if it has several outputs"
                )
            if sides != (size := list(data[self.image].shape[1:])):
                raise NetworkOutputError(
                    f"the network returns {'x'.join(map(str, sides))} of an image of {'x'.join(map(str, size))}, so "
                    "that no mask could be put in its place: take a network that pads its convolutions, or wrap it "
                    "in one that resizes or pads its logits to the size of its input"
                )
        return dict(data)


class ToAxesOfd(MapTransform):
    """Turn reference masks of volumes to the axes of their image, by both affines.

    A mask that has the voxels of the image, with axes swapped or flipped (dcm2niix flips those of DICOM), is turned
    exactly, without interpolation. Any other is left as it is beside a NIfTI image, whose header may be wrong, and
    refused beside a DICOM series, whose axes nobody chose.

    Args:
        keys: masks (1, \\*spatial) as loaded.
        image: key of the image, which may have been resized; the place of its voxels in the file is in its metadata.

    Raises:
        ValueError: when called, if the mask of a DICOM series has other sides, or lies elsewhere.

    Example:
        >>> from monai.data import MetaTensor
        >>> flipped = torch.tensor([[-1.0, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        >>> meta = {"original_affine": torch.eye(4), "spatial_shape": (3, 1, 1)}
        >>> image = MetaTensor(torch.rand(1, 3, 1, 1), meta=meta)
        >>> mask = MetaTensor([[[[2.0]], [[1.0]], [[0.0]]]], affine=flipped)
        >>> ToAxesOfd("label", "image")({"image": image, "label": mask})["label"].flatten().tolist()
        [0.0, 1.0, 2.0]
    """

    def __init__(self, keys: KeysCollection, image: str = CommonKeys.IMAGE) -> None:
        super().__init__(keys)
        self.image = image

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Turn the mask of each key."""
        result = dict(data)
        meta = getattr(data[self.image], "meta", {})
        sides, affine = meta.get("spatial_shape"), meta.get("original_affine")
        if sides is None or affine is None or len(sides) != 3:
            return result  # a picture
        for key in self.keys:
            result[key] = self._turned(
                data[key], [int(side) for side in sides], torch.as_tensor(affine).double(), bool(meta.get(DICOM_VOLUME))
            )
        return result

    @staticmethod
    def _turned(mask: Tensor, sides: list[int], affine: Tensor, must_fit: bool) -> Tensor:
        found = list(mask.shape[1:])
        own = getattr(mask, "affine", None)
        if own is not None and len(found) == len(sides) and (order := _axes(own.double(), affine, found, sides)):
            axes, flips = order
            turned = mask.permute(0, *(axis + 1 for axis in axes)).flip([axis + 1 for axis in flips])
            if isinstance(turned, MetaTensor):
                turned.affine = affine
            return turned
        if not must_fit:
            return mask
        if sorted(found) != sorted(sides):
            voxels = ["x".join(map(str, each)) for each in (found, sides)]
            raise ValueError(f"the mask has {voxels[0]} voxels, its DICOM series {voxels[1]}: {FIT}")
        raise ValueError(f"the affine of the mask puts it elsewhere than its DICOM series: {FIT}")


def _axes(own: Tensor, affine: Tensor, found: list[int], sides: list[int]) -> tuple[list[int], list[int]] | None:
    """Return which axis of a mask lies along each axis of an image, and those to flip then; None if voxels differ."""
    if not (torch.isfinite(affine).all() and torch.linalg.det(affine) != 0):
        return None
    to_image = torch.linalg.solve(affine, own)  # from the mask's voxels to the image's
    turn = to_image[:3, :3].round()
    if not torch.equal(turn.abs() @ torch.ones(3, dtype=turn.dtype), torch.ones(3, dtype=turn.dtype)):
        return None
    axes = turn.abs().argmax(dim=1).tolist()
    flips = [axis for axis in range(3) if turn[axis, axes[axis]] < 0]
    if sorted(axes) != [0, 1, 2] or [found[axis] for axis in axes] != sides:
        return None
    # the first and the last voxel of the turned mask must be those of the image
    ends = torch.tensor([[0, side - 1] for side in found], dtype=own.dtype)
    there = to_image[:3, :3] @ ends + to_image[:3, 3:]
    expected = torch.tensor([[s - 1, 0] if i in flips else [0, s - 1] for i, s in enumerate(sides)], dtype=own.dtype)
    return (axes, flips) if torch.allclose(there, expected, rtol=0, atol=SAME_VOXEL) else None


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
