# SPDX-License-Identifier: Apache-2.0
"""What a stream's records say: figures by site, whether adaptation helped, and which masks to look at first."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import ignite.distributed as idist
import numpy as np

from mgipt_monai.utils.files import atomic_path, write_csv
from mgipt_monai.utils.statistics import MARGIN, interval, per_case

__all__ = ["ALL", "StreamSummary", "aligned", "drift_alarms", "image_means", "image_of", "worst_tenth"]

KEPT = (
    "site",
    "round",
    "status",
    "seconds",
    "metrics",
    "unadapted_metrics",
    "agreement",
    "quality",
    "elsewhere",
    "decision",
    "evidence",
)
"""What is kept of a record."""
SHOWN = 3
"""Number of images that a sentence names."""
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

    def add(self, row: dict[str, Any], shown: str | None = None) -> None:
        """Add one record (see :class:`mgipt_monai.RecordFile`); only figures, name and failure are kept.

        Args:
            row: the record.
            shown: what stands for the image's name in files; None: its name.
        """
        kept = {key: row[key] for key in KEPT if row.get(key) is not None}
        kept["name"] = row.get("name", "") if shown is None else shown
        if monitor := row.get("monitor"):
            kept["monitor"] = {key: monitor.get(key) for key in ("alarm", "signal")}
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
        (at least one image). NaN values (absent classes) are ignored. If the images were also predicted without
        adaptation, there are ``unadapted_metrics``, and ``gain``: for each metric the ``mean`` difference that
        adaptation made, its 95 % ``interval`` (bootstrap over images), and the number of ``images``, and of those that
        are ``worse`` and ``better`` by more than a hundredth. ``agreement`` (Dice of the masks with and without
        adaptation) and ``quality`` are means over images of the lowest class.
        """
        by_site: dict[str, list[dict[str, Any]]] = {}
        for row in self._rows:
            by_site.setdefault(row["site"], []).append(row)
        return {site: _figures(rows) for site, rows in {**by_site, ALL: self._rows}.items()}

    def table(self, metric: str = "dsc") -> str:
        """Return the figures of one metric as a text table, in percent; only counts and times if it is missing."""
        figures = self.figures()
        columns = list(next((f["metrics"][metric] for f in figures.values() if metric in f["metrics"]), {}))
        is_compared = any(metric in values.get("gain", {}) for values in figures.values())
        compared = ["unadapted", "gain", "95 % interval", "worse"] if is_compared else []
        lines = [["site", "images", "failed", *[c.replace("_", " ") for c in columns], *compared, "s/image"]]
        for site, values in figures.items():
            found = values["metrics"].get(metric, {})
            numbers = [f"{100 * found[c]:.2f}" if c in found else "-" for c in columns]
            if gain := values.get("gain", {}).get(metric):
                unadapted = f"{100 * values['unadapted_metrics'][metric]['mean']:.2f}"
                numbers += [unadapted, f"{100 * gain['mean']:+.2f}", _interval(gain) or "-", str(gain["worse"])]
            else:
                numbers += ["-"] * len(compared)
            seconds = "-" if values["seconds_per_image"] is None else f"{values['seconds_per_image']:.2f}"
            lines.append([site, str(values["images"]), str(values["failed"]), *numbers, seconds])
        return aligned(lines)

    def verdict(self, metric: str = "dsc") -> list[str]:
        """Return sentences on whether adaptation helped, as far as that is known, and what to look at.

        Example:
            >>> summary = StreamSummary()
            >>> for name, dsc in (("a", 0.75), ("b", 0.82)):
            ...     row = {"name": name, "site": "A", "status": "ok", "seconds": 1.0, "metrics": {"dsc": {"disc": dsc}}}
            ...     summary.add({**row, "unadapted_metrics": {"dsc": {"disc": 0.8}}})
            >>> summary.verdict()
            ['adaptation changed the mean DSC by -1.50 points, 95 % interval [-5.00, +2.00]; 1 of 2 images got worse \
by more than a point, 1 better']
        """
        whole, done = self.figures()[ALL], [row for row in self._rows if row["status"] == "ok"]
        found = []
        if gain := whole.get("gain", {}).get(metric):
            interval = f", 95 % interval {_interval(gain)}" if gain["interval"] else ""
            found.append(
                f"adaptation changed the mean {metric.upper()} by {100 * gain['mean']:+.2f} points{interval}; "
                f"{gain['worse']} of {gain['images']} images got worse by more than a point, {gain['better']} better"
            )
        elif compared := sorted((min(row["agreement"].values()), row["name"]) for row in done if row.get("agreement")):
            mean, least = 100 * whole["agreement"], f"{compared[0][1]} ({100 * compared[0][0]:.0f} %)"
            found.append(
                f"masks with and without adaptation agree to {mean:.1f} % (Dice, least of the classes), least {least}; "
                "whether that helped, only labels tell: `mgipt commission` on five to twenty images"
            )
        if decisions := [row["decision"] for row in done if "decision" in row]:
            fell_back = decisions.count("unadapted")
            found.append(f"the guard fell back to no adaptation for {fell_back} of {len(decisions)} images")
        elif evidence := [row["evidence"] for row in done if "evidence" in row]:
            found.append(f"evidence that the site differs from the source: {evidence[-1]:.2f} (0 none, towards 1 much)")
        if elsewhere := [row["name"] for row in done if row.get("elsewhere")]:
            found.append(
                f"{_count(elsewhere)} unlike those before, so another scanner, another organ or a fault: "
                f"{_named(elsewhere)}"
            )
        if not whole["metrics"] and (worst := [row["name"] for row in self.review() if row.get("quality")]):
            found.append(f"expected quality {100 * whole['quality']:.0f} %; look first at {_named(worst)}")
        return found

    def review(self) -> list[dict[str, Any]]:
        """Return what is kept of each image, first those to look at: failed, unlike the others, low quality."""
        return sorted(
            self._rows,
            key=lambda row: (row["status"] == "ok", not row.get("elsewhere", False), _least(row.get("quality"))),
        )

    def write_review(self, path: str | os.PathLike[str]) -> None:
        """Write the images in the order of :meth:`review` to a CSV file, replacing it.

        Columns: ``name``, ``site``, ``look`` (``failed``, ``elsewhere`` or empty), ``quality`` (least of the classes),
        the quality of each class, and ``agreement`` with the prediction without adaptation (least of the classes).
        """
        lines = []
        for row in self.review():
            look = "failed" if row["status"] != "ok" else "elsewhere" if row.get("elsewhere") else ""
            quality, agreement = row.get("quality", {}), row.get("agreement", {})
            lines.append(
                {"name": row["name"], "site": row["site"], "look": look, "quality": min(quality.values(), default=None)}
                | {f"quality_{name}": value for name, value in quality.items()}
                | {"agreement": min(agreement.values(), default=None)}
            )
        with atomic_path(path) as part:
            write_csv(part, lines)


