# SPDX-License-Identifier: Apache-2.0
"""The demo's photographs: synthetic eyes, and the cameras that take them."""

from __future__ import annotations

from .cameras import CAMERAS, Camera, SiteCamerad

__all__ = ["CAMERAS", "Camera", "SiteCamerad"]
