# SPDX-License-Identifier: Apache-2.0
"""Commissioning a site: which images to label, and an alarm when later images are other than those labelled."""

from __future__ import annotations

from .monitor import DriftMonitor
from .suggestion import Suggestion, suggest, write_suggestions

__all__ = ["DriftMonitor", "Suggestion", "suggest", "write_suggestions"]
