# SPDX-License-Identifier: Apache-2.0
"""Polyps in colonoscopy frames: BKAI-IGH NeoPolyp, CVC-ClinicDB, ETIS-Larib and Kvasir-SEG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .folders import files_by_name, pair
from .layout import Layout, Sample

__all__ = ["BKAI", "CVC_CLINICDB", "ETIS_LARIB", "KVASIR_SEG"]

ANY = "(.+)"


def _decode(mask: Image.Image) -> np.ndarray:
    """Decode everything bright in any colour: JPEG blurs the values, and colours code the kind of polyp."""
    brightest = np.asarray(mask.convert("RGB")).max(axis=2)
    if 0 < brightest.max() < 128:
        raise ValueError(f"the mask's highest value is {brightest.max()}, but polyps are 255")
    return (brightest > 127).astype(np.uint8)


def _polyps(
    name: str,
    count: int,
    images: Sequence[str],
    masks: Sequence[str],
    expected: str,
    patterns: tuple[str, str] = (ANY, ANY),
) -> Layout:
    def find(root: Path) -> list[Sample]:
        pairs = pair(files_by_name(root, images, patterns[0]), files_by_name(root, masks, patterns[1]))
        return [Sample(name, *files) for files in pairs]

    return Layout(name, expected, {name: count}, find, _decode, has_disc=False)


BKAI = _polyps(
    "bkai",
    1000,
    ["train"],
    ["train_gt"],
    "a folder with train/ (images) and train_gt/ (masks of the same names, red neoplastic, green not)",
)
CVC_CLINICDB = _polyps(
    "cvc_clinicdb",
    612,
    ["Original"],
    ["Ground Truth", "GroundTruth"],
    "a folder with Original/ and 'Ground Truth'/, files of the same names (give the folder of only PNG or TIF)",
)
ETIS_LARIB = _polyps(
    "etis_larib",
    196,
    ["images", "ETIS-LaribPolypDB"],
    ["Ground Truth", "GroundTruth", "masks"],
    "a folder with ETIS-LaribPolypDB/ (1.tif) and 'Ground Truth'/ (p1.tif), or images/ and masks/ (1.png)",
    (r"(\d+)", r"p?(\d+)"),
)
KVASIR_SEG = _polyps(
    "kvasir_seg", 1000, ["images"], ["masks"], "a folder with images/ and masks/, JPEG files of the same names"
)
