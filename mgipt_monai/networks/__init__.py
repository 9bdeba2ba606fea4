# SPDX-License-Identifier: Apache-2.0
"""The parts of the method as networks: each is usable alone, and as a ``_target_`` of a MONAI config."""

from __future__ import annotations

from .alignment import AlignedNorms, alignment_loss
from .blended_norms import BlendedNorms
from .calibration import calibrate, instance_statistics, normalize
from .early_stop import consistency_score, got_worse
from .ensemble import ConfidenceEnsemble
from .frequency_prompt import FrequencyPrompt, LowFrequencies
from .global_prompts import GlobalPrompts
from .instance_prompt import InstancePrompt, InstanceTuning
from .jitter import PhotometricJitter
from .norm_layers import find_norm_layers
from .resunet import ResUNet

__all__ = [
    "AlignedNorms",
    "BlendedNorms",
    "ConfidenceEnsemble",
    "FrequencyPrompt",
    "GlobalPrompts",
    "InstancePrompt",
    "InstanceTuning",
    "LowFrequencies",
    "PhotometricJitter",
    "ResUNet",
    "alignment_loss",
    "calibrate",
    "consistency_score",
    "find_norm_layers",
    "got_worse",
    "instance_statistics",
    "normalize",
]
