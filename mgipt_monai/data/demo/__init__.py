# SPDX-License-Identifier: Apache-2.0
"""Photographs of the demo: synthetic eyes, and the cameras that photograph them."""

from __future__ import annotations

from .cameras import CAMERAS, Camera, SiteCamerad

__all__ = ["CAMERAS", "Camera", "SiteCamerad"]
