# SPDX-License-Identifier: Apache-2.0
"""Figures of what an adaptation method did to a stream (needs matplotlib)."""

from __future__ import annotations

from .examples import Example, draw_examples

__all__ = ["Example", "draw_examples"]
