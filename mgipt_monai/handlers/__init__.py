# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers."""

from __future__ import annotations

from mgipt_monai.handlers.measure_source import SourceStatisticsHandler

from .adaptation import TestTimeAdaptationHandler
from .average_prompts import AveragePromptsHandler
from .commission_site import CommissioningHandler
from .evaluators import network_of
from .learn_site_rule import SiteRuleHandler
from .peak_memory import PeakMemoryHandler
from .resumable_training import ResumableTrainingHandler
from .tracking import StreamMLFlowHandler
from .work_ahead import WorkAheadHandler

__all__ = [
    "AveragePromptsHandler",
    "CommissioningHandler",
    "PeakMemoryHandler",
    "ResumableTrainingHandler",
    "SiteRuleHandler",
    "SourceStatisticsHandler",
    "StreamMLFlowHandler",
    "TestTimeAdaptationHandler",
    "WorkAheadHandler",
    "network_of",
]
