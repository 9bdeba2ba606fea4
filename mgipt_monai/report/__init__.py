# SPDX-License-Identifier: Apache-2.0
"""Reports on adaptation methods over a stream: charts, tables, and an HTML page with both (needs matplotlib)."""

from __future__ import annotations

from .examples import Example, draw_examples
from .pictures import PictureWriter

__all__ = ["Example", "PictureWriter", "draw_examples"]
