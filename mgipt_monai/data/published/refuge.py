# SPDX-License-Identifier: Apache-2.0
"""REFUGE, the MICCAI 2018 challenge on fundus photographs: one camera for training, another for validation and test."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .folders import files_by_name, pair
from .layout import Layout, Sample
from .mask_files import grey_disc_and_cup

__all__ = ["REFUGE"]

# site and split by the first letter of the file: glaucoma, no glaucoma, validation, test
SITES_AND_SPLITS = {
    "g": ("refuge", ""),
    "n": ("refuge", ""),
    "v": ("refuge_valid_test", "valid"),
    "t": ("refuge_valid_test", "test"),
}
IMAGE_FOLDERS = {
    "[gn]": ["Training400", "REFUGE-Training400", "REFUGE1-Train-400"],
    "v": ["REFUGE-Validation400", "Validation400", "REFUGE1-Val-400"],
    "t": ["Test400", "REFUGE-Test400", "REFUGE1-Test-400"],
}


def _find(root: Path) -> list[Sample]:
    images: dict[str, Path] = {}
    for letter, folders in IMAGE_FOLDERS.items():
        with suppress(FileNotFoundError):  # the three parts are separate downloads
            images |= files_by_name(root, folders, rf"({letter}\d+)", [".jpg"])
    if not images:
        raise FileNotFoundError(f"no image g0001.jpg, n0001.jpg, V0001.jpg or T0001.jpg in {root}")
    masks = files_by_name(root, ["Disc_Cup_Masks"], r"([gnvt]\d+)", [".bmp"])
    samples = []
    for name, image, files in pair(images, masks):
        site, split = SITES_AND_SPLITS[name[0].lower()]
        samples.append(Sample(site, name, image, files, split))
    return samples


REFUGE = Layout(
    name="refuge",
    expected="a folder with one or more of Training400/ and Annotation-Training400/, REFUGE-Validation400/ and "
    "REFUGE-Validation400-GT/, Test400/ and REFUGE-Test-GT/; masks are BMP files below Disc_Cup_Masks/",
    counts={"refuge": 400, "refuge_valid_test": 800},
    find=_find,
    decode=grey_disc_and_cup,
)
