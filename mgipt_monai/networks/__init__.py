# SPDX-License-Identifier: Apache-2.0
"""The components of the methods: each can be used on its own or as a ``_target_`` in a MONAI config."""

from __future__ import annotations

from mgipt_monai._renamed import renamed_names

from .alignment import (
    AlignedNorms,
    BlendedNorms,
    LayerContent,
    LayerStatistics,
    SiteNorms,
    SiteRule,
    SiteStatistics,
    SourceStatistics,
    alignment_loss,
    calibrate,
    find_measurable_layers,
    find_norm_layers,
    instance_statistics,
    measure_source_statistics,
)
from .ensemble import ConfidenceEnsemble, MeanEnsemble, disagreement
from .look import SiteLook, SourceLook
from .nets import BoundaryWeightedLoss, PraNet, ResUNet
from .prompts import (
    FrequencyPrompt,
    GlobalPrompts,
    InstancePrompt,
    InstanceTuning,
    LowFrequencies,
    PhotometricJitter,
    consistency_score,
    got_worse,
    prompt_offset,
)

__all__ = [
    "AlignedNorms",
    "BlendedNorms",
    "BoundaryWeightedLoss",
    "ConfidenceEnsemble",
    "FrequencyPrompt",
    "GlobalPrompts",
    "InstancePrompt",
    "InstanceTuning",
    "LayerContent",
    "LayerStatistics",
    "LowFrequencies",
    "MeanEnsemble",
    "PhotometricJitter",
    "PraNet",
    "ResUNet",
    "SiteLook",
    "SiteNorms",
    "SiteRule",
    "SiteStatistics",
    "SourceLook",
    "SourceStatistics",
    "alignment_loss",
    "calibrate",
    "consistency_score",
    "disagreement",
    "find_measurable_layers",
    "find_norm_layers",
    "got_worse",
    "instance_statistics",
    "measure_source_statistics",
    "prompt_offset",
]

__getattr__ = renamed_names(__name__, {"Guard": "mgipt_monai.methods.Guard", "Verdict": "mgipt_monai.methods.Verdict"})
