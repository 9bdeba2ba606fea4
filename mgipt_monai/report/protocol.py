# SPDX-License-Identifier: Apache-2.0
"""The table of a protocol in which each site in turn is the source: a row per method, a column per source.

Run as ``python -m mgipt_monai.report.protocol RESULTS`` on the folder of ``python -m mgipt_monai.protocol``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mgipt_monai.benchmark.results import METRICS
from mgipt_monai.report.comparison import markdown_table
from mgipt_monai.report.tables import TITLES
from mgipt_monai.state_file import atomic_path

__all__ = ["PROTOCOL", "protocol_rows", "write_tables"]

PROTOCOL = "protocol.json"
"""The file that names a protocol's sources, in order, and the published figures."""

Row = dict[str, Any]


def protocol_rows(
    runs: Mapping[str, Mapping[str, Any] | None],
    metric: str = "dsc",
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Row]:
    """Return one row per method: its figure for each source in the first round, and the means over the sources.

    A source's figure is the mean over all images of its stream, of an image's mean over classes. Over the sources it is
    the plain mean, None while one of them is not done. With several rounds there are also the mean over all rounds and
    ``degradation``, the first round less that mean (for distances the other way round: positive is worse).

    Args:
        runs: source to what its ``results.json`` holds, None where it is not done yet.
        metric: one of the metrics there. Those in [0, 1] are given in percent.
        published: method to published ``first`` (round), mean of three ``rounds``, and ``degradation``, where known.

    Raises:
        ValueError: if the runs are not of one protocol: other methods, or another number of rounds.
    """
    done = {source: run for source, run in runs.items() if run is not None}
    first = next(iter(done.values()), {"methods": {}, "stream": {"rounds": 1}})
    rounds = first["stream"]["rounds"]
    for source, run in done.items():
        if (list(run["methods"]), run["stream"]["rounds"]) != (list(first["methods"]), rounds):
            raise ValueError(
                f"{source} ran other methods or rounds than {next(iter(done))}: run the protocol once more with the "
                "settings of one of them"
            )

    scale = 100 if _reading(metric)["percent"] else 1
    rows = []
    for method in first["methods"]:
        of_sources = [run and run["methods"][method]["metrics"].get(metric) for run in runs.values()]
        starts = [values and scale * values["rounds"][0] for values in of_sources]
        row = {"method": method, **dict(zip(runs, starts, strict=True)), "mean": _mean(starts)}
        if rounds > 1:
            row[f"mean of {rounds} rounds"] = _mean([v and scale * fmean(v["rounds"]) for v in of_sources])
            row["degradation"] = _mean([v and scale * v["degradation"] for v in of_sources])
        if published:
            of_paper = published.get(method, {})
            row["published"] = of_paper.get("first")
            if rounds == 3:
                row["published, mean of 3 rounds"] = of_paper.get("rounds")
                row["published, degradation"] = of_paper.get("degradation")
        rows.append(row)
    return rows


def write_tables(folder: str | os.PathLike) -> str:
    """Write ``table.md`` (two decimals) and ``table.csv`` (all) of a protocol's folder; return the Markdown.

    The cells of a source that is not done yet are empty, and so are the means.

    Raises:
        FileNotFoundError: if it is no folder of a protocol.
        ValueError: as :func:`protocol_rows`.
    """
    folder = Path(folder)
    if not (folder / PROTOCOL).is_file():
        raise FileNotFoundError(f"there is no {PROTOCOL} in {folder}: give the output folder of mgipt_monai.protocol")
    protocol = json.loads((folder / PROTOCOL).read_text(encoding="utf-8"))
    runs = {source: _results(folder / source) for source in protocol["sources"]}
    published = protocol["published"]
    tables = {metric: protocol_rows(runs, metric, published.get(metric)) for metric in published or ("dsc",)}
    parts = []
    for metric, rows in tables.items():
        unit = "%" if _reading(metric)["percent"] else _reading(metric)["unit"]
        parts.append(f"{TITLES.get(metric, metric)}, {unit}, by source site:")
        parts.append(markdown_table([{key: _written(value) for key, value in row.items()} for row in rows]))
    parts.append("\n".join(_counts(source, run) for source, run in runs.items()))
    text = "\n\n".join(parts) + "\n"
    with atomic_path(folder / "table.md") as part:
        part.write_text(text, encoding="utf-8")
    _write_csv(folder / "table.csv", [{"metric": metric, **row} for metric, rows in tables.items() for row in rows])
    return text


def _reading(metric: str) -> dict[str, Any]:
    return METRICS.get(metric, METRICS["dsc"])


def _results(folder: Path) -> dict[str, Any] | None:
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else fmean(values)


def _written(value: str | float | None) -> str:
    return f"{value:.2f}" if isinstance(value, float) else value or ""


def _counts(source: str, run: Mapping[str, Any] | None) -> str:
    if run is None:
        return f"- {source}: not done yet"
    stream = run["stream"]
    failed = f", {stream['images'] - stream['measured']} of them failed with a method and left out of all"
    images = f"- {source}: {stream['images']} images of {', '.join(stream['sites'])}"
    return images + (failed if stream["images"] != stream["measured"] else "")


def _write_csv(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables of a folder anew and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="output folder of mgipt_monai.protocol")
    print(write_tables(parser.parse_args(arguments).folder))


if __name__ == "__main__":
    main()
