# SPDX-License-Identifier: Apache-2.0
"""Comparison of methods over one stream: runs, results, statistics."""

from __future__ import annotations

from .benchmark import Benchmark
from .results import summarise
from .variants import overlaid_method

__all__ = ["Benchmark", "overlaid_method", "summarise"]
