# SPDX-License-Identifier: Apache-2.0
"""The common interface of all test-time adaptation methods."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn

from mgipt_monai.methods.parts import plain_settings
from mgipt_monai.networks.alignment import AlignedNorms, SourceStatistics
from mgipt_monai.networks.alignment.windows import ForwardRoute, Output, check_no_window, method_turn, network_turn
from mgipt_monai.utils.state_checks import check_image, check_keys, check_number, is_finite

if TYPE_CHECKING:
    from typing_extensions import Self

    from mgipt_monai.networks.alignment.windows import Precision

__all__ = ["AdaptationMethod", "Prediction", "check_image"]

STATE_VERSION = 1
RENAMED = {"SiteCalibration": "SiteCorrection"}
"""Names of methods in states of version 0.1 to their current names."""


class Prediction(NamedTuple):
    """What a method returns for one image.

    Attributes:
        logits: (1, K, \\*spatial).
        record: plain values: what was done, and what it cost (``forwards`` and ``backwards``).
        uncertainty: where the views of the image disagree, (1, 1, \\*spatial) in [0, 1]; None with a single view.
        unadapted: logits of the network alone, of the same shape, if the method computes them anyway.
    """

    logits: Tensor
    record: dict[str, Any]
    uncertainty: Tensor | None = None
    unadapted: Tensor | None = None


class AdaptationMethod(nn.Module, ABC):
    """A segmentation network with test-time adaptation, called like the network itself.

    A call adapts to each image of the batch in turn and returns its logits. It works inside ``torch.no_grad()``,
    ``torch.inference_mode()`` and autocast (it computes in float32), keeps the metadata of a ``MetaTensor``, and
    restores the adaptation state if anything fails. Calls from several threads run one after another, also those of
    different methods on the same network.

    A subclass implements :meth:`_adapt_and_predict` and, if it keeps something between images, ``_bound``, ``_reset``,
    ``_state`` and ``_load_state``.

    Args:
        network: the source network; it is frozen (no parameter requires a gradient) and set to evaluation mode.
        output: which of the network's outputs are its logits, if it returns several: key, index, or a function of the
            output.

    Raises:
        TypeError: for a TorchScript network, whose layers are not accessible, a network that already adapts, or an
            ``output`` of another type.

    Attributes:
        network: the frozen source network.
        images_seen: number of images adapted to since the start of the stream; it seeds random numbers.
        last: for each image of the latest call, a dict of plain values: what was done and what it cost.
        uncertainty: where the views of the latest call's images disagreed, (B, 1, \\*spatial) in [0, 1], see
            :func:`mgipt_monai.networks.disagreement`; None before the first call, after a failed one, after ``reset``,
            and for methods without ``has_uncertainty``. It is never saved.
        side_by_side: whether a call also predicts without adaptation, see :meth:`compare`.
        unadapted: the logits without adaptation of the latest call, (B, K, \\*spatial); None in the same cases as the
            uncertainty, and unless ``side_by_side``.
    """

    side_by_side: bool = False
    unadapted: Tensor | None = None

    aligned_layers: str | None = None
    """Regular expression on the names of the norm layers that the method uses; None: all."""
    statistics: SourceStatistics | None = None
    """Source statistics for a network that does not store them."""

    def __init__(self, network: nn.Module, output: Output | None = None) -> None:
        super().__init__()
        self.images_seen = 0
        self.last: list[dict[str, Any]] = []
        self.uncertainty: Tensor | None = None
        self.route = ForwardRoute(output=output)
        self._rollback: dict[str, Any] | None = None
        self.bind(network)

    @property
    def takes_windows(self) -> bool:
        """Whether the method can predict through a sliding-window inferer."""
        return False

    @property
    def has_uncertainty(self) -> bool:
        """Whether the method predicts several views of an image, which can disagree."""
        return False

    @property
    def outputs(self) -> Any:
        """All that the network returned in the latest prediction, views along axis 0; only with ``output``."""
        return self.route.latest

    @property
    def averaged(self) -> tuple[str, ...]:
        """Names of the tensors in the adaptation state that may be averaged over several streams."""
        return ()

    @property
    def name(self) -> str:
        """The method's name in its state and settings."""
        return type(self).__name__

    def bind(self, network: nn.Module) -> None:
        """Switch to ``network`` and keep the adaptation state (a server may copy or reload its network)."""
        if isinstance(network, torch.jit.ScriptModule):
            raise TypeError(
                "a TorchScript network cannot be adapted because its layers are not accessible: load the Python "
                "network and its weights instead (in a bundle: network_def and models/model.pt)"
            )
        if isinstance(network, AdaptationMethod):
            raise TypeError(f"{network.name} already adapts: pass its plain network to {self.name}")
        with network_turn(network):
            self.network = network.eval().requires_grad_(False)
            self._bound()

    def predict_through(self, inferer: Inferer, windows: int = 2) -> None:
        """Run the network through an inferer from now on, for volumes larger than the network's window.

        Args:
            inferer: a MONAI ``SimpleInferer``, ``SlidingWindowInferer`` or ``SliceInferer``. A prompt applies to the
                whole image, and each window gets its part of the prompted image.
            windows: maximum number of windows in which the alignment loss is measured (see
                :class:`mgipt_monai.networks.alignment.windows.Windows`); a step takes one forward and one backward per
                window.

        Raises:
            TypeError: for another inferer, or a method that needs whole images.
        """
        if not self.takes_windows and not isinstance(inferer, SimpleInferer):
            raise TypeError(
                f"{self.name} adapts to whole images and cannot predict through a {type(inferer).__name__}: "
                "use MGIPT, VPTTA, BatchNormAdaptation or Source"
            )
        self.route.change(inferer, windows)

    def compute_in(self, precision: Precision) -> None:
        """Run the network in ``float32`` or, by autocast, in ``bfloat16`` from now on.

        Statistics at the norm layers that take part, losses, prompts and logits stay in float32.
        """
        self.route.compute_in(precision)

    def compare(self, on: bool = True) -> None:
        """Also predict each image without adaptation from now on, into ``unadapted``.

        It costs 1 F per image, unless the method makes this prediction anyway (site correction, a guard). The record's
        ``forwards`` and a limit on them include it. Predictions and state stay bit-identical, except where a limit
        leaves less to the method.
        """
        self.side_by_side = on
        self.reserve(int(on))

    def forward(self, image: Tensor) -> Tensor:
        """Adapt to each image, then predict it.

        Args:
            image: (B, C, \\*spatial), finite and not constant; a batch gives the same results as its images one by one.

        Returns:
            Logits (B, K, \\*spatial), detached, a MetaTensor if the input is one.

        Raises:
            ValueError: for an image that cannot be adapted to; the adaptation state is then unchanged.
        """
        check_no_window(self)
        with method_turn(self):
            return self._adapt_to_each(image)

    def _adapt_to_each(self, image: Tensor) -> Tensor:
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image
        self.uncertainty = self.unadapted = None
        check_image(plain)
        self.last = []
        done: list[Prediction] = []
        records = []
        with (
            self.transaction(),
            network_turn(self.network),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device_type=plain.device.type, enabled=False),
        ):
            self.network.eval()
            # in windows the volume itself: it is large, and they are cut out of it
            is_whole, plain = isinstance(self.route.inferer, SimpleInferer), plain.detach()
            # a tensor created in inference_mode cannot be used in a backward pass
            for one in (plain.clone() if is_whole or plain.is_inference() else plain).float().split(1):
                prediction = self._adapt_and_predict(one)
                if not is_finite(prediction.logits):
                    raise ValueError("the prediction is not finite: check the network's weights")
                if self.side_by_side and prediction.unadapted is None:
                    unadapted, forwards = self._predict_unadapted(one)
                    record = {**prediction.record, "forwards": prediction.record["forwards"] + forwards}
                    prediction = prediction._replace(unadapted=unadapted, record=record)
                done.append(prediction)
                records.append({"index": self.images_seen, **prediction.record, **self._state_record()})
                self.images_seen += 1
        self.last = records
        maps = [prediction.uncertainty for prediction in done if prediction.uncertainty is not None]
        self.uncertainty = (torch.cat(maps) if len(maps) > 1 else maps[0]) if maps else None
        if self.side_by_side:
            self.unadapted = torch.cat([cast(Tensor, prediction.unadapted).detach() for prediction in done])
        # a single volume is not copied
        result = done[0].logits.detach() if len(done) == 1 else torch.cat([each.logits.detach() for each in done])
        if isinstance(image, MetaTensor):
            result = MetaTensor(result).copy_meta_from(image, keys=image.__dict__.keys())
        return result

    @contextmanager
    def transaction(self, start: dict[str, Any] | None = None) -> Iterator[None]:
        """Restore the adaptation state if the block raises, so that a failure leaves no trace.

        Transactions nest: the outermost one copies the state once, and a failure at any depth restores that copy. Other
        threads that use the method wait until the block ends.

        Args:
            start: the current :meth:`adaptation_state`, if the caller already has a copy; None makes one.

        Example:
            >>> from mgipt_monai import MGIPT
            >>> method = MGIPT(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), steps=1)
            >>> try:
            ...     with method.transaction():
            ...         _ = method(torch.rand(1, 1, 8, 8))
            ...         raise OSError("no space left for the mask")
            ... except OSError:
            ...     method.images_seen
            0
        """
        with method_turn(self):
            is_outermost = self._rollback is None
            if is_outermost:
                self._rollback = self.adaptation_state() if start is None else start
            try:
                yield
            except BaseException:
                if self._rollback is not None:
                    self.load_adaptation_state(self._rollback)
                raise
            finally:
                if is_outermost:
                    self._rollback = None

    def twin(self) -> Self:
        """Return a copy with its own state that shares the network."""
        twin = copy.deepcopy(self, {id(module): module for module in self.network.modules()})
        twin._rollback = None
        return twin

    def become(self, twin: Self) -> None:
        """Take over everything from a twin: state, records, prompts and uncertainty."""
        rollback = self._rollback
        self.__dict__ = twin.__dict__
        self._rollback = rollback

    def train(self, mode: bool = True) -> Self:
        """Set the flag that MONAI's engines set; the network stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def reset(self) -> None:
        """Forget the stream: the next image is the first of a new one."""
        self.images_seen = 0
        self.last = []
        self.uncertainty = self.unadapted = None
        self._reset()
        with network_turn(self.network):
            # the network's weights may have changed since it was bound
            self._bound()

    def adaptation_state(self) -> dict[str, Any]:
        """Return what is kept between images: a dict of tensors (copies, on the CPU) and plain types, no network."""
        own = {"version": STATE_VERSION, "method": self.name, "images_seen": self.images_seen}
        return {**own, **self._state()}

    def load_adaptation_state(self, state: dict[str, Any]) -> None:
        """Continue a stream from its state.

        Args:
            state: a result of :meth:`adaptation_state`, from this method with the same settings.

        Raises:
            ValueError: if the state does not fit; the message names the difference, and nothing is changed.
        """
        state = self._completed(state)
        check_keys("adaptation state", state, {"version", "method", "images_seen", *self._state()})
        method = state["method"]
        for key, found, expected in (
            ("version", state["version"], STATE_VERSION),
            ("method", RENAMED.get(method, method) if isinstance(method, str) else method, self.name),
        ):
            if type(found) is not type(expected) or found != expected:
                raise ValueError(f"the adaptation state has {key} {found!r}, this needs {expected!r}")
        check_number("images_seen", state["images_seen"], least=0, whole=True)
        self._load_state(state)
        self.images_seen = state["images_seen"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # lets a checkpoint of the plain network load into the method that wraps it
        own = f"{prefix}{self._network_key}."
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
            state_dict[own + key[len(prefix) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    _network_key = "network"
    """Prefix of the network's keys in the method's state dict."""

    def settings(self) -> dict[str, Any]:
        """Return the method's class and its settings as plain values."""
        precision = {} if self.route.precision == "float32" else {"precision": self.route.precision}
        return {"class": self.name, **plain_settings(self), **precision}

    def prompt_maps(self) -> dict[str, Tensor]:
        """Return the current prompts that are kept between images: name to factors (C, \\*sides); mostly none."""
        return {}

    def adapted_input(self, image: Tensor) -> Tensor:
        """Return the latest image (1, C, \\*spatial) as passed to the network; most methods do not change it."""
        return image

    def source_norms(self) -> AlignedNorms:
        """Return the norm layers that measure how far an image is from the source.

        Raises:
            ValueError: if the network stores no source statistics and the method has none.
        """
        return AlignedNorms(self.network, self.aligned_layers, statistics=self.statistics, route=self.route)

    def signals(self, record: dict[str, Any]) -> dict[str, float]:
        """Return the method's own signals for a guard about the latest image, see :class:`Guard`."""
        return {}

    def reserve(self, forwards: int) -> None:
        """Reserve additional forwards per image within the method's cost limit; most methods have no limit."""

    @abstractmethod
    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        """Adapt to one image (1, C, \\*spatial) and predict it."""

    def _predict_unadapted(self, image: Tensor) -> tuple[Tensor, int]:
        """Return the logits (1, K, \\*spatial) of the network alone, and the number of forwards."""
        forwards = 0

        def run(images: Tensor) -> Tensor:
            nonlocal forwards
            forwards += len(images)
            return self.route.run(self.network, images)

        with torch.no_grad():
            return self.route.inferer(image, run), forwards

    def _cost(self) -> dict[str, int]:
        """Return the ``forwards`` and ``backwards`` that the latest image has cost so far."""
        return {"forwards": 0, "backwards": 0}

    def _state_record(self) -> dict[str, Any]:
        """Return what a record says about the adaptation state after the image."""
        return {}

    def _bound(self) -> None:
        """Prepare for ``self.network``, which is new or may have new weights."""

    def _reset(self) -> None:
        """Forget what the method keeps between images."""

    def _state(self) -> dict[str, Any]:
        """Return what the method keeps between images."""
        return {}

    def _completed(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state with what those of earlier versions lack."""
        return state

    def _load_state(self, state: dict[str, Any]) -> None:
        """Restore what ``_state`` returned; raise ValueError, without changing anything, if it does not fit."""
