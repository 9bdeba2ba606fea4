# SPDX-License-Identifier: Apache-2.0
"""Computes the output files of a benchmark from the records of several methods over one stream."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mgipt_monai.stream.summary import image_means, image_of, worst_tenth
from mgipt_monai.utils.files import write_csv
from mgipt_monai.utils.outputs import output_file
from mgipt_monai.utils.provenance import versions
from mgipt_monai.utils.statistics import interval, per_case, shares, wilcoxon

__all__ = ["METRICS", "metric_info", "summarise", "timing", "write_images_csv"]

DISTANCES = ("hd95", "asd")
UNKNOWN_UNIT = "mm or pixels"
METRICS = {
    **{name: {"better": "higher", "percent": True, "unit": ""} for name in ("dsc", "e_max", "s")},
    **{name: {"better": "lower", "percent": False, "unit": UNKNOWN_UNIT} for name in DISTANCES},
}
"""How to interpret the known metrics; any other is taken to be in [0, 1] with higher values better."""

PLAIN = ("name", "site", "round", "method", "status", "reason", "seconds", "peak_memory_mib", "forwards", "backwards")

Rows = Sequence[Mapping[str, Any]]


def summarise(
    runs: Mapping[str, Rows], baseline: str | None = None, seed: int = 0, unit: str | None = None
) -> dict[str, Any]:
    """Compare methods that ran over the same stream.

    An image that failed with any method is excluded for all methods. From a single metric, an image is also
    excluded if its value is undefined for any method (such as the distance to an empty mask).

    Args:
        runs: method to its records (see :class:`mgipt_monai.RecordFile`).
        baseline: the method that the others are compared with; None for no comparison.
        seed: seed of the bootstrap.
        unit: of distances, ``mm`` or ``pixels``; None if it is not known.

    Returns:
        ``stream``, ``baseline``, ``classes``, ``metrics`` and ``methods`` as documented for ``results.json``.

    Raises:
        ValueError: if the runs are over different images, no image is left, or the baseline is not one of the runs.
    """
    if baseline is not None and baseline not in runs:
        raise ValueError(f"the baseline {baseline!r} is not one of the runs {', '.join(runs)}")
    first = next(iter(runs.values()))
    for name, rows in runs.items():
        if [row["name"] for row in rows] != [row["name"] for row in first]:
            raise ValueError(f"{name} ran over other images than {next(iter(runs))}: run both over the same stream")
    failed = [
        {"name": row["name"], "method": name, "reason": row["reason"]}
        for name, rows in runs.items()
        for row in rows
        if row["status"] != "ok"
    ]
    lost = {failure["name"] for failure in failed}
    kept = {name: [row for row in rows if row["name"] not in lost] for name, rows in runs.items()}
    whole = next(iter(kept.values()))
    if not whole:
        raise ValueError("no image was processed by every method: see the failures in the records")
    images = {image_of(row) for row in whole}
    metrics = list(dict.fromkeys(metric for row in whole for metric in row["metrics"]))
    tables = {metric: _defined(kept, metric) for metric in metrics}
    return {
        "stream": {
            "images": len(first),
            "measured": len(whole),
            "measured_images": len(images),
            "rounds": max(row.get("round", 1) for row in first),
            "sites": list(dict.fromkeys(row["site"] for row in first)),
            "failed": failed,
        },
        "baseline": baseline,
        "classes": list(dict.fromkeys(c for row in whole for values in row["metrics"].values() for c in values)),
        "metrics": {metric: metric_info(metric, unit) for metric in metrics},
        "methods": {
            name: {
                "forwards": _mean(row.get("forwards", 0) for row in rows),
                "backwards": _mean(row.get("backwards", 0) for row in rows),
                "metrics": {m: _figures(tables[m][name], m, len(images), seed) for m in metrics if tables[m][name]},
                "against_baseline": _gains(tables, name, baseline, seed),
                "instance_sizes": _sizes(rows),
            }
            for name, rows in kept.items()
        },
    }


def timing(runs: Mapping[str, Rows]) -> dict[str, Any]:
    """Return the content of ``timing.json``: machine, versions, and time and memory of each method."""
    methods = {}
    for name, rows in runs.items():
        done = [row for row in rows if row["status"] == "ok"]
        seconds = [row["seconds"] for row in done]
        peaks = [row["peak_memory_mib"] for row in done if row.get("peak_memory_mib")]
        methods[name] = {
            "seconds": {"mean": float(np.mean(seconds)), "median": float(np.median(seconds))} if done else None,
            "peak_memory_mib": max(peaks, default=None),
        }
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "versions": versions(),
        "methods": methods,
    }


def write_images_csv(runs: Mapping[str, Rows], path: str | os.PathLike[str]) -> None:
    """Write a CSV table with one row per image and method: image, cost, and each metric per class and on average.

    A text that a spreadsheet program would take for a formula gets an apostrophe in front.

    Raises:
        FileExistsError: if a file stands there that no run wrote.
    """
    rows: list[dict[str, Any]] = []
    for method, records in runs.items():
        for record in records:
            row = {key: record.get(key) for key in PLAIN} | {"method": method, "round": record.get("round", 1)}
            row["instance_size"] = record.get("instance_size")
            for metric, values in (record.get("metrics") or {}).items():
                row |= {f"{metric}_{name}": value for name, value in values.items()}
            row |= {f"{metric}_mean": mean for metric, mean in image_means(record).items()}
            rows.append(row)
    folder, name = output_file(path)
    with folder.writing(name) as part:
        write_csv(part, rows)


def metric_info(metric: str, unit: str | None = None) -> dict[str, Any]:
    """Return the entry of :data:`METRICS` for a metric, known or not, with the unit of distances where it is known."""
    info = METRICS.get(metric, METRICS["dsc"])
    return {**info, "unit": unit} if unit and metric in DISTANCES else info


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _defined(runs: Mapping[str, Rows], metric: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return, by method, the records of images whose values of the metric are defined for the same classes with all."""

    def known(row: Mapping[str, Any]) -> set[str]:
        return {c for c, v in row["metrics"].get(metric, {}).items() if v is not None and math.isfinite(v)}

    columns = list(zip(*runs.values(), strict=True))
    usable = [any(map(known, rows)) and len(set(map(frozenset, map(known, rows)))) == 1 for rows in columns]
    return {name: [row for row, use in zip(rows, usable, strict=True) if use] for name, rows in runs.items()}


