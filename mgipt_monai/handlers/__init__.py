# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers."""

from __future__ import annotations

from .adaptation import TestTimeAdaptationHandler

__all__ = ["TestTimeAdaptationHandler"]
