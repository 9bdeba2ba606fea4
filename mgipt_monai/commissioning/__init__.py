# SPDX-License-Identifier: Apache-2.0
"""Commissioning of a site on a few labelled images: choose, correct, certify, deploy."""

from __future__ import annotations

from .commission import Audit, Commissioning, Row, audit, commission
from .site import commission_site, read_labelled, with_earlier, write_site
from .trial import BASES, CANDIDATES

__all__ = [
    "BASES",
    "CANDIDATES",
    "Audit",
    "Commissioning",
    "Row",
    "audit",
    "commission",
    "commission_site",
    "read_labelled",
    "with_earlier",
    "write_site",
]
