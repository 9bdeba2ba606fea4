# SPDX-License-Identifier: Apache-2.0
"""The tables of the report, and how it formats numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from .folder import BenchmarkFolder

__all__ = [
    "TITLES",
    "Cell",
    "Column",
    "Table",
    "corrected",
    "percent",
    "points",
    "probability",
    "site_table",
    "span",
    "summary_table",
]


def percent(value: float, digits: int = 2) -> str:
    """Format a fraction in percent, without the sign.

    Example:
        >>> percent(0.92536), percent(0.25, digits=0)
        ('92.54', '25')
    """
    return f"{100 * value:.{digits}f}"


def points(value: float) -> str:
    """Format a difference of fractions in percentage points, with its sign (a minus, not a hyphen).

    Example:
        >>> points(0.012), points(-0.0064)
        ('+1.20', '−0.64')
    """
    return f"{100 * value:+.2f}".replace("-", "−")


def span(interval: tuple[float, float] | None, write: Callable[[float], str] = percent) -> str:
    """Format an interval; None, as for a single image, is "not defined".

    Example:
        >>> span((0.91, 0.93)), span((-0.01, 0.002), points), span(None)
        ('91.00 to 93.00', '−1.00 to +0.20', 'not defined')
    """
    if interval is None:
        return "not defined"
    low, high = interval
    return f"{write(low)} to {write(high)}"


def probability(value: float | None) -> str:
    """Format a p-value; None is a dash.

    Example:
        >>> probability(0.0123), probability(2e-9), probability(None)
        ('0.012', '< 0.001', '–')
    """
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def corrected(p_values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the p-values of several comparisons corrected for their number (Holm's step-down), without those of None.

    Example:
        >>> corrected({"bn": 0.04, "tent": 0.01, "source": None})
        {'tent': 0.02, 'bn': 0.04}
    """
    ordered = sorted((value, name) for name, value in p_values.items() if value is not None)
    found, highest = {}, 0.0
    for i, (value, name) in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - i) * value))
        found[name] = highest
    return found


TITLES = {"dsc": "DSC", "hd95": "HD95", "asd": "ASD", "e_max": "E-max", "s": "S"}
"""How metrics are written."""


class Cell(NamedTuple):
    """A formatted number, and a note below it in small print."""

    text: str = "–"
    note: str = ""


class Column(NamedTuple):
    """A column: the heading shared with its neighbours, its own heading, and a function from row to cell."""

    group: str
    head: str
    cell: Callable[[Any], Cell]


@dataclass(frozen=True)
class Table:
    """A formatted table.

    Attributes:
        groups: shared headings and the number of columns that each spans.
        heads: headings of the single columns.
        blocks: heading ("" for none) and rows of each block of rows; a row is its heading and its cells.
    """

    groups: list[tuple[str, int]]
    heads: list[str]
    blocks: list[tuple[str, list[tuple[str, list[Cell]]]]]


def summary_table(folder: BenchmarkFolder) -> Table:
    """Return a table with one row per method; columns without data are omitted."""
    results, baseline = folder.results, folder.baseline
    compared = {method: values for method, values in results["methods"].items() if values["against_baseline"]}
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
        adjusted = corrected({m: v["against_baseline"]["dsc"]["p_value"] for m, v in compared.items()})
        columns += [
            Column(group, "gain", _against(folder, lambda v: Cell(points(v["gain"]), span(v["interval"], points)))),
            Column(group, "p", _against(folder, lambda values: Cell(probability(values["p_value"])))),
            Column(group, "p, corrected", lambda method: Cell(probability(adjusted.get(method)))),
            Column(group, "images worse by\xa0>\xa01", _against(folder, lambda v: Cell(f"{percent(v['worse'], 0)} %"))),
        ]
    for metric in results["metrics"]:
        if metric != "dsc":
            columns.append(Column("mean of", _title(folder, metric), partial(_mean, folder, metric=metric)))
    columns.append(Column("per image", "cost, F", lambda method: _cost(results["methods"][method])))
    if folder.timing:
        times = folder.timing["methods"]
        columns.append(Column("per image", "seconds", lambda method: Cell(f"{times[method]['seconds']['median']:.3g}")))
        if any(values["peak_memory_mib"] is not None for values in times.values()):
            columns.append(Column("memory", "peak, MiB", lambda method: _whole(times[method]["peak_memory_mib"])))
    return _table(columns, [("", folder.methods)])


def site_table(folder: BenchmarkFolder) -> Table:
    """Return a table with a block per site and one row per method."""

    def figures(row: tuple[str, str], metric: str = "dsc") -> dict[str, Any]:
        site, method = row
        return folder.results["methods"][method]["metrics"].get(metric, {}).get("sites", {}).get(site, {})

    def gain(row: tuple[str, str]) -> Cell:
        site, method = row
        mean, baseline_mean = figures(row).get("mean"), figures((site, folder.required_baseline)).get("mean")
        if method == folder.baseline or mean is None or baseline_mean is None:
            return Cell()
        return Cell(points(mean - baseline_mean))

    def mean_of(metric: str, row: tuple[str, str]) -> Cell:
        return Cell(_formatted(folder, metric, figures(row, metric).get("mean")))

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
        images = f"{count} image{'' if count == 1 else 's'}"
        blocks.append((f"{site} ({images})", [(site, method) for method in folder.methods]))
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
    def cell(name: str, row: Any) -> Cell:
        return Cell(_formatted(folder, "dsc", classes(row).get(name)))

    return [Column("DSC, %", name, partial(cell, name)) for name in folder.results["classes"]]


def _mean(folder: BenchmarkFolder, method: str, metric: str, with_interval: bool = False) -> Cell:
    figures = folder.results["methods"][method]["metrics"].get(metric)
    if figures is None or figures["mean"] is None:
        return Cell()
    notes = [span(figures["interval"])] if with_interval else []
    notes += [f"{figures['undefined']} undefined"] if figures["undefined"] else []
    return Cell(_formatted(folder, metric, figures["mean"]), "; ".join(notes))


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


def _formatted(folder: BenchmarkFolder, metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return percent(value) if folder.results["metrics"][metric]["percent"] else f"{value:.2f}"


def _title(folder: BenchmarkFolder, metric: str) -> str:
    info = folder.results["metrics"][metric]
    unit = "%" if info["percent"] else info["unit"]
    return ", ".join(filter(None, [TITLES.get(metric, metric), unit]))
