# SPDX-License-Identifier: Apache-2.0
"""Streams of images: finding, ordering and reading them, and writing masks."""

from __future__ import annotations

from mgipt_monai.data.dataset import PhotographReader, check_declared_size

from .dataset import StreamDataset
from .demo import CAMERAS, Camera, SiteCamerad
from .masks import AddUnadaptedd, AddUncertaintyd, EstimateQualityd, LabelMapd, SaveMaskd, SaveUncertaintyd
from .order import order_stream, share_stream
from .outputs import check_outputs
from .streams import find_stream
from .transforms import AdaptationResultd, CheckFiled, CheckImaged, LabelToChannelsd

__all__ = [
    "CAMERAS",
    "AdaptationResultd",
    "AddUnadaptedd",
    "AddUncertaintyd",
    "Camera",
    "CheckFiled",
    "CheckImaged",
    "EstimateQualityd",
    "LabelMapd",
    "LabelToChannelsd",
    "PhotographReader",
    "SaveMaskd",
    "SaveUncertaintyd",
    "SiteCamerad",
    "StreamDataset",
    "check_declared_size",
    "check_outputs",
    "find_stream",
    "order_stream",
    "share_stream",
]
