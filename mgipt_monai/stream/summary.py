# SPDX-License-Identifier: Apache-2.0
"""Per-site and overall figures of a stream, computed from its per-image records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import ignite.distributed as idist
import numpy as np

__all__ = ["ALL", "StreamSummary", "aligned", "drift_alarms", "image_means", "image_of", "worst_tenth"]

ALL = "all"
"""The key of the figures over all sites."""


class StreamSummary:
    """Collects the records of a stream and summarises them by site, in the order of the sites' first images.

    Example:
        >>> summary = StreamSummary()
        >>> for dsc in (0.75, 0.85):
        ...     summary.add({"site": "A", "status": "ok", "seconds": 1.0, "metrics": {"dsc": {"disc": dsc}}})
        >>> summary.figures()["A"]["metrics"]["dsc"]
        {'disc': 0.8, 'mean': 0.8, 'worst_tenth': 0.75}
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._totals: dict[str, tuple[float, int]] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Add one record (see :class:`mgipt_monai.RecordFile`); only its figures and its failure are kept."""
        kept = {key: row.get(key) for key in ("site", "status", "seconds", "metrics")}
        if monitor := row.get("monitor"):
            kept |= {"name": row["name"], "monitor": {key: monitor.get(key) for key in ("alarm", "signal")}}
        if row["status"] != "ok":
            kept["failure"] = f"{row['name']}: {row['reason']}"
        self._take(kept)

    def _take(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        for metric, mean in image_means(row).items():
            total, count = self._totals.get(metric, (0.0, 0))
            self._totals[metric] = (total + mean, count + 1)

    def __len__(self) -> int:
        """Return the number of images, also failed ones."""
        return len(self._rows)

    @property
    def failures(self) -> list[str]:
        """Name and reason of each image that failed."""
        return [row["failure"] for row in self._rows if "failure" in row]

    @property
    def drift(self) -> list[str]:
        """What to do about each alarm for drift, see :func:`drift_alarms`."""
        return drift_alarms(self._rows)

    def of_all_processes(self) -> StreamSummary:
        """Return the summary over all processes of ``torch.distributed``; every process must call this."""
        whole = StreamSummary()
        for rows in cast("list[list[dict[str, Any]]]", idist.all_gather(self._rows)):
            for row in rows:
                whole._take(row)
        return whole

    @property
    def means(self) -> dict[str, float]:
        """Mean of each metric so far: the mean over images of their means over classes."""
        return {metric: total / count for metric, (total, count) in self._totals.items()}

    def figures(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each site, and of ``all`` images.

        Each has ``images``, ``failed``, ``seconds_per_image`` and ``metrics``: for each metric the mean of each class,
        the ``mean`` over images of their means over classes, and ``worst_tenth``, the mean of the lowest tenth of these
        (at least one image). NaN values (absent classes) are ignored.
        """
        by_site: dict[str, list[dict[str, Any]]] = {}
        for row in self._rows:
            by_site.setdefault(row["site"], []).append(row)
        return {site: _figures(rows) for site, rows in {**by_site, ALL: self._rows}.items()}

    def table(self, metric: str = "dsc") -> str:
        """Return the figures of one metric as a text table, in percent; only counts and times if it is missing."""
        figures = self.figures()
        columns = list(next((f["metrics"][metric] for f in figures.values() if metric in f["metrics"]), {}))
        lines = [["site", "images", "failed", *[c.replace("_", " ") for c in columns], "s/image"]]
        for site, values in figures.items():
            found = values["metrics"].get(metric, {})
            numbers = [f"{100 * found[c]:.2f}" if c in found else "-" for c in columns]
            seconds = "-" if values["seconds_per_image"] is None else f"{values['seconds_per_image']:.2f}"
            lines.append([site, str(values["images"]), str(values["failed"]), *numbers, seconds])
        return aligned(lines)


def aligned(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return cells as a text table: the first ``texts`` columns aligned left, the others right.

    Example:
        >>> print(aligned([["site", "images"], ["A", "12"]]))
        site  images
        A         12
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i < texts else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )


def drift_alarms(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return for each site whose drift monitor has its alarm on, in the latest record, when it began and what to do.

    Example:
        >>> monitors = [{"alarm": False, "signal": "area"}, *[{"alarm": True, "signal": "brightness"}] * 2]
        >>> drift_alarms([{"site": "A", "name": f"eye_{i}", "monitor": m} for i, m in enumerate(monitors)])[0]
        'the images of A have changed (brightness), at eye_1 at the latest: label ten images from after eye_1 and run \
mgipt commission again; until then the certificate does not hold'
    """
    alarms: dict[str, str | None] = {}
    for row in rows:
        monitor = row.get("monitor")
        if not monitor:
            continue
        site = str(row.get("site") or "")
        if not monitor.get("alarm"):
            alarms[site] = None
        elif alarms.get(site) is None:
            name = row.get("name", "")
            where = f"the images of {site}" if site else "the images"
            alarms[site] = (
                f"{where} have changed ({monitor.get('signal')}), at {name} at the latest: label ten images from after "
                f"{name} and run mgipt commission again; until then the certificate does not hold"
            )
    return [alarm for alarm in alarms.values() if alarm is not None]


def image_of(row: Mapping[str, Any]) -> str:
    """Return the name of a record's image without its round.

    Example:
        >>> image_of({"name": "round_2/A/eye", "round": 2})
        'A/eye'
    """
    return str(row["name"]).removeprefix(f"round_{row.get('round', 1)}/")


def image_means(row: Mapping[str, Any]) -> dict[str, float]:
    """Return each metric's mean over the classes of an image, without absent classes."""
    means = {}
    for metric, classes in (row.get("metrics") or {}).items():
        values = [value for value in classes.values() if value is not None and not math.isnan(value)]
        if values:
            means[metric] = float(np.mean(values))
    return means


def worst_tenth(values: Sequence[float] | np.ndarray, higher_is_better: bool = True) -> float:
    """Return the mean of the worst tenth of the values (at least one value)."""
    ordered = np.sort(values) if higher_is_better else -np.sort(-np.asarray(values))
    return float(ordered[: max(1, len(values) // 10)].mean())


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if row["status"] == "ok"]
    by_class: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    means: dict[str, list[float]] = defaultdict(list)
    for row in done:
        for metric, mean in image_means(row).items():
            means[metric].append(mean)
            for name, value in row["metrics"][metric].items():
                if value is not None and not math.isnan(value):
                    by_class[metric][name].append(value)
    metrics = {
        metric: {
            **{name: float(np.mean(values)) for name, values in by_class[metric].items()},
            "mean": float(np.mean(values)),
            "worst_tenth": worst_tenth(values),
        }
        for metric, values in means.items()
    }
    return {
        "images": len(done),
        "failed": len(rows) - len(done),
        "seconds_per_image": float(np.mean([row["seconds"] for row in done])) if done else None,
        "metrics": metrics,
    }
