# SPDX-License-Identifier: Apache-2.0
"""Converts published datasets from the folders that their owners distribute to the layout of this project.

Run as ``python -m mgipt_monai.data.published LAYOUT FOLDER --output_dir OUT``. Nothing is downloaded.
"""

from __future__ import annotations

from . import drishti, origa, polyps, preprocessed, refuge, rim_one
from .conversion import convert
from .layout import Layout, Sample

__all__ = ["LAYOUTS", "Layout", "Sample", "convert"]

LAYOUTS = {
    layout.name: layout
    for layout in (
        rim_one.RIM_ONE_DL,
        rim_one.RIM_ONE_R3,
        refuge.REFUGE,
        origa.ORIGA,
        drishti.DRISHTI_GS,
        preprocessed.PREPROCESSED,
        polyps.BKAI,
        polyps.CVC_CLINICDB,
        polyps.ETIS_LARIB,
        polyps.KVASIR_SEG,
    )
}
