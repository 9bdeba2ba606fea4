# SPDX-License-Identifier: Apache-2.0
"""Adds the peak memory of each image to its record."""

from __future__ import annotations

from pathlib import Path

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator

__all__ = ["PeakMemoryHandler"]

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemoryHandler:
    """Adds ``peak_memory_mib`` to the record of each image of a ``StreamingAdaptationEvaluator``.

    On a GPU it is the maximum that torch allocated during the image. On a CPU it is the peak resident memory of the
    process, including libraries, weights and memory left from earlier work, so it shows what a machine needs. It is
    None where the system does not report it (outside Linux). Attach it before the handler that writes the records.
    """

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)

    def _start(self, engine: SupervisedEvaluator) -> None:
        device = engine.state.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            RESET.write_text("5")  # resets the kernel's peak to the current value
        except OSError:
            return

    def _note(self, engine: SupervisedEvaluator) -> None:
        device = engine.state.device
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _resident_peak()
        engine.state.record["peak_memory_mib"] = peak


def _resident_peak() -> float | None:
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)
