# SPDX-License-Identifier: Apache-2.0
"""Compares several methods over one labelled stream in Markdown tables.

Run as ``mgipt compare BENCHMARK`` on the folder of a benchmark, or on the output folders of single runs,
``RESULTS/source RESULTS/mgipt``, of which the first is the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgipt_monai.benchmark.results import summarise
from mgipt_monai.installed import require
from mgipt_monai.stream.records import RecordFile
from mgipt_monai.stream.summary import ALL

__all__ = ["load_results", "markdown", "markdown_table"]


def load_results(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Return the results of a benchmark folder, or summarise the records of several runs of ``evaluate.yaml``.

    Raises:
        FileNotFoundError: if a single folder has no ``results.json``.
        ValueError: if the runs are over different images.
    """
    if len(folders) == 1:
        return json.loads((Path(folders[0]) / "results.json").read_text(encoding="utf-8"))
    runs = {Path(folder).name: RecordFile(Path(folder) / "records.jsonl").read() for folder in folders}
    return summarise(runs, baseline=next(iter(runs)))


def markdown(results: dict[str, Any], metric: str = "dsc") -> str:
    """Return two Markdown tables: the means per site, and the statistics over all images.

    Metrics in [0, 1] are in percent. ``gain`` is the difference from the baseline with its 95 % interval, ``worse`` the
    share of images more than one point below it, ``F`` the forward and backward passes per image.
    """
    percent = results["metrics"][metric]["percent"]
    scale = 100 if percent else 1
    sites, overall = [], []
    for name, method in results["methods"].items():
        figures = method["metrics"][metric]
        for site, values in figures["sites"].items():
            shown = {"site": site, "images": values["images"], "method": name}
            shown |= {c: f"{scale * v:.2f}" for c, v in [*values["classes"].items(), ("mean", values["mean"])]}
            sites.append(shown | {"worst tenth": f"{scale * values['worst_tenth']:.2f}"})
        overall.append(_overall(name, method, figures, metric, scale, results))
    order = {site: i for i, site in enumerate([*results["stream"]["sites"], ALL])}
    sites.sort(key=lambda row: order[row["site"]])
    return "\n\n".join(markdown_table(rows) for rows in (sites, overall))


def _overall(
    name: str, method: dict[str, Any], figures: dict[str, Any], metric: str, scale: float, results: dict[str, Any]
) -> dict[str, str]:
    row = {"method": name} | {c: f"{scale * v:.2f}" for c, v in figures["classes"].items()}
    row["mean [95 %]"] = f"{scale * figures['mean']:.2f}{_bounds(figures['interval'], scale)}"
    against = (method["against_baseline"] or {}).get(metric)
    row["gain [95 %]"] = f"{scale * against['gain']:+.2f}{_bounds(against['interval'], scale, '+')}" if against else ""
    row["p"] = "" if not against or against["p_value"] is None else f"{against['p_value']:.2g}"
    worse = against["worse"] if against else None
    row["worse"] = "" if worse is None else f"{100 * worse:.0f} %"
    row["worst tenth"] = f"{scale * figures['worst_tenth']:.2f}"
    if figures["degradation"] is not None:
        row["rounds"] = " / ".join(f"{scale * value:.2f}" for value in figures["rounds"])
        row["degradation"] = f"{scale * figures['degradation']:+.2f}"
    for other, info in results["metrics"].items():
        if other != metric and other in method["metrics"]:
            row[other] = f"{(100 if info['percent'] else 1) * method['metrics'][other]['mean']:.2f}"
    return row | {"F": f"{method['forwards'] + method['backwards']:.1f}"}


def _bounds(interval: Sequence[float] | None, scale: float, sign: str = "") -> str:
    return "" if interval is None else " [" + ", ".join(f"{scale * bound:{sign}.2f}" for bound in interval) + "]"


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows (column to text) as one Markdown table; missing columns of a row are empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `mgipt compare`."""
    parser = argparse.ArgumentParser(
        prog="mgipt compare",
        description="Compare methods in Markdown tables.",
        epilog="example: mgipt compare results/source results/mgipt results/steady",
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="a benchmark folder, or several run folders, baseline first"
    )
    parser.add_argument("--metric", default="dsc", help="metric to compare (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if len(options.folders) > 1:
            require("benchmark", "scipy")
        elif not (Path(options.folders[0]) / "results.json").is_file():
            raise FileNotFoundError(
                f"there is no results.json in {options.folders[0]}: give a benchmark's folder, or those of several runs"
            )
        results = load_results(options.folders)
        if options.metric not in results["metrics"]:
            raise ValueError(f"there is no metric {options.metric}: choose from {', '.join(results['metrics'])}")
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(markdown(results, options.metric))


if __name__ == "__main__":
    main()
