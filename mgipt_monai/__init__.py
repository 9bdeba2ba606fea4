# SPDX-License-Identifier: Apache-2.0
"""Continual test-time adaptation for medical image segmentation in MONAI: MGIPT and what surrounds it."""

from __future__ import annotations

from . import data, handlers, methods, networks
from .benchmark import Benchmark
from .data import find_stream, order_stream
from .engines import AdaptationEvents, StreamFailedError, StreamingAdaptationEvaluator
from .handlers import SourceStatisticsHandler, TestTimeAdaptationHandler
from .inferers import AdaptiveInferer
from .methods import (
    MGIPT,
    SAR,
    VPTTA,
    AdaptationMethod,
    BatchNormAdaptation,
    CoTTA,
    GraTa,
    SiteCalibration,
    Source,
    Tent,
)
from .networks import SourceStatistics, measure_source_statistics
from .persistent_inferer import PersistentInferer
from .records import RecordFile
from .state_file import load_state, save_state
from .stream_file import StreamFile
from .summary import StreamSummary
from .weights import load_encoder_weights, load_source_weights

__version__ = "0.1.0"

__all__ = [
    "MGIPT",
    "SAR",
    "VPTTA",
    "AdaptationEvents",
    "AdaptationMethod",
    "AdaptiveInferer",
    "BatchNormAdaptation",
    "Benchmark",
    "CoTTA",
    "GraTa",
    "PersistentInferer",
    "RecordFile",
    "SiteCalibration",
    "Source",
    "SourceStatistics",
    "SourceStatisticsHandler",
    "StreamFailedError",
    "StreamFile",
    "StreamSummary",
    "StreamingAdaptationEvaluator",
    "Tent",
    "TestTimeAdaptationHandler",
    "data",
    "find_stream",
    "handlers",
    "load_encoder_weights",
    "load_source_weights",
    "load_state",
    "measure_source_statistics",
    "methods",
    "networks",
    "order_stream",
    "save_state",
]
