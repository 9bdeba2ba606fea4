# SPDX-License-Identifier: Apache-2.0
"""Source statistics: what a norm layer that stores none would have stored, kept in a small file."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mgipt_monai.fingerprint import fingerprint
from mgipt_monai.state_file import save_state

from .norm_layers import CALIBRATE

__all__ = ["LayerStatistics", "SourceStatistics", "read_statistics"]

logger = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's features, per channel, each (C,) float32. With sliding windows an image is a window.

    Attributes:
        mean: mean over the source images of an image's mean.
        mean_spread: standard deviation of the images' means (n - 1 in the denominator; 0 for one image).
        std: mean over the source images of an image's standard deviation.
        std_spread: standard deviation of the images' standard deviations.
    """

    mean: Tensor
    mean_spread: Tensor
    std: Tensor
    std_spread: Tensor


@dataclass(frozen=True)
class SourceStatistics:
    """What the source images look like inside a network, made by :func:`measure_source_statistics`.

    Attributes:
        layers: dotted name to statistics, in the network's order.
        images: number of source images.
        fingerprint: of the weights that they were measured with, see :func:`mgipt_monai.fingerprint.fingerprint`.
        path: the file that they were read from; None if they were not.

    Raises:
        ValueError: at construction, for statistics that are not finite numbers, one per channel.
    """

    layers: dict[str, LayerStatistics]
    images: int
    fingerprint: str
    path: str | None = None

    @property
    def origin(self) -> str:
        """What to call them in a message."""
        return "the statistics" if self.path is None else f"the statistics in {self.path}"

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            values = torch.stack([layer.mean, layer.mean_spread, layer.std, layer.std_spread])
            if values.ndim != 2 or not torch.isfinite(values).all():
                raise ValueError(f"the statistics of layer {name} are not finite numbers, one per channel")

    def save(self, path: str | os.PathLike) -> None:
        """Write the file: tensors and plain types, no image. A crash leaves the old file or the new one."""
        layers = {name: vars(layer) for name, layer in self.layers.items()}
        content = {"version": VERSION, "images": self.images, "fingerprint": self.fingerprint, "layers": layers}
        save_state(content, path)
        logger.info("statistics of %d layers over %d source images written to %s", len(layers), self.images, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> SourceStatistics:
        """Read a file that :meth:`save` wrote; no code in it is ever run.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a readable statistics file, naming it.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no statistics file at {path}: make it with {CALIBRATE}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']!r}, this needs {VERSION}")
            layers = {name: LayerStatistics(**layer) for name, layer in content["layers"].items()}
            return cls(layers, content["images"], content["fingerprint"], os.fspath(path))
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable statistics file ({error}): make it anew with {CALIBRATE}"
            ) from error

    def check(self, network: nn.Module) -> None:
        """Raise ValueError unless ``network`` has the very weights that the statistics were measured with."""
        if fingerprint(network) != self.fingerprint:
            raise ValueError(
                f"{self.origin} were made for other weights than this {type(network).__name__} has: "
                f"make them anew with {CALIBRATE}"
            )


def read_statistics(statistics: SourceStatistics | str | os.PathLike | None) -> SourceStatistics | None:
    """Return the statistics themselves, read from their file where a path is given."""
    if statistics is None or isinstance(statistics, SourceStatistics):
        return statistics
    return SourceStatistics.load(statistics)
