# SPDX-License-Identifier: Apache-2.0
"""What adaptation methods did to a stream: figures, tables, and a page of both (needs matplotlib)."""

from __future__ import annotations

from .examples import Example, draw_examples
from .pictures import PictureWriter

__all__ = ["Example", "PictureWriter", "draw_examples"]
