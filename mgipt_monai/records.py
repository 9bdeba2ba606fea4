# SPDX-License-Identifier: Apache-2.0
"""The per-image record: one line of JSON for each image of a stream, in the order they came."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .state_file import atomic_path

__all__ = ["RecordFile", "in_words", "json_types"]


class RecordFile:
    """A JSON Lines file that grows by one line per image.

    Each line has ``name``, ``site``, ``round`` where the stream has rounds, ``status`` (``ok`` or ``failed``),
    ``reason`` if it failed, ``seconds``, the metrics where there is a label, and what the method did (see the method's
    ``last``).

    Args:
        path: the file; it is made with the first line.

    Example:
        >>> import tempfile
        >>> records = RecordFile(os.path.join(tempfile.mkdtemp(), "records.jsonl"))
        >>> records.append({"name": "eye_000", "status": "ok"})
        >>> records.read()
        [{'name': 'eye_000', 'status': 'ok'}]
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def append(self, row: dict[str, Any]) -> None:
        """Write one line; values that JSON does not know (NaN, infinite) become null."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(json_types(row), allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines; a last line cut off by a crash is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def keep(self, count: int) -> list[dict[str, Any]]:
        """Cut the file to its first ``count`` lines and return them.

        Raises:
            ValueError: if there are fewer.
        """
        rows = self.read()[:count]
        if len(rows) < count:
            raise ValueError(f"{self.path} has {len(rows)} of the {count} records of the stream to resume: start anew")
        with atomic_path(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return rows


def in_words(row: dict[str, Any]) -> str:
    """Say one record in a line for the log.

    Example:
        >>> in_words({"name": "A/eye", "status": "ok", "seconds": 0.5, "forwards": 25, "backwards": 17})
        'A/eye, 42 F, 0.50 s'
    """
    if row["status"] != "ok":
        return f"{row['name']} failed: {row['reason']}"
    words = [row["name"]]
    if row.get("instance_size"):
        words.append(f"size {row['instance_size']}, loss {row['loss_before']:.4g} -> {row['loss_after']:.4g}")
    if row.get("decision") == "unadapted":
        words.append(f"unadapted: {row['reasons'][0]}")
    words.append(f"{row.get('forwards', 0) + row.get('backwards', 0)} F")
    return ", ".join([*words, f"{row['seconds']:.2f} s"])


def json_types(value: Any) -> Any:
    """Return nested dicts and lists as JSON has them: keys are texts, numbers that JSON does not know are null.

    Example:
        >>> json_types({"consistency": {1: float("nan"), 3: 0.5}})
        {'consistency': {'1': None, '3': 0.5}}
    """
    if isinstance(value, dict):
        return {str(key): json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_types(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
