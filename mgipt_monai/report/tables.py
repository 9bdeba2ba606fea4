# SPDX-License-Identifier: Apache-2.0
"""How the report writes numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from mgipt_monai.report.folder import BenchmarkFolder

__all__ = ["Cell", "Column", "Table", "percent", "points", "probability", "site_table", "span", "summary_table"]


def percent(value: float, digits: int = 2) -> str:
    """Write a share in percent, without the sign.

    Example:
        >>> percent(0.92536), percent(0.25, digits=0)
        ('92.54', '25')
    """
    return f"{100 * value:.{digits}f}"


def points(value: float) -> str:
    """Write a difference of shares in percentage points, with its sign (a minus, not a hyphen).

    Example:
        >>> points(0.012), points(-0.0064)
        ('+1.20', '−0.64')
    """
    return f"{100 * value:+.2f}".replace("-", "−")


def span(interval: tuple[float, float] | None, write: Callable[[float], str] = percent) -> str:
    """Write an interval, which a single image has not.

    Example:
        >>> span((0.91, 0.93)), span((-0.01, 0.002), points), span(None)
        ('91.00 to 93.00', '−1.00 to +0.20', 'not defined')
    """
    if interval is None:
        return "not defined"
    low, high = interval
    return f"{write(low)} to {write(high)}"


def probability(value: float | None) -> str:
    """Write a p-value, a dash where there is none.

    Example:
        >>> probability(0.0123), probability(2e-9), probability(None)
        ('0.012', '< 0.001', '–')
    """
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


TITLES = {"dsc": "DSC", "hd95": "HD95", "asd": "ASD", "e_max": "E-max", "s": "S"}


class Cell(NamedTuple):
    """A number as written, and what stands below it in small print."""

    text: str = "–"
    note: str = ""


class Column(NamedTuple):
    """A column: the heading that it shares with its neighbours, its own, and what it writes for a row."""

    group: str
    head: str
    cell: Callable[[Any], Cell]


@dataclass(frozen=True)
class Table:
    """A table ready to be drawn.

    Attributes:
        groups: shared headings and how many columns each spans.
        heads: the columns' own headings.
        blocks: per block of rows its heading ("" for none) and its rows, each a heading with its cells.
    """

    groups: list[tuple[str, int]]
    heads: list[str]
    blocks: list[tuple[str, list[tuple[str, list[Cell]]]]]


def summary_table(folder: BenchmarkFolder) -> Table:
    """Return one row per method; columns whose data are absent are left out."""
    results, baseline = folder.results, folder.baseline
    columns = [
        *_class_columns(folder, lambda method: results["methods"][method]["metrics"]["dsc"]["classes"]),
        Column("DSC, %", "mean", lambda method: _mean(folder, method, "dsc", with_interval=True)),
        Column(
            "DSC, %", "worst tenth", lambda m: Cell(percent(results["methods"][m]["metrics"]["dsc"]["worst_tenth"]))
        ),
    ]
    if results["stream"]["rounds"] > 1:
        columns.append(Column("DSC, %", "degradation", lambda method: _degradation(folder, method)))
    if baseline is not None:
        group = f"DSC against {baseline}, points"
        columns += [
            Column(group, "gain", _against(folder, lambda v: Cell(points(v["gain"]), span(v["interval"], points)))),
            Column(group, "p", _against(folder, lambda values: Cell(probability(values["p_value"])))),
            Column(group, "images worse by\xa0>\xa01", _against(folder, lambda v: Cell(f"{percent(v['worse'], 0)} %"))),
        ]
    for metric in results["metrics"]:
        if metric != "dsc":
            columns.append(Column("mean of", _title(folder, metric), lambda m, x=metric: _mean(folder, m, x)))
    columns.append(Column("per image", "cost, F", lambda method: _cost(results["methods"][method])))
    if folder.timing:
        times = folder.timing["methods"]
        columns.append(Column("per image", "seconds", lambda method: Cell(f"{times[method]['seconds']['median']:.3g}")))
        if any(values["peak_memory_mib"] is not None for values in times.values()):
            columns.append(Column("memory", "peak, MiB", lambda method: _whole(times[method]["peak_memory_mib"])))
    return _table(columns, [("", folder.methods)])


def site_table(folder: BenchmarkFolder) -> Table:
    """Return per site one row per method."""

    def figures(row: tuple[str, str], metric: str = "dsc") -> dict[str, Any]:
        site, method = row
        return folder.results["methods"][method]["metrics"].get(metric, {}).get("sites", {}).get(site, {})

    def gain(row: tuple[str, str]) -> Cell:
        site, method = row
        here, before = figures(row).get("mean"), figures((site, folder.baseline)).get("mean")
        return Cell() if method == folder.baseline or None in (here, before) else Cell(points(here - before))

    def mean_of(metric: str, row: tuple[str, str]) -> Cell:
        return Cell(_written(folder, metric, figures(row, metric).get("mean")))

    columns = [
        *_class_columns(folder, lambda row: figures(row).get("classes", {})),
        Column("DSC, %", "mean", partial(mean_of, "dsc")),
    ]
    if folder.baseline is not None:
        columns.append(Column("DSC, %", f"gain against {folder.baseline}, points", gain))
    for metric in folder.results["metrics"]:
        if metric != "dsc":
            columns.append(Column("mean of", _title(folder, metric), partial(mean_of, metric)))
    blocks = []
    for site in folder.results["stream"]["sites"]:
        count = max(figures((site, method)).get("images", 0) for method in folder.methods)
        blocks.append((f"{site} ({count} images)", [(site, method) for method in folder.methods]))
    return _table(columns, blocks, lambda row: row[1])


def _table(
    columns: list[Column], blocks: Iterable[tuple[str, list[Any]]], head: Callable[[Any], str] = lambda row: row
) -> Table:
    return Table(
        [(group, len(list(of_group))) for group, of_group in groupby(column.group for column in columns)],
        [column.head for column in columns],
        [(title, [(head(row), [column.cell(row) for column in columns]) for row in rows]) for title, rows in blocks],
    )


def _class_columns(folder: BenchmarkFolder, classes: Callable[[Any], dict[str, float | None]]) -> list[Column]:
    return [
        Column("DSC, %", name, lambda row, name=name: Cell(_written(folder, "dsc", classes(row).get(name))))
        for name in folder.results["classes"]
    ]


def _mean(folder: BenchmarkFolder, method: str, metric: str, with_interval: bool = False) -> Cell:
    figures = folder.results["methods"][method]["metrics"].get(metric)
    if figures is None or figures["mean"] is None:
        return Cell()
    notes = [span(figures["interval"])] if with_interval else []
    notes += [f"{figures['undefined']} undefined"] if figures["undefined"] else []
    return Cell(_written(folder, metric, figures["mean"]), "; ".join(notes))


def _degradation(folder: BenchmarkFolder, method: str) -> Cell:
    value = folder.results["methods"][method]["metrics"]["dsc"]["degradation"]
    return Cell() if value is None else Cell(points(value))


def _against(folder: BenchmarkFolder, write: Callable[[dict[str, Any]], Cell]) -> Callable[[str], Cell]:
    def cell(method: str) -> Cell:
        against = folder.results["methods"][method]["against_baseline"]
        return write(against["dsc"]) if against else Cell()

    return cell


def _cost(figures: dict[str, Any]) -> Cell:
    return Cell(f"{figures['forwards'] + figures['backwards']:.1f}")


def _whole(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:.0f}")


def _written(folder: BenchmarkFolder, metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return percent(value) if folder.results["metrics"][metric]["percent"] else f"{value:.2f}"


def _title(folder: BenchmarkFolder, metric: str) -> str:
    kind = folder.results["metrics"][metric]
    unit = "%" if kind["percent"] else kind["unit"]
    return ", ".join(filter(None, [TITLES.get(metric, metric), unit]))
