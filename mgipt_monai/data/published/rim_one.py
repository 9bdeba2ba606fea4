# SPDX-License-Identifier: Apache-2.0
"""RIM-ONE, fundus photographs of three Spanish hospitals: RIM-ONE DL, and release 3 as it was distributed before."""

from __future__ import annotations

from pathlib import Path

from .folders import files_by_name, pair
from .layout import Layout, Sample
from .mask_files import two_masks

__all__ = ["RIM_ONE_DL", "RIM_ONE_R3"]


def _find_dl(root: Path) -> list[Sample]:
    # both partitions hold the same images
    images = files_by_name(root, ["partitioned_by_hospital", "partitioned_randomly"], "(r[123]_.+)")
    masks = [
        files_by_name(root, ["RIM-ONE_DL_reference_segmentations"], f"(r[123]_.+)-1-{kind}-T")
        for kind in ("Disc", "Cup")
    ]
    return [Sample(f"rimone_{name[:2].lower()}", name, image, files) for name, image, files in pair(images, *masks)]


def _find_r3(root: Path) -> list[Sample]:
    masks = [files_by_name(root, ["Average_masks"], f"(.+)-{kind}-Avg") for kind in ("Disc", "Cup")]
    return [Sample("rimone_r3", *files) for files in pair(files_by_name(root, ["Stereo Images"]), *masks)]


RIM_ONE_DL = Layout(
    name="rim_one_dl",
    expected="a folder with RIM-ONE_DL_images/ (partitioned_by_hospital/ or partitioned_randomly/) and "
    "RIM-ONE_DL_reference_segmentations/ (r1_NAME-1-Disc-T.png, r1_NAME-1-Cup-T.png)",
    counts={"rimone_r1": 98, "rimone_r2": 250, "rimone_r3": 137},
    find=_find_dl,
    decode=two_masks,
)
RIM_ONE_R3 = Layout(
    name="rim_one_r3",
    expected="a folder with Healthy/ and 'Glaucoma and suspects'/, each with 'Stereo Images'/ (N-1-L.jpg) and "
    "Average_masks/ (N-1-L-Disc-Avg.png, N-1-L-Cup-Avg.png)",
    counts={"rimone_r3": 159},
    find=_find_r3,
    decode=two_masks,
    stereo=True,
)
