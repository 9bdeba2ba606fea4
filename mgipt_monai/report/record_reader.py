# SPDX-License-Identifier: Apache-2.0
"""Reads record files, old and new, whole and damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

__all__ = ["read_records", "time_of"]

Row = dict[str, Any]

KINDS = {
    "status": str,
    "site": str,
    "time": str,
    "decision": str,
    "learned": bool,
    "metrics": dict,
    **dict.fromkeys(("seconds", "forwards", "backwards", "loss_before", "loss_after", "prompt_norm"), (int, float)),
}


def read_records(paths: Iterable[str | os.PathLike]) -> tuple[list[Row], int]:
    """Return the records of several files in the order of their times, and how many lines could not be read.

    Where any record has no time, the files stay one after the other. A line that is no record is left out: one that was
    cut off by a crash, or a value of another kind than records have.

    Raises:
        FileNotFoundError: if a file is absent.
    """
    rows, skipped = [], 0
    for path in paths:
        for line in filter(bytes.strip, Path(path).read_bytes().split(b"\n")):
            row = _parse(line)
            if row is None:
                skipped += 1
            else:
                rows.append(row)
    if all("time" in row for row in rows):
        rows.sort(key=time_of)
    return rows, skipped


def time_of(row: Row) -> datetime | None:
    """Return when an image was done; None for a record that does not say."""
    return datetime.fromisoformat(row["time"]) if row.get("time") else None


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        row = {key: value for key, value in row.items() if value is not None}
        fits = row["status"] in ("ok", "failed") and all(
            isinstance(row[k], KINDS[k]) for k in KINDS.keys() & row.keys()
        )
        if time_of(row) is not None and time_of(row).tzinfo is None:
            return None
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return row if fits else None
