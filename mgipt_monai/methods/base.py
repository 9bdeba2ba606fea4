# SPDX-License-Identifier: Apache-2.0
"""The one interface of every test-time adaptation method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from monai.transforms import Randomizable
from torch import Tensor, nn

from mgipt_monai.networks.alignment.windows import ForwardRoute
from mgipt_monai.utils.state_checks import check_keys, check_number

__all__ = ["AdaptationMethod", "build_part", "check_image", "plain_settings"]


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


NOT_SETTINGS = {"network", "training", "images_seen", "last"}


def plain_settings(part: Any) -> dict[str, Any]:
    """Return the public plain attributes of a method and of its parts, those that are None left out.

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


def build_part(kind: type, given: nn.Module | None, shared: dict[str, Any], own: dict[str, Any]) -> nn.Module:
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


STATE_VERSION = 1


class AdaptationMethod(nn.Module, ABC):
    """A segmentation network with test-time adaptation, called like the network itself.

    A call adapts to each image of the batch in turn and returns its logits. It works inside ``torch.no_grad()``,
    ``torch.inference_mode()`` and autocast (it computes in float32), keeps the meta data of a ``MetaTensor``, and
    leaves the adaptation state as it was if anything fails.

    Args:
        network: the source network; it is frozen (no parameter requires a gradient) and put in evaluation mode.

    Raises:
        TypeError: for a TorchScript network, whose layers cannot be reached.

    Attributes:
        network: the frozen source network.
        images_seen: images adapted to since the start of the stream; it seeds what is random.
        last: for each image of the latest call, a dict of plain values: what was done and what it cost.
    """

    takes_windows = False
    """Whether the method can predict through a sliding-window inferer."""
    averaged: tuple[str, ...] = ()
    """Names of the tensors in the adaptation state whose mean over several streams is a state to go on with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.images_seen = 0
        self.last: list[dict[str, Any]] = []
        self.route = ForwardRoute()
        self.bind(network)

    def bind(self, network: nn.Module) -> None:
        """Work on ``network`` from now on, with the adaptation state kept (a server may copy or reload its network)."""
        if isinstance(network, torch.jit.ScriptModule):
            raise TypeError(
                "a TorchScript network cannot be adapted, its layers cannot be reached: load the Python network and "
                "its weights instead (in a bundle: network_def and models/model.pt)"
            )
        if isinstance(network, AdaptationMethod):
            raise TypeError(f"{type(network).__name__} already adapts: give {type(self).__name__} its plain network")
        self.network = network.eval().requires_grad_(False)
        self._bound()

    def predict_through(self, inferer: Inferer, windows: int = 2) -> None:
        """Run the network through an inferer from now on, for volumes that it does not take whole.

        Args:
            inferer: a MONAI ``SimpleInferer``, ``SlidingWindowInferer`` or ``SliceInferer``. Prompts are those of the
                whole image, so every window sees the same change.
            windows: in how many windows the image is looked at while it is adapted to (see
                :class:`mgipt_monai.networks.alignment.windows.Windows`); a step costs as many forwards and backwards.

        Raises:
            TypeError: for another inferer, or a method that needs the whole image.
        """
        if not self.takes_windows and not isinstance(inferer, SimpleInferer):
            raise TypeError(
                f"{type(self).__name__} adapts to whole images and cannot predict through a {type(inferer).__name__}: "
                "use MGIPT, VPTTA, BatchNormAdaptation or Source"
            )
        self.route.change(inferer, windows)

    def forward(self, image: Tensor) -> Tensor:
        """Adapt to each image, then predict it.

        Args:
            image: (B, C, \\*spatial), finite and not constant; a batch gives what its images one by one would.

        Returns:
            Logits (B, K, \\*spatial), detached, a MetaTensor if the input is one.

        Raises:
            ValueError: for an image that cannot be adapted to; the adaptation state is then unchanged.
        """
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image
        check_image(plain)
        self.last, records = [], []
        before = self.adaptation_state()
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device_type=plain.device.type, enabled=False),
            ):
                self.network.eval()
                outputs = []
                # a clone, since a tensor made under inference_mode cannot take part in a backward pass
                for one in plain.detach().clone().float().split(1):
                    logits, record = self._adapt_and_predict(one)
                    if not torch.isfinite(logits).all():
                        raise ValueError("the prediction is not finite: check the network's weights")
                    outputs.append(logits.detach())
                    records.append({"index": self.images_seen, **record})
                    self.images_seen += 1
        except BaseException:
            self.load_adaptation_state(before)
            raise
        self.last = records
        result = torch.cat(outputs)
        if isinstance(image, MetaTensor):
            result = MetaTensor(result).copy_meta_from(image, keys=image.__dict__.keys())
        return result

    def train(self, mode: bool = True) -> AdaptationMethod:
        """Set the flag that MONAI's engines set; the network stays in evaluation mode whatever it is."""
        super().train(mode)
        self.network.eval()
        return self

    def reset(self) -> None:
        """Forget the stream: the next image is the first one again."""
        self.images_seen = 0
        self.last = []
        self._reset()
        # the network may have got other weights since it was bound
        self._bound()

    def adaptation_state(self) -> dict[str, Any]:
        """Return what lasts from image to image: a dict of tensors (copies, on the CPU) and plain types, no network."""
        own = {"version": STATE_VERSION, "method": type(self).__name__, "images_seen": self.images_seen}
        return {**own, **self._state()}

    def load_adaptation_state(self, state: dict[str, Any]) -> None:
        """Take up a stream where it was left.

        Args:
            state: a result of :meth:`adaptation_state`, from this method with the same settings.

        Raises:
            ValueError: if the state does not fit, naming what differs; nothing is changed then.
        """
        check_keys("adaptation state", state, {"version", "method", "images_seen", *self._state()})
        for key, expected in (("version", STATE_VERSION), ("method", type(self).__name__)):
            if type(state[key]) is not type(expected) or state[key] != expected:
                raise ValueError(f"the adaptation state has {key} {state[key]!r}, this needs {expected!r}")
        check_number("images_seen", state["images_seen"], least=0, whole=True)
        self._load_state(state)
        self.images_seen = state["images_seen"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a checkpoint of the plain network loads into the method that stands in its place
        own = prefix + "network."
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
            state_dict[own + key[len(prefix) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def settings(self) -> dict[str, Any]:
        """Return the method's class and its settings as plain values."""
        return {"class": type(self).__name__, **plain_settings(self)}

    def prompt_maps(self) -> dict[str, Tensor]:
        """Return the prompts that last, as they stand: name to factors (C, \\*sides); most methods have none."""
        return {}

    def adapted_input(self, image: Tensor) -> Tensor:
        """Return the latest image (1, C, \\*spatial) as the network was shown it; most methods leave it as it is."""
        return image

    @abstractmethod
    def _adapt_and_predict(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Adapt to one image (1, C, \\*spatial); return its logits and the record of what was done."""

    def _bound(self) -> None:
        """Take up ``self.network``, which is new or may have new weights."""

    def _reset(self) -> None:
        """Forget what the method keeps between images."""

    def _state(self) -> dict[str, Any]:
        """Return what the method keeps between images."""
        return {}

    def _load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``_state`` returned; raise ValueError without changing anything if it does not fit."""
