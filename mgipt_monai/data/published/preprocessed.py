# SPDX-License-Identifier: Apache-2.0
"""Optic disc and cup of several sites in one folder, with a CSV list for each site or split."""

from __future__ import annotations

from pathlib import Path

from mgipt_monai.data.streams import read_csv
from mgipt_monai.utils.files import stem

from .layout import Layout, Sample
from .mask_files import grey_disc_and_cup

__all__ = ["PREPROCESSED"]


def _find(root: Path) -> list[Sample]:
    samples = []
    for path in sorted(root.glob("*.csv")):
        site, _, split = path.stem.rpartition("_")
        if split not in ("train", "test"):
            site, split = path.stem, ""
        for item in read_csv(str(path)):
            if "label" not in item:
                raise ValueError(f"{item['image']} has no mask in {path}")
            image, mask = Path(item["image"]), Path(item["label"])
            samples.append(Sample(site, stem(image), image, (mask,), split))
    missing = [str(path) for sample in samples for path in (sample.image, *sample.masks) if not path.is_file()]
    if not samples:
        raise FileNotFoundError(f"no CSV list with images in {root}")
    if missing:
        raise FileNotFoundError(f"{len(missing)} listed files are missing, the first is {missing[0]}")
    return samples


PREPROCESSED = Layout(
    name="preprocessed",
    expected="a folder with lists SITE_train.csv, SITE_test.csv or SITE.csv of columns image,mask; "
    "masks are 0 cup, 255 background, anything in between disc rim",
    counts={},
    find=_find,
    decode=grey_disc_and_cup,
)
