# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers."""

from __future__ import annotations

from .adaptation import TestTimeAdaptationHandler
from .average_prompts import AveragePromptsHandler
from .peak_memory import PeakMemoryHandler

__all__ = ["AveragePromptsHandler", "PeakMemoryHandler", "TestTimeAdaptationHandler"]
