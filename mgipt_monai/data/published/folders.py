# SPDX-License-Identifier: Apache-2.0
"""Find the files of a dataset at any depth below its folder, and pair images with masks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from mgipt_monai.utils.files import IMAGE_ENDINGS

__all__ = ["files_by_name", "folders_above", "pair"]


def files_by_name(
    root: Path, under: Sequence[str], name: str = "(.+)", endings: Sequence[str] = IMAGE_ENDINGS
) -> dict[str, Path]:
    """Find files below a folder of a given name at any depth.

    Args:
        root: folder of the dataset.
        under: folder names, case-insensitive; the first one with such files is used.
        name: pattern of the whole file name without extension, case-insensitive; its group is the key.
        endings: extensions of the files, in lower case.

    Returns:
        The files by the pattern's group.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if two files have the same key.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "unpacked" / "Masks").mkdir(parents=True)
        >>> (root / "unpacked" / "Masks" / "eye-Disc.png").touch()
        >>> list(files_by_name(root, ["masks"], name="(.+)-disc"))
        ['eye']
    """
    paths = [path for path in sorted(root.rglob("*")) if path.name.lower().endswith(tuple(endings))]
    for folder in under:
        found: dict[str, Path] = {}
        for path in paths:
            match = re.fullmatch(name, path.stem, re.IGNORECASE)
            # archives created on a Mac have a file ._NAME for each file
            if not match or path.name.startswith(".") or folder.lower() not in folders_above(path, root):
                continue
            other = found.setdefault(match[1], path)
            if other != path:
                raise ValueError(f"{other} and {path} are both {match[1]}: give the folder that holds one of them")
        if found:
            return found
    named = "" if name == "(.+)" else f" named {name}"
    raise FileNotFoundError(f"no image or mask{named} below a folder {' or '.join(under)} in {root}")


def folders_above(path: Path, root: Path) -> list[str]:
    """Return the names of the folders between a file and the folder of its dataset, in lower case."""
    return [part.lower() for part in path.relative_to(root).parts[:-1]]


def pair(images: Mapping[str, Path], *masks: Mapping[str, Path]) -> Iterator[tuple[str, Path, tuple[Path, ...]]]:
    """Return name, image and masks of each image, sorted by name.

    Raises:
        FileNotFoundError: if an image has no mask or a mask no image; names up to five of each.
    """
    without_mask = set(images) - set(images).intersection(*masks)
    without_image = set[str]().union(*masks) - set(images)
    unpaired = [
        f"{len(names)} {what} ({_some(names)})"
        for names, what in ((without_mask, "images without a mask"), (without_image, "masks without an image"))
        if names
    ]
    if unpaired:
        raise FileNotFoundError(f"{' and '.join(unpaired)}: add what is missing, or remove its counterparts")
    return ((name, images[name], tuple(of_kind[name] for of_kind in masks)) for name in sorted(images))


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:5]) + ", ..." * (len(names) > 5)
