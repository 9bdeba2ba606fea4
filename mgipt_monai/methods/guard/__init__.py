# SPDX-License-Identifier: Apache-2.0
"""A guard around any method: it decides whether the prediction is used and whether the method learns from the image."""

from __future__ import annotations

from .guard import Guard, Verdict
from .guarded import Guarded

__all__ = ["Guard", "Guarded", "Verdict"]
