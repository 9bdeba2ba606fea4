# SPDX-License-Identifier: Apache-2.0
"""A method around another method, which keeps the network, the inferer and the image count."""

from __future__ import annotations

from typing import Any

from monai.inferers import Inferer
from torch import Tensor, nn

from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.networks.alignment import AlignedNorms

__all__ = ["WrappedMethod"]


class WrappedMethod(AdaptationMethod):
    """Base class of methods around another one, such as :class:`Guarded`: what it does not say is the inner method's.

    Args:
        method: the inner method.

    Raises:
        TypeError: if ``method`` is not an adaptation method.
    """

    def __init__(self, method: AdaptationMethod) -> None:
        if not isinstance(method, AdaptationMethod):
            raise TypeError(f"method must be an adaptation method, such as MGIPT(network); got {type(method).__name__}")
        # network, route and image count belong to the inner method
        nn.Module.__init__(self)
        self.method = method
        self.last = []
        self.uncertainty = None
        self._rollback = None

    def reset(self) -> None:
        """Forget the stream."""
        self.method.reset()
        self.last, self.uncertainty, self.unadapted = [], None, None

    def _state_record(self) -> dict[str, Any]:
        return self.method._state_record()

    def bind(self, network: nn.Module) -> None:
        """Switch to ``network``, see :class:`AdaptationMethod`."""
        self.method.bind(network)

    def predict_through(self, inferer: Inferer, windows: int = 2) -> None:
        """Run the network through an inferer from now on, see :class:`AdaptationMethod`."""
        self.method.predict_through(inferer, windows)

    def compare(self, on: bool = True) -> None:
        """Also predict without adaptation, see :class:`AdaptationMethod`; the wrapped method may do so anyway."""
        self.method.side_by_side = on
        super().compare(on)

    def reserve(self, forwards: int) -> None:
        """Reserve additional forwards per image within the wrapped method's limit."""
        self.method.reserve(forwards)

    def prompt_maps(self) -> dict[str, Tensor]:
        """Return the wrapped method's prompts."""
        return self.method.prompt_maps()

    def source_norms(self) -> AlignedNorms:
        """Return the norm layers that measure how far an image is from the source."""
        return self.method.source_norms()

    @property
    def _network_key(self) -> str:  # type: ignore[override]
        return f"method.{self.method._network_key}"

    @property
    def name(self) -> str:
        """The wrapped method's name; the guard is part of the settings."""
        return self.method.name

    @property
    def images_seen(self) -> int:
        """Number of images adapted to since the start of the stream."""
        return self.method.images_seen

    @images_seen.setter
    def images_seen(self, count: int) -> None:
        self.method.images_seen = count

    @property
    def takes_windows(self) -> bool:
        """Whether the wrapped method can predict through a sliding-window inferer."""
        return self.method.takes_windows

    @property
    def has_uncertainty(self) -> bool:
        """Whether the wrapped method predicts several views of an image."""
        return self.method.has_uncertainty

    @property
    def averaged(self) -> tuple[str, ...]:
        """Names of the tensors in the wrapped method's state that may be averaged over streams."""
        return self.method.averaged

    def __getattr__(self, name: str) -> Any:
        # exposes the wrapped method's parts and settings
        modules = self.__dict__.get("_modules", {})
        if name in modules or "method" not in modules or name.startswith("__"):
            return super().__getattr__(name)
        return getattr(modules["method"], name)
