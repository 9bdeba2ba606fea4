# SPDX-License-Identifier: Apache-2.0
"""Several runs over one labelled stream side by side, as a table: who gains, and who is harmed.

Run as ``python -m mgipt_monai.report.comparison RESULTS/source RESULTS/mgipt``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgipt_monai.records import RecordFile
from mgipt_monai.summary import ALL, StreamSummary, image_means

__all__ = ["compare_runs"]

HARM = 0.01


def compare_runs(folders: Sequence[str | os.PathLike], metric: str = "dsc") -> list[dict[str, Any]]:
    """Compare the records of runs over the same images; the first run is what the others are held against.

    An image that failed in any run is left out of all.

    Args:
        folders: output folders of runs of the bundle's ``evaluate.yaml``.
        metric: the metric to compare, in [0, 1], higher is better.

    Returns:
        Per site and for all images, one row per run: ``site``, ``images``, ``run`` (the folder's name), the mean of
        each class, ``mean`` over classes, ``worst_tenth``, ``worse`` (share of images more than 0.01 below the first
        run; None for itself) and ``cost`` (forwards and backwards per image).

    Raises:
        ValueError: if the runs have no image in common.
    """
    runs = {}
    for folder in folders:
        rows = RecordFile(Path(folder) / "records.jsonl").read()
        runs[Path(folder).name] = {row["name"]: row for row in rows if row["status"] == "ok"}
    first, *_ = runs.values()
    names = [name for name in first if all(name in rows for rows in runs.values())]
    if not names:
        raise ValueError(f"the runs {', '.join(runs)} have no image in common that none of them failed at")
    table = []
    sites = list(dict.fromkeys(first[name]["site"] for name in names))
    for site in [*sites, ALL]:
        of_site = [name for name in names if site in (first[name]["site"], ALL)]
        reference = _means(first, of_site, metric)
        for run, rows in runs.items():
            summary = StreamSummary()
            for name in of_site:
                summary.add(rows[name])
            means = _means(rows, of_site, metric)
            table.append(
                {
                    "site": site,
                    "images": len(of_site),
                    "run": run,
                    **summary.figures()[ALL]["metrics"][metric],
                    "worse": None if rows is first else float((means < reference - HARM).mean()),
                    "cost": float(np.mean([rows[n].get("forwards", 0) + rows[n].get("backwards", 0) for n in of_site])),
                }
            )
    return table


def _means(rows: dict[str, dict[str, Any]], names: Sequence[str], metric: str) -> np.ndarray:
    return np.array([image_means(rows[name])[metric] for name in names])


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """Write the table in Markdown, metrics in percent."""
    texts = {"site": str, "run": str, "images": str, "worse": lambda v: "" if v is None else f"{100 * v:.0f} %"}
    texts["cost"] = lambda value: f"{value:.1f}"
    lines = [[name.replace("_", " ") for name in table[0]], ["---"] * len(table[0])]
    lines += [[texts.get(key, lambda v: f"{100 * v:.2f}")(value) for key, value in row.items()] for row in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the table of the folders given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="output folders; the first is held against the others")
    parser.add_argument("--metric", default="dsc")
    arguments = parser.parse_args()
    print(markdown(compare_runs(arguments.folders, arguments.metric)))


if __name__ == "__main__":
    main()
