# SPDX-License-Identifier: Apache-2.0
"""Prompt injectors: low-frequency amplitude prompts, one per image and several that last (Eq. 1, 3, 4 and 5)."""

from __future__ import annotations

from .early_stop import PhotometricJitter, consistency_score, got_worse
from .frequency import FrequencyPrompt, LowFrequencies
from .global_prompts import GlobalPrompts
from .instance_prompt import InstancePrompt, InstanceTuning

__all__ = [
    "FrequencyPrompt",
    "GlobalPrompts",
    "InstancePrompt",
    "InstanceTuning",
    "LowFrequencies",
    "PhotometricJitter",
    "consistency_score",
    "got_worse",
]
