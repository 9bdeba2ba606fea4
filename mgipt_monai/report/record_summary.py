# SPDX-License-Identifier: Apache-2.0
"""A summary of record files: the table per site and period, and alerts about what needs a look.

Run as ``mgipt records records.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mgipt_monai.installed import require
from mgipt_monai.stream.records import check_figures, is_number
from mgipt_monai.stream.summary import aligned, drift_alarms, image_means

from .tables import percent

__all__ = ["Period", "Row", "alerts", "main", "read_records", "record_table", "time_of"]

Row = dict[str, Any]
Period = Literal["day", "month"]

TYPES: dict[str, type] = {
    "status": str,
    "site": str,
    "time": str,
    "decision": str,
    "learned": bool,
    "monitor": dict,
    "elsewhere": bool,
}
NUMBERS = ("seconds", "forwards", "backwards", "loss_before", "loss_after", "prompt_norm")

HEADS = ["site", "", "images", "failed", "adapted", "unadapted", "learned", "s/image", "F", "DSC"]
LENGTHS = {"day": len("2026-01-31"), "month": len("2026-01")}
NONE = "-"

LATEST, BEFORE = 20, 100
"""Number of latest images, and of the images before them that they are compared with."""
FAILED_SHARE = 0.1
FALLBACK_RISE = 0.2
LOSS_DRIFT = 1.0  # standard deviations of single images
PROMPT_NORM = 16.0  # of the default 249 factors for RGB images, each off by one
LONGEST_GAP = timedelta(days=1)
USUAL_GAPS = 10
GAPS_NAMED = 5


def read_records(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Row], int]:
    """Return the records of several files in order of time, and the number of lines that could not be read.

    If any record has no time, the records stay in the order of the files. Lines that are not records are skipped, such
    as a line cut off by a crash or one with values of the wrong type.

    Raises:
        FileNotFoundError: if a file does not exist.
    """
    rows: list[Row] = []
    skipped = 0
    for path in paths:
        for line in filter(bytes.strip, Path(path).read_bytes().split(b"\n")):
            row = _parse(line)
            if row is None:
                skipped += 1
            else:
                rows.append(row)
    times = [time for time in map(time_of, rows) if time is not None]
    if len(times) == len(rows):
        rows = [row for _, row in sorted(zip(times, rows, strict=True), key=lambda pair: pair[0])]
    return rows, skipped


def time_of(row: Row) -> datetime | None:
    """Return when an image was processed; None if the record does not say."""
    return datetime.fromisoformat(row["time"]) if row.get("time") else None


def _parse(line: bytes) -> Row | None:
    try:
        row = {key: value for key, value in json.loads(line).items() if value is not None}
        check_figures(row)
        fits = (
            row["status"] in ("ok", "failed")
            and all(isinstance(row[key], TYPES[key]) for key in TYPES.keys() & row.keys())
            and all(is_number(row[key]) for key in NUMBERS if key in row)
        )
        fits = fits and ("monitor" not in row or isinstance(row["monitor"]["alarm"], bool))
        time = time_of(row)
        if time is not None and time.tzinfo is None:
            return None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return row if fits else None


def record_table(rows: Sequence[Row], period: Period = "month") -> list[list[str]]:
    """Return the cells of the table: headings, a line per site and month or day in the order of the rows, and a total.

    ``images`` counts those that did not fail. A dash means missing from the records: decisions without a guard, Dice
    without labels, the month of records without a time.

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


def _mean(values: Iterable[float], write: Callable[[float], str]) -> str:
    numbers = list(values)
    return write(float(np.mean(numbers))) if numbers else NONE


def alerts(rows: Sequence[Row]) -> list[str]:
    """Return one sentence for each finding that needs a look; docs/how-to/monitor.md lists the limits.

    Example:
        >>> alerts([{"status": "ok"}] * 18 + [{"status": "failed"}] * 2)
        ['2 of the latest 20 images failed']
    """
    done = [row for row in rows if row["status"] == "ok"]
    of_images = [*_failures(rows), *_elsewhere(done), *_fallbacks(done), *_losses(done), *_prompts(done)]
    return [*drift_alarms(rows), *of_images, *_gaps(rows)]


def _elsewhere(done: Sequence[Row]) -> Iterator[str]:
    if names := [str(row.get("name", "")) for row in done[-LATEST:] if row.get("elsewhere")]:
        yield (
            f"{len(names)} of the latest {len(done[-LATEST:])} images are unlike those before, the last one "
            f"{names[-1]}: another scanner, another organ, or a fault?"
        )


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    latest = rows[-LATEST:]
    failed = sum(row["status"] != "ok" for row in latest)
    if failed and failed >= FAILED_SHARE * len(latest):
        yield f"{failed} of the latest {len(latest)} images failed"


def _fallbacks(done: Sequence[Row]) -> Iterator[str]:
    fell_back = [row["decision"] == "unadapted" for row in done if "decision" in row]
    before, latest = fell_back[-LATEST - BEFORE : -LATEST], fell_back[-LATEST:]
    if len(before) >= LATEST and np.mean(latest) - np.mean(before) >= FALLBACK_RISE:
        now, earlier = (percent(float(np.mean(part)), 0) for part in (latest, before))
        yield f"the guard fell back for {now} % of the latest {LATEST} images, {earlier} % of the {len(before)} before"


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
        yield f"the global prompts are {norms[-1]:.1f} from ones: consider a rollback or a new stream"


def _gaps(rows: Sequence[Row]) -> Iterator[str]:
    times = [time for time in map(time_of, rows) if time is not None]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    usual = sorted(gaps)[len(gaps) // 2] if gaps else timedelta()
    long = [i for i, gap in enumerate(gaps) if gap >= max(LONGEST_GAP, USUAL_GAPS * usual)]
    for i in long[-GAPS_NAMED:]:
        yield f"no image for {gaps[i] / timedelta(days=1):.1f} days after {times[i]:%Y-%m-%d %H:%M} UTC"
    if len(long) > GAPS_NAMED:
        yield f"{len(long) - GAPS_NAMED} more such gaps before those"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `mgipt records`."""
    parser = argparse.ArgumentParser(
        prog="mgipt records",
        description="Summarise the records of runs by site and time, with alerts.",
        epilog="example: mgipt records masks/records.jsonl --by day --html records.html",
    )
    parser.add_argument("records", nargs="+", help="records.jsonl of one or more runs")
    parser.add_argument("--by", choices=get_args(Period), default="month", help="period per line (default %(default)s)")
    parser.add_argument("--html", help="also write an HTML page with charts")
    options = parser.parse_args(arguments)
    try:
        if options.html:
            require("benchmark", "jinja2", "matplotlib")
        rows, skipped = read_records(options.records)
    except (OSError, ModuleNotFoundError) as error:
        parser.error(str(error))
    found = alerts(rows)
    if skipped:
        found.append(f"{skipped} lines could not be read and are skipped")
    table = record_table(rows, options.by)
    print(aligned(table, texts=2))
    print("\n".join(["", *(f"! {alert}" for alert in found)]) if found else "\nno alerts")
    if options.html:
        from .record_page import write_record_page

        try:
            print(write_record_page(options.html, rows, table, found))
        except OSError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
