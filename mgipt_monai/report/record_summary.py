# SPDX-License-Identifier: Apache-2.0
"""Reads record files, old and new, whole and damaged."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mgipt_monai.report.tables import percent
from mgipt_monai.stream.summary import aligned, image_means

__all__ = ["Period", "alerts", "main", "read_records", "record_table", "time_of"]

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", help="records.jsonl of one or more runs")
    parser.add_argument("--by", choices=get_args(Period), default="month", help="what a line of the table is of")
    parser.add_argument("--html", help="write a page with charts too (needs jinja2)")
    options = parser.parse_args(arguments)
    try:
        rows, skipped = read_records(options.records)
    except OSError as error:
        parser.error(str(error))
    found = alerts(rows)
    if skipped:
        found.append(f"{skipped} lines could not be read and are left out")
    table = record_table(rows, options.by)
    print(aligned(table, texts=2))
    print("\n".join(["", *(f"! {alert}" for alert in found)]) if found else "\nno alerts")
    if options.html:
        from .record_page import write_record_page

        print(write_record_page(options.html, rows, table, found))


if __name__ == "__main__":
    main()
