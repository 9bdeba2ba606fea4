# SPDX-License-Identifier: Apache-2.0
"""MONAI inferers that adapt, for evaluators, MONAI Label and MONAI Deploy."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer, SliceInferer, SlidingWindowInferer
from monai.utils import fall_back_tuple
from torch import Tensor, nn

from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.networks.alignment.windows import Precision, method_turn, network_turn
from mgipt_monai.stream.pseudonyms import Pseudonyms
from mgipt_monai.stream.records import Identifiers, RecordFile, check_identifiers, json_types
from mgipt_monai.stream.state_file import StreamFile, read
from mgipt_monai.utils.files import file_names

__all__ = ["AdaptiveInferer", "PersistentInferer"]

Slices = Literal["shared", "own"]


class AdaptiveInferer(Inferer):
    """Adapts to each image, predicts it, and updates the adaptation state.

    Args:
        method: the adaptation method, for instance :class:`mgipt_monai.MGIPT`.
        inferer: how the method runs the network: None for whole images, or a pipeline's ``SlidingWindowInferer`` or
            ``SliceInferer``. Each window gets its part of the prompted whole image.
        windows: maximum number of windows per image in which the alignment loss is measured.
        slices: for a ``SliceInferer`` (a 2D network on volumes). ``shared`` treats a volume as one image with one
            prompt for all slices: one scanner made them, and neighbouring slices stay consistent. ``own`` treats each
            slice as an image with its own prompt, at the cost of one adaptation per slice; constant slices are
            predicted without adaptation. Slices are cut or padded to the inferer's windows in either case.
        side_by_side: whether the method also predicts without adaptation, see :meth:`AdaptationMethod.compare`.
        precision: ``bfloat16`` runs the network by autocast, see :meth:`AdaptationMethod.compute_in`; None leaves the
            method as it is.

    Raises:
        TypeError: if ``method`` is not an adaptation method, or cannot predict through ``inferer``.
        ValueError: if ``windows`` is below 1, or ``slices`` is unknown or does not fit ``inferer``.

    Example:
        >>> import torch
        >>> from mgipt_monai import MGIPT
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> inferer = AdaptiveInferer(MGIPT(network, steps=1))
        >>> with torch.no_grad():  # as MONAI's engines call it
        ...     inferer(inputs=torch.rand(1, 3, 32, 32), network=network).shape
        torch.Size([1, 2, 30, 30])
    """

    def __init__(
        self,
        method: AdaptationMethod,
        inferer: Inferer | None = None,
        windows: int = 2,
        slices: Slices = "shared",
        side_by_side: bool = False,
        precision: Precision | None = None,
    ) -> None:
        if not isinstance(method, AdaptationMethod):
            raise TypeError(f"method must be an adaptation method such as MGIPT(network), got {type(method).__name__}")
        self.method = method
        self.inferer = SimpleInferer() if inferer is None else inferer
        self.windows = windows
        self.slices = slices
        if slices not in get_args(Slices):
            raise ValueError(f"slices must be one of {', '.join(get_args(Slices))}; got {slices!r}")
        if slices == "own" and not isinstance(self.inferer, SliceInferer):
            raise ValueError(f"slices='own' needs a SliceInferer, got {type(self.inferer).__name__}")
        method.predict_through(*self._route())
        if precision is not None:
            method.compute_in(precision)
        self.precision = precision
        self.side_by_side = side_by_side
        if side_by_side:
            method.compare()

    def __call__(  # type: ignore[override] # only a network can be adapted, not any callable
        self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Adapt and predict.

        Args:
            inputs: images (B, C, \\*spatial); metadata is kept.
            network: the source network. If it is not the method's own (a server's copy, a reloaded network), the method
                switches to it and keeps the adaptation state.
            args: not supported.
            kwargs: not supported.

        Returns:
            Logits (B, K, \\*spatial).

        Raises:
            RuntimeError: if ``network`` itself adapts with another method: each image would be adapted to twice.
            TypeError: for additional arguments.
        """
        if args or kwargs:
            raise TypeError(f"AdaptiveInferer passes only images to the network, got also {[*args, *kwargs]}")
        with method_turn(self.method):
            self.bind(network)
            self.method.predict_through(*self._route(inputs))
            return self._slice_by_slice(inputs) if self.slices == "own" else self.method(inputs)

    def with_method(self, method: AdaptationMethod) -> AdaptiveInferer:
        """Return an inferer with the same settings for another method, such as a twin of this one's."""
        return AdaptiveInferer(method, self.inferer, self.windows, self.slices, self.side_by_side, self.precision)

    def bind(self, network: nn.Module) -> None:
        """Switch the method to this network, if it is a different one.

        Raises:
            RuntimeError: if ``network`` is an adaptation method other than this inferer's.
        """
        if isinstance(network, AdaptationMethod):
            if network is not self.method:
                raise RuntimeError(
                    f"the network is already a {network.name} method: with this {self.method.name} inferer "
                    "each image would be adapted to twice; remove one of them"
                )
        elif network is not self.method.network:
            self.method.bind(network)

    def _route(self, volumes: Tensor | None = None) -> tuple[Inferer, int]:
        if self.slices == "shared":
            return self.inferer, self.windows
        assert isinstance(self.inferer, SliceInferer)  # checked at construction
        cut = self.inferer
        if volumes is not None:
            sides = [n for axis, n in enumerate(volumes.shape[2:]) if axis != cut.spatial_dim]
            window = fall_back_tuple(cut.orig_roi_size, sides)
            if list(window) != sides:  # a slice has windows itself, or is padded to one
                how = (cut.overlap, cut.mode, cut.sigma_scale, cut.padding_mode, cut.cval, cut.sw_device, cut.device)
                return SlidingWindowInferer(window, cut.sw_batch_size, *how), self.windows
        return SimpleInferer(), self.windows

    def _slice_by_slice(self, volumes: Tensor) -> Tensor:
        assert isinstance(self.inferer, SliceInferer)  # checked at construction
        axis = self.inferer.spatial_dim + 2
        outputs, unadapted, records = [], [], []
        with self.method.transaction():
            for volume in volumes.split(1):
                logits, alone, done = zip(*(self._one_slice(one) for one in volume.unbind(axis)), strict=True)
                outputs.append(torch.stack(logits, axis))
                if self.side_by_side:
                    unadapted.append(torch.stack(alone, axis))
                costs = {key: sum(each[key] for each in done) for key in ("forwards", "backwards")}
                adapted = [each["index"] for each in done if "index" in each]
                records.append({"index": min(adapted, default=None), "adapted_slices": len(adapted), **costs})
        self.method.last = records
        self.method.unadapted = torch.cat(unadapted) if unadapted else None
        return torch.cat(outputs)

    def _one_slice(self, image: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Return the logits of a slice, those without adaptation if they are asked for, and its record."""
        if image.min() == image.max():
            with network_turn(self.method.network):
                logits, forwards = self.method._predict_unadapted(image)
            return logits, logits, {"forwards": forwards, "backwards": 0}
        return self.method(image), self.method.unadapted, self.method.last[0]


# per process: a server may create new inferers for each request, and the lock must outlive them
_streams: dict[tuple[int, Path], tuple[threading.Lock, StreamFile]] = {}
_opening = threading.Lock()


class PersistentInferer(AdaptiveInferer):
    """Adapts to the images of one stream across calls, inferers, networks and processes.

    The state file is authoritative: each call loads the stream from it, adapts, predicts, and writes it back. A failed
    call leaves the file unchanged, and the record of a call that did not come to save its state is removed by the next
    one. Calls from several threads run one after another. Another process is refused from this process's first call
    until this process ends.

    The records of a call's images are in ``last`` and, if the images are a ``MetaTensor``, in the prediction's metadata
    under ``adaptation`` (see :class:`mgipt_monai.data.AdaptationResultd`), one dict of JSON types per image: what the
    method did, ``name``, ``position`` (number of images learnt from, including this one), ``seconds``, ``adapt``,
    ``reset``.

    Args:
        method: the adaptation method. Its state in memory is replaced by the file's, or reset if there is no file.
        state_path: the stream's state file, see :class:`mgipt_monai.StreamFile`; created with the first image.
        record_path: JSON Lines file that gets one line per image learnt from; None writes none.
        adapt: False predicts as for the next image of the stream, with its own prompt and everything learnt so far, but
            keeps nothing: the file stays unchanged and no record is written.
        reset: forget the stream before the image; needed to continue with other weights or settings. With
            ``adapt=False`` the image is predicted as the first one of a new stream, and the file stays unchanged.
        inferer: see :class:`AdaptiveInferer`.
        windows: see :class:`AdaptiveInferer`.
        slices: see :class:`AdaptiveInferer`.
        identifiers: ``hashed`` writes 16 hexadecimal digits in place of an image's name, in the records and in the
            prediction's metadata. The key is beside the records, or else beside the state (see
            :class:`mgipt_monai.stream.records.AuditTrail`).
        precision: see :class:`AdaptiveInferer`.

    Raises:
        TypeError: as :class:`AdaptiveInferer`; if ``adapt`` or ``reset`` is not a bool (such as the string "false").
        ValueError: as :class:`AdaptiveInferer`; if ``identifiers`` are unknown.

    Example:
        >>> import tempfile, torch
        >>> from mgipt_monai import MGIPT
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> path = os.path.join(tempfile.mkdtemp(), "stream.pt")
        >>> for _ in range(2):  # like a server that recreates everything for each request
        ...     inferer = PersistentInferer(MGIPT(network, steps=1), path)
        ...     logits = inferer(torch.rand(1, 3, 32, 32), network)
        >>> inferer.last[0]["position"]
        2
    """

    def __init__(
        self,
        method: AdaptationMethod,
        state_path: str | os.PathLike,
        record_path: str | os.PathLike | None = None,
        adapt: bool = True,
        reset: bool = False,
        inferer: Inferer | None = None,
        windows: int = 2,
        slices: Slices = "shared",
        identifiers: Identifiers = "names",
        precision: Precision | None = None,
    ) -> None:
        super().__init__(method, inferer, windows, slices, precision=precision)
        self.identifiers = check_identifiers(identifiers)
        for name, value in (("adapt", adapt), ("reset", reset)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be true or false, without quotation marks; got {value!r}")
        self.state_path = Path(state_path)
        self.records = None if record_path is None else RecordFile(record_path)
        self._pseudonyms = Pseudonyms(Path(state_path if record_path is None else record_path).with_suffix(".key"))
        self.adapt, self.reset = adapt, reset
        self.last: list[dict[str, Any]] = []

    def __call__(  # type: ignore[override] # only a network can be adapted, not any callable
        self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Load the stream, adapt and predict as :class:`AdaptiveInferer`, and save.

        Raises:
            RuntimeError: if another process adapts with the state file.
            ValueError: for an image that cannot be adapted to, or a state file made with other weights or settings.
        """
        # one after another: calls of this stream, of this method, and of all methods on this network
        with _one_at_a_time(self.state_path) as stream, method_turn(self.method), network_turn(_plain(network)):
            self.last = []
            since = time.perf_counter()
            self.bind(network)
            content = self._restore(stream)
            start = self.method.adaptation_state()
            with self.method.transaction(start):
                logits = super().__call__(inputs, network, *args, **kwargs)
                names, seconds = [Path(name).name for name in file_names(inputs)], time.perf_counter() - since
                rows = self._rows(names, content["position"], seconds)
                if self.adapt:
                    self._keep(stream, rows, content, start)
            if not self.adapt:
                self.method.load_adaptation_state(start)
            self.last = rows
        if isinstance(logits, MetaTensor):
            logits.meta["adaptation"] = rows
        return logits

    def _restore(self, stream: StreamFile) -> dict[str, Any]:
        """Restore the method's state from the stream; return what the stream's file says, a new one's position is 0."""
        if stream.exists() and not self.reset:
            return stream.load(self.method)
        # the records of earlier streams stay, up to where the file that a reset replaces knows them
        known: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # there may be none, or a damaged one
            known = read(stream.path)
        self.method.reset()
        stream.start(self.method)
        return {"position": 0, **{key: known[key] for key in ("records",) if key in known}}

    def _rows(self, names: list[str], position: int, seconds: float) -> list[dict[str, Any]]:
        done = self.method.last
        names = names if len(names) == len(done) else [""] * len(done)
        if self.identifiers == "hashed":
            names = [self._pseudonyms.of(name) for name in names]
        asked = {"adapt": self.adapt, "reset": self.reset, "seconds": seconds / len(done)}
        return [
            json_types({"name": name, "status": "ok", "position": position + i * self.adapt, **asked, **each})
            for i, (name, each) in enumerate(zip(names, done, strict=True), start=1)
        ]

    def _keep(self, stream: StreamFile, rows: list[dict[str, Any]], content: dict[str, Any], start: Any) -> None:
        state = {"adaptation": self.method.adaptation_state(), "position": rows[-1]["position"], "site": None}
        if self.records is not None:
            # a call that ended between its record and its state has left a record of an image that was not learnt from
            self.records.cut(content.get("records", {}))
            if not stream.exists():
                state_before = {"adaptation": start, "position": 0, "site": None, "records": self.records.mark()}
                stream.save(self.method, state_before)
            for row in rows:
                self.records.append(row)
            state["records"] = self.records.mark()
        stream.snapshot(state)
        stream.save(self.method, state)


def _plain(network: nn.Module) -> nn.Module:
    return network.network if isinstance(network, AdaptationMethod) else network


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[StreamFile]:
    """Lock the stream at ``path`` for one thread at a time, and against other processes until this one ends."""
    # a forked child inherits the entries, but not the lock on the file
    key = os.getpid(), path.resolve()
    with _opening:
        if key not in _streams:
            stream = StreamFile(key[1])
            stream.acquire()
            _streams[key] = threading.Lock(), stream
        lock, stream = _streams[key]
    with lock:
        yield stream
