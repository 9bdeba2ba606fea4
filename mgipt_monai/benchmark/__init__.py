# SPDX-License-Identifier: Apache-2.0
"""Methods compared over one stream: runs, figures, statistics."""

from __future__ import annotations

from .benchmark import Benchmark
from .results import summarise

__all__ = ["Benchmark", "summarise"]
