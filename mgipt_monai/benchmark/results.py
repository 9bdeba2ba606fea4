# SPDX-License-Identifier: Apache-2.0
"""From the records of several methods over one stream to the figures of ``results.json``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mgipt_monai.stream.summary import image_means, worst_tenth

from .statistics import interval, per_case, shares, wilcoxon

__all__ = ["METRICS", "SCHEMA", "SCHEMA_VERSION", "summarise"]

SCHEMA, SCHEMA_VERSION = "mgipt_monai.results", 1
DISTANCES = ("hd95", "asd")
METRICS = {
    **{name: {"better": "higher", "percent": True, "unit": ""} for name in ("dsc", "e_max", "s")},
    **{name: {"better": "lower", "percent": False, "unit": "mm or pixels"} for name in DISTANCES},
}
"""How the known metrics are read; any other one counts as in [0, 1], higher is better."""

Rows = Sequence[Mapping[str, Any]]


def summarise(runs: Mapping[str, Rows], baseline: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Compare methods that ran over the same stream.

    An image that failed with any method is left out of all, and so is, for one metric, an image for which any method
    has no defined value (the distance to an empty mask).

    Args:
        runs: per method its records (see :class:`mgipt_monai.RecordFile`).
        baseline: the method that the others are held against; None compares with nothing.
        seed: of the bootstrap.

    Returns:
        ``stream``, ``baseline``, ``classes``, ``metrics`` and ``methods`` as documented for ``results.json``.

    Raises:
        ValueError: if the runs are not over the same images, or no image is left, or the baseline is not among them.
    """
    if baseline is not None and baseline not in runs:
        raise ValueError(f"the baseline {baseline!r} is none of the runs {', '.join(runs)}")
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
        raise ValueError("no image is left that every method processed: see the failures in the records")
    metrics = list(dict.fromkeys(metric for row in whole for metric in row["metrics"]))
    tables = {metric: _defined(kept, metric) for metric in metrics}
    return {
        "stream": {
            "images": len(first),
            "measured": len(whole),
            "rounds": max(row.get("round", 1) for row in first),
            "sites": list(dict.fromkeys(row["site"] for row in first)),
            "failed": failed,
        },
        "baseline": baseline,
        "classes": list(dict.fromkeys(c for row in whole for values in row["metrics"].values() for c in values)),
        "metrics": {metric: _reading(metric) for metric in metrics},
        "methods": {
            name: {
                "forwards": _mean(row.get("forwards", 0) for row in rows),
                "backwards": _mean(row.get("backwards", 0) for row in rows),
                "metrics": {m: _figures(tables[m][name], m, len(rows), seed) for m in metrics if tables[m][name]},
                "against_baseline": _gains(tables, name, baseline, seed),
                "instance_sizes": _sizes(rows),
            }
            for name, rows in kept.items()
        },
    }


def case_of(row: Mapping[str, Any]) -> str:
    """Return the image's name without its round."""
    return row["name"].removeprefix(f"round_{row.get('round', 1)}/")


def _reading(metric: str) -> dict[str, Any]:
    return METRICS.get(metric, METRICS["dsc"])


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _defined(runs: Mapping[str, Rows], metric: str) -> dict[str, list[Mapping[str, Any]]]:
    """Per method, the records of the images for which every method has all the values that any of them has."""

    def known(row: Mapping[str, Any]) -> set[str]:
        return {c for c, v in row["metrics"].get(metric, {}).items() if v is not None and math.isfinite(v)}

    columns = list(zip(*runs.values(), strict=True))
    usable = [any(map(known, rows)) and len(set(map(frozenset, map(known, rows)))) == 1 for rows in columns]
    return {name: [row for row, use in zip(rows, usable, strict=True) if use] for name, rows in runs.items()}


def _values(rows: Rows, metric: str) -> np.ndarray:
    return np.array([image_means({"metrics": {metric: row["metrics"][metric]}})[metric] for row in rows])


def _figures(rows: Rows, metric: str, images: int, seed: int) -> dict[str, Any]:
    values, higher = _values(rows, metric), _reading(metric)["better"] == "higher"
    cases = per_case(values, [case_of(row) for row in rows])
    by_round = [[v for v, row in zip(values, rows, strict=True) if row.get("round", 1) == r] for r in _rounds(rows)]
    rounds = [float(np.mean(values)) for values in by_round]
    sites = {}
    for site in dict.fromkeys(row["site"] for row in rows):
        here = [row["site"] == site for row in rows]
        of_site = [row for row, use in zip(rows, here, strict=True) if use]
        sites[site] = {
            "images": len(of_site),
            "mean": float(values[here].mean()),
            "worst_tenth": worst_tenth(values[here], higher),
            "classes": _classes(of_site, metric),
        }
    worsening = (rounds[0] - np.mean(rounds)) * (1 if higher else -1)
    return {
        "mean": float(values.mean()),
        "interval": interval(cases, seed),
        "worst_tenth": worst_tenth(values, higher),
        "images": len(rows),
        "undefined": images - len(rows),
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
        cases = per_case(differences, [case_of(row) for row in table[name]])
        worse, better = shares(differences) if _reading(metric)["percent"] else (None, None)
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
