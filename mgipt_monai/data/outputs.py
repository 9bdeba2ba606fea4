# SPDX-License-Identifier: Apache-2.0
"""Checks of everything that a run will write, before its first image."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from monai.utils import ensure_tuple

from mgipt_monai.utils.files import load_state
from mgipt_monai.utils.outputs import OutputFolder, check_apart, check_output_name, normal_name

__all__ = ["MASK_ENDINGS", "UNCERTAINTY", "check_names", "check_outputs"]

MASK_ENDINGS = (".png", ".nii.gz")
UNCERTAINTY = "_uncertainty"
"""What the name of an uncertainty map has behind that of its image."""


def check_outputs(
    items: Sequence[dict[str, Any]],
    output_dir: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    files: Sequence[str] = (),
    masks: bool = True,
    uncertainty: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Sequence[dict[str, Any]]:
    """Return the items of a stream unchanged, if a run can write its outputs without harm to any other file.

    In a ``torch.distributed`` process group each process must call it, and waits for the others.

    Args:
        items: items of :func:`mgipt_monai.find_stream` or :func:`mgipt_monai.order_stream`.
        output_dir: the folder that the run writes to. It is created, and half-written files of killed runs are removed.
        source: where the items are from, a folder, a glob pattern or a datalist.
        files: names of the files that the run writes beside the masks.
        masks: whether it writes a mask for each item.
        uncertainty: whether it also writes an uncertainty map for each item.
        resume: whether it continues an earlier run, whose masks are not looked at.
        overwrite: whether it takes the place of an earlier run.

    Raises:
        FileExistsError: if a file stands where the run would write, and no run wrote it, or an earlier run has results
            there and this one neither resumes nor overwrites; the message names it.
        ValueError: for both ``resume`` and ``overwrite``; if the output folder overlaps with a folder of images or
            labels, also through links, or two outputs would have the same name.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "eye.png").touch()
        >>> items = [{"image": str(root / "eye.png"), "name": "eye"}]
        >>> check_outputs(items, root)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: the output folder ... is the folder ... of the images, which could be overwritten ...
    """
    if resume and overwrite:
        raise ValueError("resume continues the earlier run, overwrite replaces it: set only one of them")
    searched = [] if source is None else list(_folder_of(os.fspath(source)))
    check_apart(output_dir, [*searched, *dict.fromkeys(_folders(items))])
    endings = ["", UNCERTAINTY] if uncertainty else [""]
    check_names(items, endings)
    folder = OutputFolder(output_dir)
    folder.prepare()
    folder.claim(*files)
    # a stream that has begun has a record file, and then only what is recorded is a result
    has_begun = any(name.endswith(".jsonl") and (folder.path / name).exists() for name in files)
    if not resume and not overwrite:
        _check_unused(folder.path, files)
    if masks:
        for name in dict.fromkeys(f"{os.path.dirname(item['name'])}/mask".lstrip("/") for item in items):
            folder.file(name)  # no link leads elsewhere
    for name in (f"{item['name']}{end}{kind}" for item in items for end in endings for kind in MASK_ENDINGS):
        if masks and not resume and os.path.lexists(folder.path / name):
            folder.check(name)
            if not overwrite and not has_begun:
                raise _has_results(folder.path, f"the mask {name}")
    idist.barrier()  # before one writes what another would take for an earlier run's
    return items


def _check_unused(folder: Path, files: Sequence[str]) -> None:
    """Raise FileExistsError if one of the files holds records of images, or the state after some."""
    for name in files:
        if name.endswith(".jsonl") and (folder / name).is_file():
            lines = [line for line in (folder / name).read_bytes().split(b"\n")[:-1] if line]
            if lines:
                raise _has_results(folder, ", ".join([_images(len(lines)), *_day(lines[-1])]))
    for name in files:
        if name.startswith("adaptation_state") and name.endswith(".pt"):
            with suppress(FileNotFoundError, ValueError):
                if position := load_state(folder / name).get("position"):
                    raise _has_results(folder, f"a state after {_images(position)}")


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def _day(line: bytes) -> list[str]:
    with suppress(ValueError, AttributeError):
        if isinstance(time := json.loads(line).get("time"), str):
            return [time[:10]]
    return []  # a damaged line, which has an end all the same


def _has_results(folder: Path, what: str) -> FileExistsError:
    return FileExistsError(
        f"{folder} has the results of an earlier run ({what}): --resume True continues it, --overwrite True replaces "
        "it, or give another folder"
    )


def _folders(items: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Return the folders of images and labels, and those that they are links into."""
    for item in items:
        for key in ("image", "label"):
            for path in ensure_tuple(item.get(key, ())):
                yield os.path.dirname(os.path.abspath(path))
                if os.path.islink(path):
                    yield os.path.dirname(os.path.realpath(path))


def _folder_of(source: str) -> Iterable[str]:
    """Return the folder of a source that is searched for images, none for a datalist."""
    if os.path.isdir(source):
        yield source
    elif not source.endswith((".json", ".csv")) and glob.has_magic(source):
        parts = Path(source).parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        yield os.path.join(*parts[:fixed]) if fixed else os.curdir


def check_names(items: Iterable[Mapping[str, Any]], endings: Sequence[str] = ("",)) -> None:
    """Check that the outputs of all items have valid names, and that no two fall together on any system.

    Raises:
        ValueError: if they do not; the message names the images.

    Example:
        >>> check_names([{"image": "a.png", "name": "x/eye"}, {"image": "b.png", "name": "x//Eye"}])
        Traceback (most recent call last):
        ValueError: a.png and b.png would both be written as x//Eye: rename one, or put them in two site folders
    """
    first: dict[str, Any] = {}
    written: dict[str, Any] = {}
    for item in items:
        name, image = item["name"], item.get("image", item["name"])
        if name not in first:
            try:
                check_output_name(name, MASK_ENDINGS[0])
            except ValueError as error:
                raise ValueError(f"{image}: {error}") from error
        first.setdefault(name, image)
        for ending in endings:
            other = written.setdefault(normal_name(f"{name}{ending}"), image)
            if other != image:
                raise ValueError(
                    f"{other} and {image} would both be written as {name}{ending}: rename one, or put them in two "
                    "site folders"
                )
    # x.png of one image and x.png/y.png of another
    for name, image in first.items():
        for folder in Path(normal_name(name)).parents:
            for ending in MASK_ENDINGS:
                whole = written.get(str(folder).removesuffix(ending)) if str(folder).endswith(ending) else None
                if whole is not None:
                    raise ValueError(
                        f"{whole} would be written as {folder}, the folder of {name} ({image}): rename one"
                    )
