# SPDX-License-Identifier: Apache-2.0
"""The state file of a stream: adaptation state, position, weights and settings it belongs to, and snapshots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.utils.files import load_state, save_state
from mgipt_monai.utils.provenance import fingerprint
from mgipt_monai.utils.state_checks import check_keys, check_number

__all__ = ["StreamFile", "check_content"]

SCHEMA, VERSION = "mgipt_monai.stream", 1
KEYS = {"schema", "version", "weights", "settings", "adaptation", "position", "site", "snapshots"}


class StreamFile:
    """A stream's state on disk: tensors and plain types, written atomically, used by one process at a time.

    It holds the adaptation state, the number of images done, the latest site's name, the fingerprint of the source
    weights, the method's settings, and the latest snapshots. Its size does not depend on the number of images seen.

    Args:
        path: the file; a process that adapts holds the lock ``<path>.lock``.
        snapshot_every: number of images between two snapshots; a new site adds one as well.
        snapshots: number of snapshots to keep, dropping the oldest first; 0 keeps none.

    Raises:
        ValueError: at construction, for ``snapshot_every`` below 1 or ``snapshots`` below 0.

    Example:
        >>> import tempfile, torch
        >>> from mgipt_monai import MGIPT
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 1, 1))
        >>> method = MGIPT(network, steps=1)
        >>> _ = method(torch.rand(1, 1, 16, 16))
        >>> stream = StreamFile(os.path.join(tempfile.mkdtemp(), "stream.pt"))
        >>> stream.save(method, {"adaptation": method.adaptation_state(), "position": 1, "site": "clinic"})
        >>> stream.load(MGIPT(network, steps=1))["position"]
        1
    """

    def __init__(self, path: str | os.PathLike, snapshot_every: int = 100, snapshots: int = 5) -> None:
        if snapshot_every < 1:
            raise ValueError(f"snapshot_every must be at least 1, got {snapshot_every}")
        if snapshots < 0:
            raise ValueError(f"snapshots must not be negative, got {snapshots}")
        self.path, self.snapshot_every, self.snapshots = Path(path), snapshot_every, snapshots
        self._lock = FileLock(f"{self.path}.lock")
        self._kept: list[dict[str, Any]] = []
        self._weights: str | None = None

    def exists(self) -> bool:
        """Whether there is a state to continue from."""
        return self.path.is_file()

    def acquire(self) -> None:
        """Lock the file against other processes until :meth:`release`, or until this process ends.

        Raises:
            RuntimeError: if another process holds the lock.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"another process adapts with {self.path}: give each stream its own state file, or wait until that "
                "process ends"
            ) from error

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def start(self, method: AdaptationMethod) -> None:
        """Start a new stream without snapshots, for the current weights of the method's network."""
        self._kept, self._weights = [], fingerprint(method.network)

    def load(self, method: AdaptationMethod) -> dict[str, Any]:
        """Load the stream's state into a method, and return the file's content.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if it is not a stream's state, or was made with other weights, another method or other settings;
                the message names the difference, and the method is unchanged.
        """
        self._weights = fingerprint(method.network)
        content = read(self.path)
        if content["weights"] != self._weights:
            raise ValueError(
                f"{self.path} belongs to a network with other weights: start a new stream, or load the weights it was "
                f"made with (SHA-256 {content['weights'][:12]}..., this network has {self._weights[:12]}...)"
            )
        differing = differences(content["settings"], method.settings())
        if differing:
            raise ValueError(
                f"{self.path} was made with other settings: {'; '.join(differing)}; "
                "set them back, or start a new stream"
            )
        try:
            method.load_adaptation_state(content["adaptation"])
        except ValueError as error:
            raise ValueError(f"cannot continue from {self.path}: {error}; remove it to start a new stream") from error
        self._kept = content["snapshots"]
        return content

    def save(self, method: AdaptationMethod, state: dict[str, Any]) -> None:
        """Write the stream's state.

        Args:
            method: the method that adapts.
            state: ``adaptation`` (its state), ``position`` (number of images done) and ``site`` (of the latest image).
        """
        own = {"schema": SCHEMA, "version": VERSION, "settings": method.settings()}
        own["weights"] = self._weights = self._weights or fingerprint(method.network)
        save_state({**own, **state, "snapshots": self._kept}, self.path)

    def snapshot(self, state: dict[str, Any], always: bool = False) -> None:
        """Keep a state (see :meth:`save`) as a snapshot, every ``snapshot_every`` images or ``always``."""
        passed = state["position"] - (self._kept[-1]["position"] if self._kept else 0)
        if self.snapshots and passed >= (1 if always else self.snapshot_every):
            self._kept = [*self._kept, state][-self.snapshots :]

    def rollback(self, to: int) -> None:
        """Make a snapshot the current state; the images after it count as not seen, their records stay.

        Args:
            to: a snapshot's ``position``: the number of images done at that time.

        Raises:
            RuntimeError: if another process adapts with the file.
            ValueError: if there is no such snapshot; the message lists the existing ones.
        """
        self.acquire()
        try:
            content = read(self.path)
            found = {state["position"]: state for state in content["snapshots"]}
            if to not in found:
                there = ", ".join(map(str, found)) or "none"
                raise ValueError(f"{self.path} has no snapshot after {to} images; there are: {there}")
            kept = [state for state in content["snapshots"] if state["position"] <= to]
            save_state({**content, **found[to], "snapshots": kept}, self.path)
        finally:
            self.release()


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Return a stream file's content.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a stream file, or has another version.
    """
    content = load_state(path)
    if not isinstance(content.get("schema"), str) or content["schema"] != SCHEMA or set(content) != KEYS:
        raise ValueError(f"{path} is not a stream's state: remove it to start a new stream")
    if not isinstance(content["version"], int) or content["version"] != VERSION:
        raise ValueError(f"{path} is of version {content['version']}, this mgipt_monai reads version {VERSION}")
    try:
        check_content(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a stream's state ({error}): remove it to start a new stream") from error
    return content


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Describe where two nested dicts of plain settings differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [d for k in keys for d in differences(one.get(k), other.get(k), f"{name}.{k}" if name else k)]
    return [] if one == other else [f"{name} was {one!r}, is {other!r}"]


def change(one: Any, other: Any) -> dict[str, float]:
    """Return, for each list of tensors in two adaptation states, the largest absolute difference.

    Lists that are missing in one of them, or have different shapes, count as infinitely far apart.
    """
    far = {}
    for key in dict.fromkeys([*one, *other]):
        pair = [state.get(key) for state in (one, other)]
        if not any(isinstance(value, list) for value in pair):
            continue
        shapes = [None if value is None else [tuple(tensor.shape) for tensor in value] for value in pair]
        distances = [float((a - b).abs().max()) for a, b in zip(*pair, strict=True)] if shapes[0] == shapes[1] else None
        far[key] = float("inf") if distances is None else max(distances, default=0.0)
    return far


DEPTH = 8
"""Maximum nesting depth of settings; those of the methods have three levels."""


def check_content(content: dict[str, Any]) -> None:
    """Check the types of everything in a stream file, except what only its method can check.

    Raises:
        ValueError: for an entry of another type; the message names it.
    """
    if not isinstance(content["weights"], str):
        raise ValueError(f"weights must be a string, got {type(content['weights']).__name__}")
    if not isinstance(content["settings"], dict) or not _is_plain(content["settings"]):
        raise ValueError("settings must be a dict of plain values")
    if not isinstance(content["snapshots"], list):
        raise ValueError(f"snapshots must be a list, got {type(content['snapshots']).__name__}")
    for state in (content, *content["snapshots"]):
        check_keys("stream's state", state, {"adaptation", "position", "site"})
        check_number("position", state["position"], least=0, whole=True)
        check_keys("adaptation", state["adaptation"], set())
        if not (state["site"] is None or isinstance(state["site"], (str, int))):
            raise ValueError(f"site must be a string or a whole number, got {type(state['site']).__name__}")


def _is_plain(value: Any, depth: int = DEPTH) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(k, str) and _is_plain(v, depth - 1) for k, v in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(v, depth - 1) for v in value)
    return isinstance(value, (bool, int, float, str))
