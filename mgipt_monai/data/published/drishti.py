# SPDX-License-Identifier: Apache-2.0
"""Drishti-GS, fundus photographs of the Aravind Eye Hospital, Madurai, each outlined by four experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .folders import files_by_name, folders_above, pair
from .layout import Layout, Sample
from .mask_files import disc_and_cup

__all__ = ["DRISHTI_GS"]

EXPERTS, MAJORITY = 4, 2


def _find(root: Path) -> list[Sample]:
    images = files_by_name(root, ["Images"], "(drishtiGS_.+)")
    masks = [files_by_name(root, ["SoftMap"], f"(.+)_{kind}segSoftmap") for kind in ("OD", "cup")]
    samples = []
    for name, image, files in pair(images, *masks):
        above = folders_above(image, root)
        split = next((split for folder, split in (("training", "train"), ("test", "test")) if folder in above), "")
        samples.append(Sample("drishti_gs", name, image, files, split))
    return samples


def _decode(disc: Image.Image, cup: Image.Image) -> np.ndarray:
    """Decode the region outlined by at least two experts; the grey value of a map is the fraction of experts."""
    votes = [np.round(np.asarray(soft.convert("L")) * (EXPERTS / 255)) for soft in (disc, cup)]
    return disc_and_cup(*(count >= MAJORITY for count in votes))


DRISHTI_GS = Layout(
    name="drishti_gs",
    expected="the folder Drishti-GS1_files with Training/ and Test/, each with Images/ and GT/ or Test_GT/ "
    "(drishtiGS_001/SoftMap/drishtiGS_001_ODsegSoftmap.png and drishtiGS_001_cupsegSoftmap.png)",
    counts={"drishti_gs": 101},
    find=_find,
    decode=_decode,
)
