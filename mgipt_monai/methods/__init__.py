# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation methods, all called alike: ``method(image)`` adapts and returns logits."""

from __future__ import annotations

from .base import AdaptationMethod
from .bn import BatchNormAdaptation
from .cotta import CoTTA
from .grata import GraTa
from .mgipt import MGIPT
from .sar import SAR
from .site_calibration import SiteCalibration
from .source import Source
from .tent import Tent
from .vptta import VPTTA

__all__ = [
    "MGIPT",
    "SAR",
    "VPTTA",
    "AdaptationMethod",
    "BatchNormAdaptation",
    "CoTTA",
    "GraTa",
    "SiteCalibration",
    "Source",
    "Tent",
]
