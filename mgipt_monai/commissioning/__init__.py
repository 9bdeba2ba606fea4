# SPDX-License-Identifier: Apache-2.0
"""Commissioning of a site on a few labelled images."""

from __future__ import annotations

from .commission import BASES, Commissioning, Row, commission

__all__ = ["BASES", "Commissioning", "Row", "commission"]
