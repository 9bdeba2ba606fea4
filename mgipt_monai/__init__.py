# SPDX-License-Identifier: Apache-2.0
"""Continual test-time adaptation for medical image segmentation in MONAI: MGIPT, baselines, inferers and handlers."""

from __future__ import annotations

from mgipt_monai.inferers import AdaptiveInferer, PersistentInferer
from mgipt_monai.stream.records import RecordFile
from mgipt_monai.stream.state_file import StreamFile
from mgipt_monai.stream.summary import StreamSummary
from mgipt_monai.utils.files import load_state, save_state
from mgipt_monai.utils.weights import load_encoder_weights, load_source_weights

from . import _renamed, commissioning, data, handlers, methods, networks
from .benchmark import Benchmark
from .commissioning import commission, export_adapted
from .data import find_stream, order_stream
from .engines import AdaptationEvents, MachineFailureError, StreamFailedError, StreamingAdaptationEvaluator
from .handlers import SourceStatisticsHandler, TestTimeAdaptationHandler
from .methods import (
    MGIPT,
    SAR,
    VPTTA,
    AdaptationMethod,
    BatchNormAdaptation,
    CoTTA,
    GraTa,
    SiteCorrection,
    Source,
    Tent,
)
from .networks import SourceStatistics, measure_source_statistics

__version__ = "0.2.0"

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
    "MachineFailureError",
    "PersistentInferer",
    "RecordFile",
    "SiteCorrection",
    "Source",
    "SourceStatistics",
    "SourceStatisticsHandler",
    "StreamFailedError",
    "StreamFile",
    "StreamSummary",
    "StreamingAdaptationEvaluator",
    "Tent",
    "TestTimeAdaptationHandler",
    "commission",
    "commissioning",
    "data",
    "export_adapted",
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

_renamed.install()
__getattr__ = _renamed.renamed_names(__name__, {"SiteCalibration": "mgipt_monai.methods.SiteCorrection"})
