# SPDX-License-Identifier: Apache-2.0
"""The state file of a stream: adaptation state, position, weights and settings it belongs to, and snapshots."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.networks.alignment.windows import network_turn
from mgipt_monai.utils.files import load_state, save_state
from mgipt_monai.utils.provenance import fingerprint
from mgipt_monai.utils.state_checks import check_keys, check_number

__all__ = ["StreamFile", "check_content"]

SCHEMA, VERSION = "mgipt_monai.stream", 1
KEYS = {"schema", "version", "weights", "settings", "adaptation", "position", "site", "snapshots"}
OPTIONAL = {"pipeline", "postponed", "records"}


class StreamFile:
    """A stream's state on disk: tensors and plain types, written atomically, used by one process at a time.

    It holds the adaptation state, the number of images done, the latest site's name, the fingerprint of the source
    weights, the method's settings, and the latest snapshots. Its size does not depend on the number of images seen.
    Optional are ``pipeline`` (the settings of transforms, readers and the inferer), ``postponed`` (failed images that
    are taken again at the end: the position from which they are, and their places in the list of images) and
    ``records`` (how far the record file of a :class:`mgipt_monai.PersistentInferer` goes).

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
        self._kept, self._weights = [], _fingerprint(method)

    def load(self, method: AdaptationMethod, pipeline: dict[str, Any] | None = None) -> dict[str, Any]:
        """Load the stream's state into a method, and return the file's content.

        Args:
            method: the method that continues the stream.
            pipeline: settings that must be those that the state was saved with; None checks none.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if it is not a stream's state, or was made with other weights, another method or other settings;
                the message names the difference, and the method is unchanged.
        """
        self._weights = _fingerprint(method)
        content = read(self.path)
        if content["weights"] != self._weights:
            raise ValueError(
                f"{self.path} belongs to a network with other weights: start a new stream, or load the weights it was "
                f"made with (SHA-256 {content['weights'][:12]}..., this network has {self._weights[:12]}...)"
            )
        differing = differences(content["settings"], method.settings())
        if pipeline is not None and "pipeline" in content:
            differing += differences(
                _comparable(content["pipeline"], pipeline), _comparable(pipeline, content["pipeline"])
            )
        if differing:
            more = f"; and {len(differing) - MOST_NAMED} more" if len(differing) > MOST_NAMED else ""
            raise ValueError(
                f"{self.path} was made with other settings: {'; '.join(differing[:MOST_NAMED])}{more}; "
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
            state: ``adaptation`` (its state), ``position`` (number of images done) and ``site`` (of the latest image),
                and what is optional.
        """
        own = {"schema": SCHEMA, "version": VERSION, "settings": method.settings()}
        own["weights"] = self._weights = self._weights or _fingerprint(method)
        save_state({**own, **state, "snapshots": self._kept}, self.path)

    def snapshot(self, state: dict[str, Any], always: bool = False) -> None:
        """Keep a state (see :meth:`save`) as a snapshot, every ``snapshot_every`` images or ``always``."""
        passed = state["position"] - (self._kept[-1]["position"] if self._kept else 0)
        if self.snapshots and passed >= (1 if always else self.snapshot_every):
            kept = {key: state[key] for key in ("adaptation", "position", "site")}
            self._kept = [*self._kept, kept][-self.snapshots :]

    def renumber(self, position: Callable[[int], int]) -> None:
        """Give the snapshots other positions, in the same order."""
        states = {position(state["position"]): state for state in self._kept}
        self._kept = [{**state, "position": there} for there, state in states.items()]

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
    if not isinstance(content.get("schema"), str) or content["schema"] != SCHEMA or set(content) - OPTIONAL != KEYS:
        raise ValueError(f"{path} is not a stream's state: remove it to start a new stream")
    if not isinstance(content["version"], int) or content["version"] != VERSION:
        raise ValueError(f"{path} is of version {content['version']}, this mgipt_monai reads version {VERSION}")
    try:
        check_content(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a stream's state ({error}): remove it to start a new stream") from error
    return content


OWN_READERS = ".readers.own."
"""Part of the names of the settings of MONAI's own readers. One that comes with a package reads only what the readers
could not read without it, so that a stream goes on when the package is installed or removed."""


def _comparable(pipeline: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline's settings without those of MONAI's own readers that another pipeline lacks."""
    return {key: value for key, value in pipeline.items() if OWN_READERS not in key or key in other}


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


DEPTH, VALUES = 8, 10_000
"""Maximum nesting depth of settings, and number of values; those of the methods have three levels."""
MOST_NAMED = 6


def check_content(content: dict[str, Any]) -> None:
    """Check the types of everything in a stream file, except what only its method can check.

    Raises:
        ValueError: for an entry of another type; the message names it.
    """
    if not isinstance(content["weights"], str):
        raise ValueError(f"weights must be a string, got {type(content['weights']).__name__}")
    for key in ("settings", "pipeline"):
        if not isinstance(content.get(key, {}), dict) or not _is_plain(content.get(key, {})):
            raise ValueError(f"{key} must be a dict of plain values")
    if "postponed" in content:
        check_keys("postponed", content["postponed"], {"base", "images"})
        images = content["postponed"]["images"]
        if not isinstance(images, list):
            raise ValueError("postponed images must be a list")
        for number in (content["postponed"]["base"], *images):
            check_number("postponed", number, least=0, whole=True)
        if len(set(images)) < len(images):
            raise ValueError("postponed images are listed twice")
    if "records" in content:
        check_keys("records", content["records"], {"file", "size", "sum"})
        for key in ("size", "sum"):
            check_number(f"records' {key}", content["records"][key], least=0, whole=True)
    if not isinstance(content["snapshots"], list):
        raise ValueError(f"snapshots must be a list, got {type(content['snapshots']).__name__}")
    for state in (content, *content["snapshots"]):
        check_keys("stream's state", state, {"adaptation", "position", "site"})
        check_number("position", state["position"], least=0, whole=True)
        check_keys("adaptation", state["adaptation"], set())
        if not (state["site"] is None or isinstance(state["site"], (str, int))):
            raise ValueError(f"site must be a string or a whole number, got {type(state['site']).__name__}")


def _is_plain(value: Any) -> bool:
    """Whether nested dicts and lists hold only plain values, and not too many of them."""
    left, count = [(value, DEPTH)], 0
    while left:
        one, depth = left.pop()
        count += 1
        if not isinstance(one, (dict, list)):
            if not isinstance(one, (bool, int, float, str)):
                return False
            continue
        if depth == 0 or count + len(left) + len(one) > VALUES:
            return False
        if isinstance(one, dict) and not all(isinstance(key, str) for key in one):
            return False
        left += [(each, depth - 1) for each in (one.values() if isinstance(one, dict) else one)]
    return count <= VALUES


def _fingerprint(method: AdaptationMethod) -> str:
    with network_turn(method.network):
        return fingerprint(method.network)
