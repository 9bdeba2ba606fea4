# SPDX-License-Identifier: Apache-2.0
"""Alignment with the source (Eq. 2) and calibrated normalisation (Eq. 6) in a frozen network."""

from __future__ import annotations

from .fused import alignment_loss, calibrate, instance_statistics
from .layers import find_measurable_layers, find_norm_layers
from .norms import AlignedNorms, BlendedNorms
from .site import SiteNorms, SiteStatistics
from .site_rule import LayerContent, SiteRule
from .source_statistics import LayerStatistics, SourceStatistics, measure_source_statistics

__all__ = [
    "AlignedNorms",
    "BlendedNorms",
    "LayerContent",
    "LayerStatistics",
    "SiteNorms",
    "SiteRule",
    "SiteStatistics",
    "SourceStatistics",
    "alignment_loss",
    "calibrate",
    "find_measurable_layers",
    "find_norm_layers",
    "instance_statistics",
    "measure_source_statistics",
]
