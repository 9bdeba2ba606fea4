# SPDX-License-Identifier: Apache-2.0
"""Streams of images: finding, ordering and reading them, and writing masks."""

from __future__ import annotations

from .dataset import StreamDataset, check_declared_size
from .demo import CAMERAS, Camera, SiteCamerad
from .dicom import DicomReader
from .masks import AddUnadaptedd, AddUncertaintyd, EstimateQualityd, LabelMapd, SaveMaskd, SaveUncertaintyd
from .order import order_stream, share_stream
from .outputs import check_outputs
from .photographs import PhotographReader
from .streams import find_stream
from .transforms import AdaptationResultd, CheckFiled, CheckImaged, CheckLogitsd, LabelToChannelsd, ToAxesOfd

__all__ = [
    "CAMERAS",
    "AdaptationResultd",
    "AddUnadaptedd",
    "AddUncertaintyd",
    "Camera",
    "CheckFiled",
    "CheckImaged",
    "CheckLogitsd",
    "DicomReader",
    "EstimateQualityd",
    "LabelMapd",
    "LabelToChannelsd",
    "PhotographReader",
    "SaveMaskd",
    "SaveUncertaintyd",
    "SiteCamerad",
    "StreamDataset",
    "ToAxesOfd",
    "check_declared_size",
    "check_outputs",
    "find_stream",
    "order_stream",
    "share_stream",
]
