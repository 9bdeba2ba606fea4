# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers."""

from __future__ import annotations

from .adaptation import TestTimeAdaptationHandler
from .peak_memory import PeakMemoryHandler

__all__ = ["PeakMemoryHandler", "TestTimeAdaptationHandler"]
