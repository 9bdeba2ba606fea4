# SPDX-License-Identifier: Apache-2.0
"""The one interface of every test-time adaptation method."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from monai.transforms import Randomizable
from torch import Tensor, nn

from mgipt_monai.networks.alignment import AlignedNorms, SourceStatistics
from mgipt_monai.networks.alignment.windows import ForwardRoute
from mgipt_monai.utils.state_checks import check_keys, check_number

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AdaptationMethod", "Prediction", "build_part", "check_image", "plain_settings"]

STATE_VERSION = 1
RENAMED = {"SiteCalibration": "SiteCorrection"}
"""Names of methods in the states of version 0.1 to those of today."""
NOT_SETTINGS = {"network", "training", "images_seen", "last", "uncertainty"}

Part = TypeVar("Part")


class Prediction(NamedTuple):
    """What a method makes of one image.

    Attributes:
        logits: (1, K, \\*spatial).
        record: plain values: what was done, and what it cost (``forwards`` and ``backwards``).
        uncertainty: where the views of the image disagree, (1, 1, \\*spatial) in [0, 1]; None for one view.
    """

    logits: Tensor
    record: dict[str, Any]
    uncertainty: Tensor | None = None


class AdaptationMethod(nn.Module, ABC):
    """A segmentation network with test-time adaptation, called like the network itself.

    A call adapts to each image of the batch in turn and returns its logits. It works inside ``torch.no_grad()``,
    ``torch.inference_mode()`` and autocast (it computes in float32), keeps the meta data of a ``MetaTensor``, and
    leaves the adaptation state as it was if anything fails.

    A method gives :meth:`_adapt_and_predict`, and ``_bound``, ``_reset``, ``_state`` and ``_load_state`` where it keeps
    something between images.

    Args:
        network: the source network; it is frozen (no parameter requires a gradient) and put in evaluation mode.

    Raises:
        TypeError: for a TorchScript network, whose layers cannot be reached.

    Attributes:
        network: the frozen source network.
        images_seen: number of images adapted to since the start of the stream; it seeds what is random.
        last: for each image of the latest call, a dict of plain values: what was done and what it cost.
        uncertainty: where the views of the latest call's images disagreed, (B, 1, \\*spatial) in [0, 1], see
            :func:`mgipt_monai.networks.disagreement`; None before the first call, after one that failed, after
            ``reset``, and for methods without ``has_uncertainty``. It is never saved.
    """

    aligned_layers: str | None = None
    """Regular expression on the names of the norm layers that the method works with; None: all."""
    statistics: SourceStatistics | None = None
    """What the source looks like inside the network, where the network does not store it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.images_seen = 0
        self.last: list[dict[str, Any]] = []
        self.uncertainty: Tensor | None = None
        self.route = ForwardRoute()
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
    def averaged(self) -> tuple[str, ...]:
        """Names of the tensors in the adaptation state whose mean over several streams is a state to continue with."""
        return ()

    @property
    def name(self) -> str:
        """The method's name in its state and settings."""
        return type(self).__name__

    def bind(self, network: nn.Module) -> None:
        """Work on ``network`` from now on, with the adaptation state kept (a server may copy or reload its network)."""
        if isinstance(network, torch.jit.ScriptModule):
            raise TypeError(
                "a TorchScript network cannot be adapted, its layers cannot be reached: load the Python network and "
                "its weights instead (in a bundle: network_def and models/model.pt)"
            )
        if isinstance(network, AdaptationMethod):
            raise TypeError(f"{network.name} already adapts: give {self.name} its plain network")
        self.network = network.eval().requires_grad_(False)
        self._bound()

    def predict_through(self, inferer: Inferer, windows: int = 2) -> None:
        """Run the network through an inferer from now on, for volumes that it does not take whole.

        Args:
            inferer: a MONAI ``SimpleInferer``, ``SlidingWindowInferer`` or ``SliceInferer``. Prompts are those of the
                whole image, so every window sees the same change.
            windows: number of windows in which the alignment loss is measured (see
                :class:`mgipt_monai.networks.alignment.windows.Windows`); a step costs as many forwards and backwards.

        Raises:
            TypeError: for another inferer, or a method that needs the whole image.
        """
        if not self.takes_windows and not isinstance(inferer, SimpleInferer):
            raise TypeError(
                f"{self.name} adapts to whole images and cannot predict through a {type(inferer).__name__}: "
                "use MGIPT, VPTTA, BatchNormAdaptation or Source"
            )
        self.route.change(inferer, windows)

    def forward(self, image: Tensor) -> Tensor:
        """Adapt to each image, then predict it.

        Args:
            image: (B, C, \\*spatial), finite and not constant; a batch gives the same results as its images one by one.

        Returns:
            Logits (B, K, \\*spatial), detached, a MetaTensor if the input is one.

        Raises:
            ValueError: for an image that cannot be adapted to; the adaptation state is then unchanged.
        """
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image
        self.uncertainty = None
        check_image(plain)
        self.last = []
        done: list[Prediction] = []
        records = []
        with (
            self.transaction(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device_type=plain.device.type, enabled=False),
        ):
            self.network.eval()
            # a clone, since a tensor made under inference_mode cannot take part in a backward pass
            for one in plain.detach().clone().float().split(1):
                prediction = self._adapt_and_predict(one)
                if not torch.isfinite(prediction.logits).all():
                    raise ValueError("the prediction is not finite: check the network's weights")
                done.append(prediction)
                records.append({"index": self.images_seen, **prediction.record, **self._standing()})
                self.images_seen += 1
        self.last = records
        maps = [prediction.uncertainty for prediction in done if prediction.uncertainty is not None]
        self.uncertainty = torch.cat(maps) if maps else None
        result = torch.cat([prediction.logits.detach() for prediction in done])
        if isinstance(image, MetaTensor):
            result = MetaTensor(result).copy_meta_from(image, keys=image.__dict__.keys())
        return result

    @contextmanager
    def transaction(self, start: dict[str, Any] | None = None) -> Iterator[None]:
        """Restore the adaptation state if the block raises, so that a failure leaves no trace.

        Transactions nest: the state is copied once, by the outermost one, and a failure at any depth restores the state
        at its start.

        Args:
            start: the present :meth:`adaptation_state`, where the caller has a copy already; None makes one.

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
        """Return a copy with a state of its own around the same network."""
        twin = copy.deepcopy(self, {id(module): module for module in self.network.modules()})
        twin._rollback = None
        return twin

    def become(self, twin: Self) -> None:
        """Take over all that a twin has of its latest image: state, records, prompts and uncertainty."""
        rollback = self._rollback
        self.__dict__ = twin.__dict__
        self._rollback = rollback

    def train(self, mode: bool = True) -> Self:
        """Set the flag that MONAI's engines set; the network stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def reset(self) -> None:
        """Forget the stream: the next image is the first one again."""
        self.images_seen = 0
        self.last = []
        self.uncertainty = None
        self._reset()
        # the network may have got other weights since it was bound
        self._bound()

    def adaptation_state(self) -> dict[str, Any]:
        """Return what lasts from image to image: a dict of tensors (copies, on the CPU) and plain types, no network."""
        own = {"version": STATE_VERSION, "method": self.name, "images_seen": self.images_seen}
        return {**own, **self._state()}

    def load_adaptation_state(self, state: dict[str, Any]) -> None:
        """Continue a stream from its state.

        Args:
            state: a result of :meth:`adaptation_state`, from this method with the same settings.

        Raises:
            ValueError: if the state does not fit, naming what differs; nothing is changed then.
        """
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
        # a checkpoint of the plain network loads into the method that stands in its place
        own = f"{prefix}{self._network_key}."
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
            state_dict[own + key[len(prefix) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    _network_key = "network"
    """Where the network's keys are in the method's state dict."""

    def settings(self) -> dict[str, Any]:
        """Return the method's class and its settings as plain values."""
        return {"class": self.name, **plain_settings(self)}

    def prompt_maps(self) -> dict[str, Tensor]:
        """Return the prompts that last, as they are now: name to factors (C, \\*sides); most methods have none."""
        return {}

    def adapted_input(self, image: Tensor) -> Tensor:
        """Return the latest image (1, C, \\*spatial) as the network saw it; most methods leave it as it is."""
        return image

    def source_norms(self) -> AlignedNorms:
        """Return the norm layers that tell how far an image is from the source.

        Raises:
            ValueError: if the network stores no source statistics and the method was given none.
        """
        return AlignedNorms(self.network, self.aligned_layers, statistics=self.statistics, route=self.route)

    def signals(self, record: dict[str, Any]) -> dict[str, float]:
        """Return what this method alone can tell a guard about the latest image, see :class:`Guard`."""
        return {}

    def reserve(self, forwards: int) -> None:
        """Leave room for additional forwards per image in the method's own limit of cost; most have no limit."""

    @abstractmethod
    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        """Adapt to one image (1, C, \\*spatial) and predict it."""

    def _cost(self) -> dict[str, int]:
        """Return the ``forwards`` and ``backwards`` that the latest image has cost so far."""
        return {"forwards": 0, "backwards": 0}

    def _standing(self) -> dict[str, Any]:
        """Return what a record says of the adaptation state after the image."""
        return {}

    def _bound(self) -> None:
        """Prepare for ``self.network``, which is new or may have new weights."""

    def _reset(self) -> None:
        """Forget what the method keeps between images."""

    def _state(self) -> dict[str, Any]:
        """Return what the method keeps between images."""
        return {}

    def _load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``_state`` returned; raise ValueError without changing anything if it does not fit."""


def check_image(image: Tensor) -> None:
    """Check a batch of images (B, C, \\*spatial) before anything is adapted to it.

    Raises:
        ValueError: if it has no spatial axis, holds NaN or infinite values, or an image of it is constant.
    """
    if image.ndim < 3:
        raise ValueError(f"expected a batch of images (B, C, *spatial), got shape {tuple(image.shape)}")
    if not torch.isfinite(image).all():
        bad = int((~torch.isfinite(image)).sum())
        raise ValueError(f"the image has {bad} NaN or infinite values: repair or leave out the file")
    values = image.flatten(1)
    if (values.amax(dim=1) == values.amin(dim=1)).any():
        raise ValueError("the image is constant, there is nothing to adapt to: leave out the file")


def plain_settings(part: Any) -> dict[str, Any]:
    """Return the public plain attributes of a method and of its parts, without those that are None.

    Args:
        part: an adaptation method that has seen no image, or a part of one.

    Example:
        >>> from mgipt_monai.networks import PhotometricJitter
        >>> plain_settings(PhotometricJitter())
        {'brightness': 0.2, 'contrast': 0.2}
    """
    settings: dict[str, Any] = {}
    for key, value in {**vars(part), **getattr(part, "_modules", {})}.items():
        if key.startswith("_") or key in NOT_SETTINGS:
            continue
        if isinstance(value, (nn.Module, Randomizable)):
            settings[key] = plain_settings(value)
        elif isinstance(value, (bool, int, float, str)):
            settings[key] = value
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, float, str)) for v in value):
            settings[key] = list(value)
    return settings


def build_part(kind: type[Part], given: Part | None, shared: dict[str, Any], own: dict[str, Any]) -> Part:
    """Build a part of a method from the settings that are not None, unless one is given.

    Raises:
        ValueError: for settings beside a given part.
    """
    settings = {name: value for name, value in {**shared, **own}.items() if value is not None}
    if given is None:
        return kind(**settings)
    if settings:
        raise ValueError(f"set {', '.join(settings)} on the {kind.__name__} that is given, not beside it")
    return given
