# SPDX-License-Identifier: Apache-2.0
"""The published source networks and the training loss of one of them."""

from __future__ import annotations

from .losses import BoundaryWeightedLoss
from .pranet import PraNet
from .resunet import ResUNet

__all__ = ["BoundaryWeightedLoss", "PraNet", "ResUNet"]
