# SPDX-License-Identifier: Apache-2.0
"""Description of a published dataset: its folder structure, mask coding and number of images."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgipt_monai.data.photographs import read_photograph

from .mask_files import open_mask

__all__ = ["Layout", "Sample"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One image of a dataset.

    Args:
        site: its site.
        name: its name within the site, without extension.
        image: its file.
        masks: the files of its mask, in the order of the arguments of the layout's ``decode``.
        split: its split in the dataset, such as ``train``; empty if there are no splits.
    """

    site: str
    name: str
    image: Path
    masks: tuple[Path, ...]
    split: str = ""


@dataclass(frozen=True)
class Layout:
    """One published dataset.

    Args:
        name: name of the layout on the command line.
        expected: the expected folder, in words.
        counts: published number of images per site; other sites are not checked.
        find: returns the samples of a folder, or raises ``FileNotFoundError`` with what is missing.
        decode: converts the opened files of a mask to class indices, uint8 (H, W).
        has_disc: whether the masks are of optic disc and cup (0 background, 1 disc rim, 2 cup).
        stereo: whether an image is two views side by side, of which the left one has a mask.
    """

    name: str
    expected: str
    counts: Mapping[str, int]
    find: Callable[[Path], Sequence[Sample]]
    decode: Callable[..., np.ndarray]
    has_disc: bool = True
    stereo: bool = False

    def samples(self, folder: Path) -> list[Sample]:
        """Return the samples of a folder; a number that differs from the published one is logged as a warning.

        Raises:
            FileNotFoundError: if files are missing; names them and the expected folder.
            ValueError: if two images have the same name.
        """
        try:
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no folder {folder}")
            found = list(self.find(folder))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. Layout {self.name} expects {self.expected}") from error
        first: dict[tuple[str, str], Sample] = {}
        for sample in found:
            other = first.setdefault((sample.site, sample.name), sample)
            if other is not sample:
                raise ValueError(f"{other.image} and {sample.image} would both be {sample.site}/{sample.name}")
        here = Counter(sample.site for sample in found)
        for site, published in self.counts.items():
            if here[site] != published:
                logger.warning("%s: %d images in %s, but %d are published", site, here[site], folder, published)
        return found

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Return the image, uint8 (H, W, 3), and its mask of class indices, uint8 (H, W).

        Raises:
            ValueError: if a file cannot be read, image and mask differ in size, the coding is not that of the dataset,
                or the disc is missing; names the file.
        """
        try:
            image = np.round(read_photograph(sample.image, "RGB")).astype(np.uint8)
            mask = self.decode(*map(open_mask, sample.masks))
            if self.stereo:
                height, width = image.shape[:2]
                if width <= height:
                    raise ValueError(f"{width} x {height} pixels are not two views side by side")
                image, mask = image[:, : width // 2], mask[:, : width // 2]
            if mask.shape != image.shape[:2]:
                raise ValueError(f"the mask has {mask.shape} rows and columns, the image {image.shape[:2]}")
            if self.has_disc and not mask.any():
                raise ValueError("the mask has no optic disc")
        except (OSError, ValueError) as error:
            masks = ", ".join(path.name for path in sample.masks)
            raise ValueError(f"{sample.image} with mask {masks}: {error}") from error
        return image, mask
