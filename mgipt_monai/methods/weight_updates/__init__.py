# SPDX-License-Identifier: Apache-2.0
"""Methods that train weights, on a copy of the source network."""

from __future__ import annotations

from .cotta import CoTTA
from .grata import GraTa
from .sar import SAR
from .tent import Tent

__all__ = ["SAR", "CoTTA", "GraTa", "Tent"]
