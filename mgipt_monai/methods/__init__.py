# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation methods with one interface: ``method(image)`` adapts and returns logits."""

from __future__ import annotations

from mgipt_monai._renamed import renamed_names

from .base import AdaptationMethod
from .bn import BatchNormAdaptation, DyNo
from .commissioned import Commissioned, SiteSetting
from .drift_monitor import DriftMonitor
from .guard import Guard, Guarded, Verdict
from .intent import InTEnt
from .mgipt import MGIPT
from .site_correction import SiteCorrection
from .site_memory import SiteMemory
from .site_rule import learn_site_rule
from .source import Source
from .ttn import TTN, InterpolationWeights, learn_interpolation_weights, select_channels
from .vptta import VPTTA
from .weight_updates import SAR, CoTTA, GraTa, Tent

__all__ = [
    "MGIPT",
    "SAR",
    "TTN",
    "VPTTA",
    "AdaptationMethod",
    "BatchNormAdaptation",
    "CoTTA",
    "Commissioned",
    "DriftMonitor",
    "DyNo",
    "GraTa",
    "Guard",
    "Guarded",
    "InTEnt",
    "InterpolationWeights",
    "SiteCorrection",
    "SiteMemory",
    "SiteSetting",
    "Source",
    "Tent",
    "Verdict",
    "learn_interpolation_weights",
    "learn_site_rule",
    "select_channels",
]

__getattr__ = renamed_names(__name__, {"SiteCalibration": "mgipt_monai.methods.SiteCorrection"})
