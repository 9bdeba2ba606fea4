# SPDX-License-Identifier: Apache-2.0
"""Convert a published dataset to the layout of this project."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from mgipt_monai.data.datalists import write_datalist
from mgipt_monai.data.outputs import check_names
from mgipt_monai.data.streams import IMAGES, MASKS
from mgipt_monai.utils.outputs import OutputFolder, check_apart

from .cropping import disc_window, resize
from .layout import Layout, Sample

__all__ = ["convert"]


def convert(
    layout: Layout,
    folder: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    crop: int | None = None,
    size: int | None = None,
    site: str | None = None,
) -> dict[str, int]:
    """Write ``<site>/images/<name>.png`` and ``<site>/masks/<name>.png``, as ``find_stream(output_dir)`` reads them.

    Masks hold class indices: 0 background, 1 disc rim, 2 cup, or 0 and 1 for polyps. ``<site>.json`` is the datalist of
    a site; if the owner splits the site, there is ``<site>_<split>.json`` for each split instead. Lists are sorted by
    name, or in the order of the original CSV list. Images are processed one at a time; the same folder gives the same
    bytes.

    Args:
        layout: one of :data:`mgipt_monai.data.published.LAYOUTS`.
        folder: the dataset as distributed by its owner, unpacked.
        output_dir: folder to write to; datasets may share it.
        crop: side in pixels of a square around the optic disc; None keeps the whole image.
        size: side in pixels to which image and mask are resized; None keeps their size.
        site: name of the site, for a layout with a single site; None uses that of the layout.

    Returns:
        The number of images of each site.

    Raises:
        FileExistsError: if a file stands in the output folder that no conversion wrote.
        FileNotFoundError: if files are missing in the folder; names them and what the layout expects.
        ValueError: if an argument is invalid, the output folder has other images, or a file is not as published.
    """
    for option, value in (("crop", crop), ("size", size)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1 pixel, got {value}")
    if crop and not layout.has_disc:
        raise ValueError(f"crop is for optic discs, layout {layout.name} has none: omit it")
    out = Path(output_dir)
    check_apart(out, [folder])
    samples = _rename(layout.samples(Path(folder)), site)
    counts = Counter(sorted(sample.site for sample in samples))
    for of_site in counts:
        there = {path.name for path in (out / of_site / IMAGES).glob("*")}
        if others := there - {f"{sample.name}.png" for sample in samples if sample.site == of_site}:
            raise ValueError(f"{out / of_site} has other images ({min(others)}): choose another output_dir or site")
    target = OutputFolder(out, durable=False)
    target.prepare()
    lists = {_list_name(sample): f"{_list_name(sample)}.json" for sample in samples}
    target.claim(*lists.values())
    check_names([{"name": f"{sample.site}/{sample.name}", "image": str(sample.image)} for sample in samples])
    for sample in samples:
        _write(layout, sample, target, crop, size)
    for name, file in lists.items():
        write_datalist([_item(sample, out) for sample in samples if _list_name(sample) == name], target.file(file))
    return dict(counts)


def _rename(samples: Sequence[Sample], site: str | None) -> list[Sample]:
    if site is None:
        return list(samples)
    sites = sorted({sample.site for sample in samples})
    if len(sites) > 1:
        raise ValueError(f"site {site} cannot name the {len(sites)} sites {', '.join(sites)}: omit it")
    return [replace(sample, site=site) for sample in samples]


def _write(layout: Layout, sample: Sample, target: OutputFolder, crop: int | None, size: int | None) -> None:
    image, mask = layout.read(sample)
    if crop:
        try:
            window = disc_window(mask, crop)
        except ValueError as error:
            raise ValueError(f"{sample.image}: {error}") from error
        image, mask = image[window], mask[window]
    if size:
        image, mask = resize(image, mask, size)
    for kind, pixels in ((IMAGES, image), (MASKS, mask)):
        with target.writing(f"{sample.site}/{kind}/{sample.name}.png") as part:
            Image.fromarray(np.ascontiguousarray(pixels)).save(part)


def _list_name(sample: Sample) -> str:
    return f"{sample.site}_{sample.split}" if sample.split else sample.site


def _item(sample: Sample, out: Path) -> dict[str, str]:
    file = f"{sample.name}.png"
    paths = {"image": str(out / sample.site / IMAGES / file), "label": str(out / sample.site / MASKS / file)}
    return paths | {"site": sample.site, "name": os.path.join(sample.site, sample.name)}
