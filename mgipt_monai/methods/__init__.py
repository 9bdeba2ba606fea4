# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation methods, all called alike: ``method(image)`` adapts and returns logits."""

from __future__ import annotations

from .base import AdaptationMethod
from .mgipt import MGIPT
from .source import Source
from .vptta import VPTTA

__all__ = ["MGIPT", "VPTTA", "AdaptationMethod", "Source"]
