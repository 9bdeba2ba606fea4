# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page for the records of a stream: alerts, table and charts over time."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from mgipt_monai.stream.summary import image_of
from mgipt_monai.utils.outputs import output_file

from .page import page_environment
from .record_summary import Row, time_of
from .styles import BASELINE, MAIN, WIDTH, Chart, as_svg, legend_below, plain_axes

__all__ = ["record_charts", "write_record_page"]

HEIGHT = 2.8  # inches
UNDECIDED = "no decision"
KINDS = {
    "failed": ("x", "#d55e00"),
    UNDECIDED: ("D", "#7f7f7f"),
    "unadapted": ("s", BASELINE),
    "adapted": ("o", MAIN),
}
"""What became of an image: without a guard nothing decides whether its adapted prediction is used."""


def write_record_page(
    path: str | os.PathLike[str], rows: Sequence[Row], table: Sequence[Sequence[str]], alerts: Sequence[str]
) -> Path:
    """Write the page; the same records give the same bytes.

    Raises:
        FileExistsError: if a file stands there that no run wrote.
    """
    template = page_environment().get_template("records.html.j2")
    html = template.render(count=_count(rows), table=table, alerts=alerts, charts=record_charts(rows))
    folder, name = output_file(path)
    with folder.writing(name) as part:
        part.write_text(html, encoding="utf-8", errors="replace")
    return Path(path)


def _count(rows: Sequence[Row]) -> str:
    """Say how many images there are; those of several rounds count once."""
    rounds = max((row["round"] for row in rows if isinstance(row.get("round"), int)), default=1)
    images = len(rows) if rounds == 1 else len({image_of(row) for row in rows if "name" in row})
    return f"{images} image{'' if images == 1 else 's'}{f' in {rounds} rounds' if rounds > 1 else ''}"


def record_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return the charts, each omitted if no record has its data."""
    charts = [_decisions(rows)] if rows else []
    if any("loss_before" in row for row in rows):
        charts.append(
            _lines(
                rows,
                {"loss_before": ("before tuning", BASELINE, "s"), "loss_after": ("after", MAIN, "o")},
                "Alignment loss",
                "alignment loss",
                "Distance of each image from the source, before and after tuning its instance prompt. A lasting step "
                "means another scanner or other images.",
            )
        )
    if any(row.get("quality") for row in rows):
        least = [row | {"least": min(row["quality"].values())} if row.get("quality") else row for row in rows]
        charts.append(
            _lines(
                least,
                {"least": ("quality", MAIN, "o")},
                "Quality",
                "expected Dice",
                "Dice that the network expects of its mask, least of the classes. Without commissioning it is a score, "
                "not an estimate.",
            )
        )
    if any("prompt_norm" in row for row in rows):
        charts.append(
            _lines(
                rows,
                {"prompt_norm": ("global prompts", MAIN, "o")},
                "Distance of the prompts from ones",
                "distance from ones",
                "Euclidean distance of the global prompts from ones (no change to an image), after each image.",
            )
        )
    if any("monitor" in row for row in rows):
        monitors = [row.get("monitor", {}) for row in rows]
        evidence = [
            row | {key: monitor[key] for key in ("evidence_against", "limit") if isinstance(monitor.get(key), float)}
            for row, monitor in zip(rows, monitors, strict=True)
        ]
        charts.append(
            _lines(
                evidence,
                {"evidence_against": ("evidence", MAIN, "o"), "limit": ("alarm", BASELINE, "_")},
                "Evidence of drift",
                "evidence, log10",
                "Decimal logarithm of the evidence that images have changed since the site was commissioned. At the "
                "line the alarm is raised.",
            )
        )
    return charts


def _decisions(rows: Sequence[Row]) -> Chart:
    kinds = ["failed" if row["status"] != "ok" else row.get("decision", UNDECIDED) for row in rows]
    figure, axes = _figure()
    places = _places(rows, axes)
    shown = [kind for kind in KINDS if kind in kinds or kind == "failed"]
    for height, kind in enumerate(shown):
        marker, color = KINDS[kind]
        here = [place for place, own in zip(places, kinds, strict=True) if own == kind]
        axes.plot(here, [height] * len(here), marker, color=color, markersize=5, alpha=0.6)
    axes.set_yticks(range(len(shown)), [f"{kind} ({kinds.count(kind)})" for kind in shown])
    axes.set_ylim(-0.5, len(shown) - 0.5)
    plain_axes(axes)
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in shown)
    caption = "Outcome of each image. Without a guard there is no decision between the adapted and the unadapted mask."
    return Chart("Decisions", caption, f"Images over time: {counts}.", as_svg(figure))


def _lines(rows: Sequence[Row], lines: dict[str, tuple[str, str, str]], title: str, unit: str, caption: str) -> Chart:
    figure, axes = _figure()
    places = _places(rows, axes)
    for key, (label, color, marker) in lines.items():
        values = np.array([row.get(key, math.nan) for row in rows])
        axes.plot(places, values, marker, color=color, markersize=3.5, alpha=0.7, label=label)
    axes.set_ylabel(unit)
    plain_axes(axes)
    legend_below(figure, axes)
    return Chart(title, caption, f"{title} of each image over time.", as_svg(figure))


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, figure.subplots()


def _places(rows: Sequence[Row], axes: Axes) -> list[Any]:
    """Return the horizontal positions of the records: their times, or their numbers if any has no time."""
    times = [time_of(row) for row in rows]
    if None in times:
        axes.set_xlabel("image")
        return list(range(1, len(rows) + 1))
    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.set_xlabel("time (UTC)")
    return times
