# SPDX-License-Identifier: Apache-2.0
"""What a comparison took, and its table of single images."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mgipt_monai.stream.summary import image_means
from mgipt_monai.utils.files import atomic_path
from mgipt_monai.utils.provenance import versions

__all__ = ["timing", "write_images_csv"]

Runs = Mapping[str, Sequence[Mapping[str, Any]]]

PLAIN = ("name", "site", "round", "method", "status", "reason", "seconds", "peak_memory_mib", "forwards", "backwards")


def timing(runs: Runs) -> dict[str, Any]:
    """Return seconds and memory of each method, with the machine and the versions; failed images do not count."""
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


def write_images_csv(runs: Runs, path: str | os.PathLike) -> None:
    """Write one row per image and method: what it is, what it cost, and each metric of each class and their mean."""
    rows = []
    for method, records in runs.items():
        for record in records:
            row = {key: record.get(key) for key in PLAIN} | {"method": method, "round": record.get("round", 1)}
            row["instance_size"] = record.get("instance_size")
            for metric, values in (record.get("metrics") or {}).items():
                row |= {f"{metric}_{name}": value for name, value in values.items()}
            row |= {f"{metric}_mean": mean for metric, mean in image_means(record).items()}
            rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
