# SPDX-License-Identifier: Apache-2.0
"""Everything that lasts of a stream: its state file, its records, its summary, and hidden names."""

from __future__ import annotations

from .pseudonyms import Pseudonyms
from .records import AuditTrail, RecordFile
from .state_file import StreamFile
from .summary import StreamSummary

__all__ = ["AuditTrail", "Pseudonyms", "RecordFile", "StreamFile", "StreamSummary"]