def aligned(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return cells as a text table: the first ``texts`` columns aligned left, the others right.

    Example:
        >>> print(aligned([["site", "images"], ["A", "12"]]))
        site  images
        A         12
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width) for i, (cell, width) in enumerate(pairs)
        ).rstrip()
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


def image_means(row: Mapping[str, Any], key: str = "metrics") -> dict[str, float]:
    """Return each metric's mean over the classes of an image, without absent classes."""
    means = {}
    for metric, classes in (row.get(key) or {}).items():
        values = [value for value in classes.values() if value is not None and not math.isnan(value)]
        if values:
            means[metric] = float(np.mean(values))
    return means


def worst_tenth(values: Sequence[float] | np.ndarray, higher_is_better: bool = True) -> float:
    """Return the mean of the worst tenth of the values (at least one value)."""
    ordered = np.sort(values) if higher_is_better else -np.sort(-np.asarray(values))
    return float(ordered[: max(1, len(values) // 10)].mean())


def _means_by_class(done: Sequence[Mapping[str, Any]], key: str = "metrics") -> dict[str, dict[str, float]]:
    """Return for each metric the mean of each class, of the images' means, and of the worst tenth of these."""
    by_class: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    means: dict[str, list[float]] = defaultdict(list)
    for row in done:
        for metric, mean in image_means(row, key).items():
            means[metric].append(mean)
            for name, value in row[key][metric].items():
                if value is not None and not math.isnan(value):
                    by_class[metric][name].append(value)
    return {
        metric: {
            **{name: float(np.mean(values)) for name, values in by_class[metric].items()},
            "mean": float(np.mean(values)),
            "worst_tenth": worst_tenth(values),
        }
        for metric, values in means.items()
    }


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if row["status"] == "ok"]
    summed: dict[str, Any] = {
        "images": len(done),
        "failed": len(rows) - len(done),
        "seconds_per_image": float(np.mean([row["seconds"] for row in done])) if done else None,
        "metrics": _means_by_class(done),
    }
    if alone := _means_by_class(done, "unadapted_metrics"):
        summed |= {"unadapted_metrics": alone, "gain": {metric: _gain(done, metric) for metric in alone}}
    for key in ("agreement", "quality"):
        if values := [_least(row[key]) for row in done if row.get(key)]:
            summed[key] = float(np.mean(values))
    return summed


def _gain(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Return what adaptation changed in a metric."""
    pairs = [(image_of(row), image_means(row), image_means(row, "unadapted_metrics")) for row in rows]
    found = [
        (name, after[metric] - before[metric]) for name, after, before in pairs if metric in after and metric in before
    ]
    gains = per_case([gain for _, gain in found], [name for name, _ in found]) if found else np.zeros(0)
    return {
        "mean": float(gains.mean()) if len(gains) else math.nan,
        "interval": interval(gains, seed=0),
        "images": len(gains),
        "worse": int((gains < -MARGIN).sum()),
        "better": int((gains > MARGIN).sum()),
    }


def _least(values: Any) -> float:
    """Return the lowest value of the classes, 0 without any."""
    return min(values.values(), default=0.0) if isinstance(values, Mapping) else 0.0


def _interval(gain: Mapping[str, Any]) -> str:
    return "[" + ", ".join(f"{100 * bound:+.2f}" for bound in gain["interval"]) + "]" if gain["interval"] else ""


def _count(names: Sequence[str]) -> str:
    return "1 image is" if len(names) == 1 else f"{len(names)} images are"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
