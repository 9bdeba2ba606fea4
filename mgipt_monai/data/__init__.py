# SPDX-License-Identifier: Apache-2.0
"""Streams of images: where they come from, how they are read, and how masks are written back."""

from __future__ import annotations

from .adaptation_result import AdaptationResultd
from .cameras import CAMERAS, Camera
from .label_map import LabelMapd
from .save_mask import SaveMaskd
from .site_camera import SiteCamerad
from .stream_dataset import StreamDataset
from .stream_order import order_stream
from .stream_share import share_stream
from .streams import find_stream
from .transforms import CheckImaged, LabelToChannelsd
from .uncertainty import AddUncertaintyd, SaveUncertaintyd

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
