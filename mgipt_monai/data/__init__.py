# SPDX-License-Identifier: Apache-2.0
"""Streams of images: finding, ordering and reading them, and writing masks."""

from __future__ import annotations

from .dataset import StreamDataset
from .demo import CAMERAS, Camera, SiteCamerad
from .masks import AddUncertaintyd, LabelMapd, SaveMaskd, SaveUncertaintyd
from .order import order_stream, share_stream
from .streams import find_stream
from .transforms import AdaptationResultd, CheckImaged, LabelToChannelsd

__all__ = [
    "CAMERAS",
    "AdaptationResultd",
    "AddUncertaintyd",
    "Camera",
    "CheckImaged",
    "LabelMapd",
    "LabelToChannelsd",
    "SaveMaskd",
    "SaveUncertaintyd",
    "SiteCamerad",
    "StreamDataset",
    "find_stream",
    "order_stream",
    "share_stream",
]
