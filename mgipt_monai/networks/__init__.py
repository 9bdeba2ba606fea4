# SPDX-License-Identifier: Apache-2.0
"""The parts of the method as networks: each is usable alone, and as a ``_target_`` of a MONAI config."""

from __future__ import annotations

from .alignment import AlignedNorms
from .blended_norms import BlendedNorms
from .calibration import calibrate
from .disagreement import disagreement
from .early_stop import consistency_score, got_worse
from .ensemble import ConfidenceEnsemble, MeanEnsemble
from .frequency_prompt import FrequencyPrompt, LowFrequencies
from .fused_normalization import alignment_loss, instance_statistics
from .global_prompts import GlobalPrompts
from .guard import Guard, Verdict
from .instance_prompt import InstancePrompt, InstanceTuning
from .jitter import PhotometricJitter
from .measure_source import measure_source_statistics
from .norm_layers import find_measurable_layers, find_norm_layers
from .pranet import PraNet
from .resunet import ResUNet
from .site_norms import SiteNorms
from .site_statistics import SiteStatistics
from .source_statistics import LayerStatistics, SourceStatistics

__all__ = [
    "AlignedNorms",
    "BlendedNorms",
    "ConfidenceEnsemble",
    "FrequencyPrompt",
    "GlobalPrompts",
    "Guard",
    "InstancePrompt",
    "InstanceTuning",
    "LayerStatistics",
    "LowFrequencies",
    "MeanEnsemble",
    "PhotometricJitter",
    "PraNet",
    "ResUNet",
    "SiteNorms",
    "SiteStatistics",
    "SourceStatistics",
    "Verdict",
    "alignment_loss",
    "calibrate",
    "consistency_score",
    "disagreement",
    "find_measurable_layers",
    "find_norm_layers",
    "got_worse",
    "instance_statistics",
    "measure_source_statistics",
]
