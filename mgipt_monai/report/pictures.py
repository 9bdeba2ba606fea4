# SPDX-License-Identifier: Apache-2.0
"""Small pictures of each image of a stream for the report: the input, the prompted input and the masks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys, convert_to_tensor
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mgipt_monai.utils.files import atomic_path
from mgipt_monai.utils.outputs import OutputFolder, check_output_name

__all__ = ["ADAPTED", "INPUT", "MASK", "PictureWriter", "picture_path", "read_masks", "write_masks"]

INPUT, ADAPTED, MASK = "input.jpg", "adapted.jpg", "mask.png"
"""Suffixes of the pictures of the network's input, the prompted input and the masks."""

MAX_CLASSES = 8  # bits of a grey value


class PictureWriter:
    """Ignite handler that writes small pictures of each image processed by a :class:`StreamingAdaptationEvaluator`.

    Pictures have the image's name. The prediction and, if the method changes its input, the prompted image go to
    ``folder``; the network's input and the reference mask go to ``reference``. Images are JPEG with one or three
    channels (only the first channel of any other number); masks are PNG with class ``k`` in bit ``k``, in the size of
    the input picture. For a volume (C, D, H, W), the plane of the last axis with the most reference voxels is shown.

    Args:
        folder: folder for the pictures of this run.
        adapted_input: returns the prompted image (1, C, \\*spatial) for the network's input of the same shape; None for
            a method that does not change its input.
        reference: folder for the pictures that all methods share; existing pictures are kept. None writes none.
        side: longest side of the pictures in pixels; smaller images keep their size.
        shown: returns what stands for an image's name in the names of its pictures.

    Raises:
        FileExistsError: in a run, if a file stands there that no run wrote.
        ValueError: at construction, if ``side`` is below one; in a run, if there is no reference mask, there are more
            than eight classes, or a name leaves the folder.

    Example:
        >>> from ignite.engine import Engine
        >>> PictureWriter("benchmark/source/pictures", reference="benchmark/reference/pictures").attach(
        ...     Engine(lambda engine, batch: None)
        ... )
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        adapted_input: Callable[[Tensor], Tensor] | None = None,
        reference: str | os.PathLike[str] | None = None,
        side: int = 256,
        shown: Callable[[str], str] = str,
    ) -> None:
        if side < 1:
            raise ValueError(f"side must be at least 1 pixel, got {side}")
        self.shown = shown
        self.folder, self.adapted_input, self.side = OutputFolder(folder, durable=False), adapted_input, side
        self.reference = None if reference is None else OutputFolder(reference, durable=False)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the pictures of the image just processed."""
        (output,) = cast("list[dict[str, Any]]", engine.state.output)
        name = self.shown(cast(Any, engine.state).record["name"])
        if output.get(CommonKeys.LABEL) is None:
            raise ValueError(f"{name} has no reference mask: the pictures of the report need a labelled stream")
        image, pred, label = (
            convert_to_tensor(output[key], track_meta=False).detach()
            for key in (CommonKeys.IMAGE, CommonKeys.PRED, CommonKeys.LABEL)
        )
        place = _fullest_plane(label)
        shown = _small(_plane(image, place), self.side)
        size = shown.shape[1:]
        check_output_name(name)
        _write_masks(self.folder, f"{name}.{MASK}", _mask(pred, place, size))
        if self.adapted_input is not None:
            with torch.no_grad():
                adapted = self.adapted_input(image[None])[0]
            _write_image(self.folder, f"{name}.{ADAPTED}", _small(_plane(adapted, place), self.side))
        if self.reference is not None:
            if not self.reference.file(f"{name}.{INPUT}").exists():
                _write_image(self.reference, f"{name}.{INPUT}", shown)
            if not self.reference.file(f"{name}.{MASK}").exists():
                _write_masks(self.reference, f"{name}.{MASK}", _mask(label, place, size))


def picture_path(folder: str | os.PathLike[str], name: str, ending: str) -> Path:
    """Return the path of an image's picture; slashes in the name give subfolders."""
    return Path(folder) / f"{name}.{ending}"


def write_masks(path: str | os.PathLike[str], masks: np.ndarray) -> None:
    """Write masks (K, H, W) of up to eight classes as one PNG with class ``k`` in bit ``k``.

    Raises:
        ValueError: if there are more than eight classes.
    """
    with atomic_path(path) as part:
        _mask_picture(masks).save(part)


def _write_masks(folder: OutputFolder, name: str, masks: np.ndarray) -> None:
    with folder.writing(name) as part:
        _mask_picture(masks).save(part)


def _mask_picture(masks: np.ndarray) -> Image.Image:
    if len(masks) > MAX_CLASSES:
        raise ValueError(f"a mask picture holds at most {MAX_CLASSES} classes, got {len(masks)}")
    return Image.fromarray(np.packbits(masks > 0, axis=0, bitorder="little")[0])


def read_masks(path: str | os.PathLike[str], classes: int) -> np.ndarray:
    """Read masks of 0 and 1, uint8 (classes, H, W), written by :func:`write_masks`."""
    with Image.open(path) as picture:
        return np.unpackbits(np.asarray(picture)[None], axis=0, count=classes, bitorder="little")


def _fullest_plane(label: Tensor) -> float | None:
    """Return the position in (0, 1) along the last axis of the plane with the most reference voxels (K, D, H, W)."""
    if label.ndim == 3:
        return None
    count = (label > 0).any(dim=0).sum(dim=(0, 1)).cpu().numpy()
    index = int(count.argmax()) if count.any() else len(count) // 2
    return (index + 0.5) / len(count)


def _plane(volume: Tensor, place: float | None) -> Tensor:
    return volume if place is None else volume[..., int(place * volume.shape[-1])]


def _small(image: Tensor, side: int) -> Tensor:
    """Return the image (C, H, W) with one or three channels and sides of at most ``side``."""
    image = image if image.shape[0] in (1, 3) else image[:1]
    longest = max(image.shape[1:])
    if longest <= side:
        return image
    size = [max(1, round(length * side / longest)) for length in image.shape[1:]]
    return functional.interpolate(image[None].float(), size=size, mode="area")[0]


def _mask(masks: Tensor, place: float | None, size: torch.Size) -> np.ndarray:
    resized = functional.interpolate(_plane(masks, place)[None].float(), size=tuple(size), mode="nearest-exact")[0]
    return resized.cpu().numpy()


def _write_image(folder: OutputFolder, name: str, image: Tensor) -> None:
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    with folder.writing(name) as part:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(part, quality=85)
