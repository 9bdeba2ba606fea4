# SPDX-License-Identifier: Apache-2.0
"""What became of a stream's images, per site and month or day."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from mgipt_monai.summary import image_means

from .formats import percent

__all__ = ["Period", "record_table"]

Period = Literal["day", "month"]
Row = dict[str, Any]

HEADS = ["site", "", "images", "failed", "adapted", "unadapted", "learned", "s/image", "F", "DSC"]
LENGTHS = {"day": len("2026-01-31"), "month": len("2026-01")}
NONE = "-"


def record_table(rows: Sequence[Row], period: Period = "month") -> list[list[str]]:
    """Return the cells of the table: heads, a line per site and month or day in the order of the rows, all together.

    ``images`` are those that did not fail. A dash stands for what the records do not say: decisions without a guard,
    Dice without labels, the month of records without a time.

    Example:
        >>> row = {"site": "A", "status": "ok", "seconds": 1.0, "forwards": 25, "backwards": 17}
        >>> record_table([{**row, "time": "2026-01-31T08:00:00+00:00", "decision": "adapted"}])[1]
        ['A', '2026-01', '1', '0', '1', '0', '-', '1.00', '42.0', '-']
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.get("site", ""), row.get("time", NONE)[: LENGTHS[period]]), []).append(row)
    heads = [HEADS[0], period, *HEADS[2:]]
    return [heads, *([*key, *_cells(group)] for key, group in groups.items()), ["all", "", *_cells(rows)]]


def _cells(rows: Sequence[Row]) -> list[str]:
    done = [row for row in rows if row["status"] == "ok"]
    decisions = [row["decision"] for row in done if "decision" in row]
    learned = [row["learned"] for row in done if "learned" in row]
    costs = [row["forwards"] + row.get("backwards", 0) for row in done if "forwards" in row]
    dice = [means["dsc"] for means in map(image_means, done) if "dsc" in means]
    return [
        str(len(done)),
        str(len(rows) - len(done)),
        *(str(decisions.count(kind)) if decisions else NONE for kind in ("adapted", "unadapted")),
        str(sum(learned)) if learned else NONE,
        _mean((row["seconds"] for row in done if "seconds" in row), "{:.2f}".format),
        _mean(costs, "{:.1f}".format),
        _mean(dice, percent),
    ]


def _mean(values: Iterable[float], write: Any) -> str:
    values = list(values)
    return write(float(np.mean(values))) if values else NONE
