# SPDX-License-Identifier: Apache-2.0
"""A method with a correction that was fitted to a site's labelled images, see :func:`mgipt_monai.commission`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mgipt_monai.methods.base import AdaptationMethod, Prediction
from mgipt_monai.methods.drift_monitor import DriftMonitor
from mgipt_monai.methods.wrapped import WrappedMethod
from mgipt_monai.networks.alignment.windows import network_turn
from mgipt_monai.networks.correction import Correction
from mgipt_monai.networks.prompts.early_stop import Head, binarize, check_head
from mgipt_monai.utils.files import load_state, save_state
from mgipt_monai.utils.provenance import fingerprint
from mgipt_monai.utils.state_checks import check_keys, check_number

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Commissioned", "SiteSetting"]

VERSION = 1


@dataclass(frozen=True)
class SiteSetting:
    """What commissioning found for a site: a few hundred numbers for one network, and no image.

    Attributes:
        fingerprint: of the network's weights, see :func:`mgipt_monai.utils.provenance.fingerprint`.
        method: settings of the method that is corrected, as its ``settings()`` returns them.
        correction: the correction.
        start: what the method has learnt from the labelled images; every stream starts with it.
        reference: signal to its values on the labelled images, which later images are compared with.
    """

    fingerprint: str
    method: Mapping[str, Any]
    correction: Correction
    start: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, list[float]] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file ``site.pt``; a crash leaves the old file or the new one."""
        content = {**vars(self), "version": VERSION, "correction": self.correction.state()}
        save_state(content, path, sealed=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SiteSetting:
        """Read a file written by :meth:`save`, without executing any code in it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or of another kind.
        """
        content = load_state(path, "site's setting")
        try:
            check_keys("site's setting", content, {"version", "fingerprint", "method", "correction", "start"})
            check_number("version", content["version"], VERSION, VERSION, whole=True)
            if not isinstance(content["fingerprint"], str):
                raise ValueError("the fingerprint must be a text")
            for key in ("method", "start", "reference"):
                check_keys(key, content[key], set())
            correction = Correction.from_state(content["correction"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is not a site's setting ({error}): write it again with mgipt commission"
            ) from error
        kept = {key: content[key] for key in ("fingerprint", "method", "start", "reference")}
        return cls(**kept, correction=correction)


class Commissioned(WrappedMethod):
    """A method whose network, input or output is corrected as commissioning on labelled images of the site found best.

    The correction's prompts apply to the image before the method sees it, its norm shifts to a copy of the network
    that shares all parameters, and its offset and temperature to the method's logits. The network itself never
    changes. A stream starts from what the method had learnt while the site was commissioned. The cost is the method's.

    Each image is compared with the labelled ones (:class:`DriftMonitor`); its record has the result under ``monitor``.

    Args:
        method: the method that was commissioned, with the same settings; :class:`mgipt_monai.Source` for none.
        site: what :func:`mgipt_monai.commission` found, or the path of the file with it.
        head: how logits become masks, for the monitored areas.
        false_alarms: probability that the monitor ever raises an alarm although nothing has changed, in (0, 1).
        correction: first digits of the digest of the correction that ``site`` must have; None accepts any.

    Raises:
        TypeError: if ``method`` is not an adaptation method, or is itself commissioned.
        ValueError: at construction, if the method has other settings than the one that was commissioned, or ``site``
            has another correction; at the first image, if the network has other weights.

    Example:
        >>> from mgipt_monai import Source
        >>> network = nn.Conv2d(3, 1, 1)
        >>> site = SiteSetting(fingerprint(network), {"class": "Source"}, Correction(offset=torch.tensor([2.0])))
        >>> method = Commissioned(Source(network), site)
        >>> image = torch.rand(1, 3, 8, 8)
        >>> torch.allclose(method(image), network(image) + 2)
        True
    """

    def __init__(
        self,
        method: AdaptationMethod,
        site: SiteSetting | str | os.PathLike[str],
        head: Head = "sigmoid",
        false_alarms: float = 0.05,
        correction: str | None = None,
    ) -> None:
        if isinstance(method, Commissioned):
            raise TypeError("method is already commissioned: pass the method inside it")
        check_head(head)
        super().__init__(method)
        self._site = site if isinstance(site, SiteSetting) else SiteSetting.load(site)
        if method.settings() != dict(self._site.method):
            raise ValueError(
                f"the site was commissioned with the method {dict(self._site.method)}, this is {method.settings()}: "
                "use the overlay that commissioning wrote, or commission the site again"
            )
        if correction is not None and not self._site.correction.digest.startswith(correction):
            raise ValueError(
                f"the site's file has the correction {self._site.correction.digest[:12]}, its overlay was written for "
                f"{correction}: commission the site again, which writes both"
            )
        self._head: Head = head
        self.false_alarms = false_alarms
        self.monitor: DriftMonitor | None = None
        if self._site.reference:
            self.monitor = DriftMonitor(self._site.reference, false_alarms=false_alarms)
        self._plain = (method.network,)
        self._is_ready = False
        self._learnt()

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        """The network as it came, without the correction."""
        return self._plain[0]

    def bind(self, network: nn.Module) -> None:
        """Switch to ``network``, see :class:`AdaptationMethod`; it must have the weights that were commissioned."""
        super().bind(network)
        self._plain, self._is_ready = (network,), False

    def reset(self) -> None:
        """Start a stream again from what was learnt while the site was commissioned."""
        self.method.bind(self.network)
        super().reset()
        self._is_ready = False
        if self.monitor is not None:
            self.monitor.reset()
        self._learnt()

    def _learnt(self) -> None:
        if self._site.start:
            self.method._load_state(copy.deepcopy(dict(self._site.start)))

    def _prepare(self) -> None:
        """Correct the network once its weights are known; they are usually loaded after the method is built."""
        found = fingerprint(self.network)
        if found != self._site.fingerprint:
            raise ValueError(
                f"the site was commissioned with other weights than this {type(self.network).__name__} has "
                f"(fingerprint {self._site.fingerprint[:12]}, not {found[:12]}): commission the site again"
            )
        corrected = self._site.correction.to_network(self.network)
        if corrected is not self.network:
            self.method.bind(corrected)
        self._is_ready = True

    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        if not self._is_ready:
            self._prepare()
        correction = self._site.correction
        with network_turn(self.method.network):
            prediction = self.method._adapt_and_predict(correction.to_image(image))
        logits = correction.to_logits(prediction.logits)
        record = {**prediction.record, "corrected": self.corrected_parts}
        if self.monitor is not None:
            is_fixed = not self._site.start
            record["monitor"] = self.monitor.observe(monitored(image, logits if is_fixed else None, self._head))
        is_plain = not {"prompts", "norms"} & set(self.corrected_parts)  # then the method has the network as it came
        return Prediction(logits, record, prediction.uncertainty, prediction.unadapted if is_plain else None)

    @property
    def corrected_parts(self) -> list[str]:
        """The parts of the network that the correction changes: ``prompts``, ``norms``, ``offset``."""
        numbers = self._site.correction.numbers
        return [part for part in ("prompts", "norms", "offset") if numbers[part]]

    def adapted_input(self, image: Tensor) -> Tensor:
        """Return the latest image as passed to the network."""
        return self.method.adapted_input(self._site.correction.to_image(image))

    def settings(self) -> dict[str, Any]:
        """Return the method's settings, and under ``site`` the weights and numbers that it was commissioned with."""
        site = {"weights": self._site.fingerprint[:12], "correction": self._site.correction.digest[:12]}
        return {**self.method.settings(), "site": site, "false_alarms": self.false_alarms}

    def twin(self) -> Self:
        """Return a copy with its own state that shares the network."""
        shared = [*self.network.modules(), *self.method.network.modules()]
        twin = copy.deepcopy(self, {id(module): module for module in shared})
        twin._rollback = None
        return twin

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # the corrected copy is made again, on the new device
        self.method.bind(self.network)
        self._is_ready = False
        return super()._apply(*args, **kwargs)

    def _state(self) -> dict[str, Any]:
        if self.monitor is None:
            return self.method._state()
        return {**self.method._state(), "monitor": self.monitor.adaptation_state()}

    def _load_state(self, state: dict[str, Any]) -> None:
        if self.monitor is None:
            return self.method._load_state(state)
        before = self.monitor.adaptation_state()
        self.monitor.load_adaptation_state(state["monitor"])
        try:
            self.method._load_state(state)
        except ValueError:
            self.monitor.load_adaptation_state(before)
            raise
        return None


def monitored(image: Tensor, logits: Tensor | None, head: Head) -> dict[str, float]:
    """Return the signals of one image that are compared with the labelled images'.

    Args:
        image: (1, C, \\*spatial).
        logits: (1, K, \\*spatial), of a method that learns nothing from the stream; those of others change by
            themselves, without any change of the images. None leaves out what is measured in them.
        head: how logits become masks.

    Returns:
        Of each of the first four channels ``mean_C``, ``std_C`` and ``sharpness_C`` (mean difference of neighbours
        along the last axis); with logits also ``area_K`` (share of the image) and ``confidence`` (mean probability of
        what is predicted).
    """
    signals = {}
    # sums depend on the order in memory, which differs between a reader and a loader
    for channel, values in enumerate(image[0, :4].contiguous()):
        signals[f"mean_{channel}"], signals[f"std_{channel}"] = values.mean().item(), values.std().item()
        signals[f"sharpness_{channel}"] = values.diff(dim=-1).abs().mean().item()
    if logits is not None:
        logits = logits.contiguous()
        for index, mask in enumerate(binarize(logits, head)[0]):
            signals[f"area_{index}"] = mask.mean().item()
        likely = torch.sigmoid(logits.abs()) if head == "sigmoid" else logits.softmax(dim=1).amax(dim=1)
        signals["confidence"] = likely.mean().item()
    return signals
