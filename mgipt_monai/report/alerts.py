# SPDX-License-Identifier: Apache-2.0
"""What in a stream's records is worth a look, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np

from .formats import percent
from .record_reader import time_of

__all__ = ["alerts"]

Row = dict[str, Any]

LATEST, BEFORE = 20, 100
"""The latest images are held against so many before them."""
FAILED_SHARE = 0.1
FALLBACK_RISE = 0.2
LOSS_DRIFT = 1.0  # standard deviations of single images
PROMPT_NORM = 16.0  # of the default 249 factors of a colour photograph, each off by one
LONGEST_GAP = timedelta(days=1)
USUAL_GAPS = 10
GAPS_NAMED = 5


def alerts(rows: Sequence[Row]) -> list[str]:
    """Return one sentence for each thing that is worth a look; docs/records.md has the limits.

    Example:
        >>> alerts([{"status": "ok"}] * 18 + [{"status": "failed"}] * 2)
        ['2 of the latest 20 images failed']
    """
    done = [row for row in rows if row["status"] == "ok"]
    return [*_failures(rows), *_fallbacks(done), *_losses(done), *_prompts(done), *_gaps(rows)]


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    latest = rows[-LATEST:]
    failed = sum(row["status"] != "ok" for row in latest)
    if failed and failed >= FAILED_SHARE * len(latest):
        yield f"{failed} of the latest {len(latest)} images failed"


def _fallbacks(done: Sequence[Row]) -> Iterator[str]:
    fell_back = [row["decision"] == "unadapted" for row in done if "decision" in row]
    before, latest = fell_back[-LATEST - BEFORE : -LATEST], fell_back[-LATEST:]
    if len(before) >= LATEST and np.mean(latest) - np.mean(before) >= FALLBACK_RISE:
        yield (
            f"the guard fell back for {percent(np.mean(latest), 0)} % of the latest {LATEST} images, for "
            f"{percent(np.mean(before), 0)} % of the {len(before)} before"
        )


def _losses(done: Sequence[Row]) -> Iterator[str]:
    logarithms = np.array([math.log(max(row["loss_before"], 1e-12)) for row in done if "loss_before" in row])
    before, latest = logarithms[:-LATEST], logarithms[-LATEST:]
    if len(before) < LATEST:
        return
    far = (latest.mean() - before.mean()) / max(before.std(), 1e-12)
    if abs(far) >= LOSS_DRIFT:
        yield (
            f"the unadapted loss of the latest {LATEST} images is {abs(far):.1f} standard deviations "
            f"{'above' if far > 0 else 'below'} that of the {len(before)} before: another scanner, or other images?"
        )


def _prompts(done: Sequence[Row]) -> Iterator[str]:
    norms = [row["prompt_norm"] for row in done if "prompt_norm" in row]
    if norms and norms[-1] >= PROMPT_NORM:
        yield f"the global prompts are {norms[-1]:.1f} from ones: a roll-back or a new stream may do better"


def _gaps(rows: Sequence[Row]) -> Iterator[str]:
    times = [time for time in map(time_of, rows) if time is not None]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    usual = sorted(gaps)[len(gaps) // 2] if gaps else timedelta()
    long = [i for i, gap in enumerate(gaps) if gap >= max(LONGEST_GAP, USUAL_GAPS * usual)]
    for i in long[-GAPS_NAMED:]:
        yield f"no image for {gaps[i] / timedelta(days=1):.1f} days after {times[i]:%Y-%m-%d %H:%M} UTC"
    if len(long) > GAPS_NAMED:
        yield f"{len(long) - GAPS_NAMED} more such gaps before these"
