# SPDX-License-Identifier: Apache-2.0
"""Low-frequency amplitude prompts: one per image, and several that persist along the stream (Eq. 1, 3, 4 and 5)."""

from __future__ import annotations

from .early_stop import PhotometricJitter, consistency_score, got_worse
from .frequency import FrequencyPrompt, LowFrequencies, prompt_offset
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
    "prompt_offset",
]