def _values(rows: Rows, metric: str) -> np.ndarray:
    return np.array([image_means({"metrics": {metric: row["metrics"][metric]}})[metric] for row in rows])


def _figures(rows: Rows, metric: str, images: int, seed: int) -> dict[str, Any]:
    values, higher = _values(rows, metric), metric_info(metric)["better"] == "higher"
    cases = per_case(values, [image_of(row) for row in rows])
    by_round = [[v for v, row in zip(values, rows, strict=True) if row.get("round", 1) == r] for r in _rounds(rows)]
    rounds = [float(np.mean(values)) for values in by_round]
    sites = {}
    for site in dict.fromkeys(row["site"] for row in rows):
        here = [row["site"] == site for row in rows]
        of_site = [row for row, use in zip(rows, here, strict=True) if use]
        sites[site] = {
            "images": len(of_images := per_case(values[here], [image_of(row) for row in of_site])),
            "mean": float(values[here].mean()),
            "worst_tenth": worst_tenth(of_images, higher),
            "classes": _classes(of_site, metric),
        }
    worsening = (rounds[0] - np.mean(rounds)) * (1 if higher else -1)
    return {
        "mean": float(values.mean()),
        "interval": interval(cases, seed),
        "worst_tenth": worst_tenth(cases, higher),
        "images": len(cases),
        "undefined": images - len(cases),
        "classes": _classes(rows, metric),
        "sites": sites,
        "rounds": rounds,
        "degradation": float(worsening) if len(rounds) > 1 else None,
    }


def _rounds(rows: Rows) -> list[int]:
    return sorted({row.get("round", 1) for row in rows})


def _classes(rows: Rows, metric: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["metrics"][metric].items():
            if value is not None and math.isfinite(value):
                found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _gains(tables: Mapping[str, Any], name: str, baseline: str | None, seed: int) -> dict[str, Any] | None:
    if baseline in (None, name):
        return None
    gains = {}
    for metric, table in tables.items():
        if not table[name]:
            continue
        differences = _values(table[name], metric) - _values(table[baseline], metric)
        cases = per_case(differences, [image_of(row) for row in table[name]])
        worse, better = shares(cases) if metric_info(metric)["percent"] else (None, None)
        gains[metric] = {
            "gain": float(differences.mean()),
            "interval": interval(cases, seed),
            "p_value": wilcoxon(cases),
            "worse": worse,
            "better": better,
        }
    return gains


def _sizes(rows: Rows) -> dict[str, int]:
    counts = Counter(row["instance_size"] for row in rows if row.get("instance_size"))
    return {str(size): counts[size] for size in sorted(counts)}
