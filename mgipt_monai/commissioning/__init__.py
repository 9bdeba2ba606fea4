# SPDX-License-Identifier: Apache-2.0
"""Commissioning of a site on a few labelled images: suggest which, choose, correct, certify, deploy."""

from __future__ import annotations

from .audit import Audit, audit
from .commission import Commissioning, Row, commission
from .export import export_adapted, export_file, export_site
from .site import commission_site, read_labelled, with_earlier, write_site
from .suggestion import Suggestion, suggest, write_suggestions
from .trial import BASES, CANDIDATES

__all__ = [
    "BASES",
    "CANDIDATES",
    "Audit",
    "Commissioning",
    "Row",
    "Suggestion",
    "audit",
    "commission",
    "commission_site",
    "export_adapted",
    "export_file",
    "export_site",
    "read_labelled",
    "suggest",
    "with_earlier",
    "write_site",
    "write_suggestions",
]
