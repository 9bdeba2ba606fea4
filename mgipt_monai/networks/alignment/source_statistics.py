# SPDX-License-Identifier: Apache-2.0
"""Source statistics: feature statistics of source images inside a network, measured once and kept in a small file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from monai.inferers import Inferer, SimpleInferer
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from mgipt_monai.networks.alignment.fused import instance_statistics
from mgipt_monai.networks.alignment.layers import MEASURE, evaluating, find_measurable_layers, layer_features
from mgipt_monai.networks.alignment.windows import ForwardRoute, Windows, in_precision_of
from mgipt_monai.networks.look import RunningLook, SourceLook
from mgipt_monai.utils.files import file_names
from mgipt_monai.utils.provenance import BesideWeights, fingerprint

__all__ = ["LayerStatistics", "SourceStatistics", "measure_source_statistics", "read_statistics"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's features per channel, each (C,) float32. Each sliding window counts as an image.

    Attributes:
        mean: mean over the source images of an image's mean.
        std: mean over the source images of an image's standard deviation.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class SourceStatistics(BesideWeights):
    """Feature statistics of source images inside a network, see :func:`measure_source_statistics`.

    Attributes:
        layers: dotted name to statistics, in the network's order.
        images: number of source images.
        fingerprint: of the weights they were measured with, see :func:`mgipt_monai.utils.provenance.fingerprint`.
        path: the file they were read from; None if they were not read from a file.
        look: the images' tone and lowest amplitudes, which site correction needs in networks without batch norm; None
            in files of earlier versions, and where an image is smaller than 5 pixels.

    Raises:
        ValueError: at construction, for statistics that are not finite 32-bit numbers, one per channel, or negative
            deviations, no layers, no positive number of images, or names and a fingerprint that are no texts.
    """

    layers: dict[str, LayerStatistics]
    images: int
    fingerprint: str
    path: str | None = None
    look: SourceLook | None = None

    kind: ClassVar[str] = "statistics file"
    made_with: ClassVar[str] = MEASURE

    def __post_init__(self) -> None:
        self._check_provenance()
        for name, layer in self.layers.items():
            _check_layer(name, layer.mean, layer.std)

    def _content(self) -> dict[str, Any]:
        look = {} if self.look is None else {"look": self.look.content()}
        return {"layers": {name: vars(layer) for name, layer in self.layers.items()}, **look}

    @classmethod
    def _of(cls, content: Mapping[str, Any], path: str) -> SourceStatistics:
        # files of version 0.1 also contain the images' spread
        layers = {name: LayerStatistics(layer["mean"], layer["std"]) for name, layer in content["layers"].items()}
        look = SourceLook.of(content["look"]) if "look" in content else None
        return cls(layers, content["images"], content["fingerprint"], path, look)


def _check_layer(name: str, mean: Any, std: Any) -> None:
    for value in (mean, std):
        dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
        if not dense or value.dtype != torch.float32 or value.ndim != 1 or not len(value):
            raise ValueError(f"the statistics of layer {name} are not 32-bit numbers, one per channel")
    if len(mean) != len(std) or not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise ValueError(f"the statistics of layer {name} are not finite numbers, one per channel")
    if (std < 0).any():
        raise ValueError(f"the statistics of layer {name} have a negative standard deviation")


def read_statistics(statistics: SourceStatistics | str | os.PathLike[str] | None) -> SourceStatistics | None:
    """Return the statistics, read from a file if a path is given."""
    if statistics is None or isinstance(statistics, SourceStatistics):
        return statistics
    return SourceStatistics.load(statistics)


def measure_source_statistics(
    network: nn.Module,
    images: Iterable[Tensor | Mapping[str, Any]],
    layers: str | None = None,
    device: torch.device | str | None = None,
    inferer: Inferer | None = None,
    windows: int = 2,
) -> SourceStatistics:
    """Measure feature statistics of source images at every norm layer of a network or, without any, every convolution.

    The network runs in evaluation mode, one forward per image or window, and is restored afterwards. No image is kept.

    Args:
        network: the source network with its trained weights.
        images: batches (B, C, \\*spatial), or dicts with such a batch under ``image``, as from a MONAI ``DataLoader``;
            from the site that the network was trained on, preprocessed as for inference.
        layers: regular expression on the names of the layers to measure; None measures all.
        device: where the network is; None uses the device of its first parameter.
        inferer: the inferer used in adaptation: None for whole images, or a pipeline's ``SlidingWindowInferer`` or
            ``SliceInferer``, with which each window counts as an image.
        windows: maximum number of windows per image to measure in; use the same number as in adaptation.

    Raises:
        TypeError: for an inferer that adaptation does not support.
        ValueError: if there is no image or no layer to measure, or an image or its features have NaN or infinite
            values.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> statistics = measure_source_statistics(network, [torch.rand(2, 3, 16, 16), torch.rand(1, 3, 9, 9)])
        >>> statistics.images, list(statistics.layers), statistics.layers["1"].mean.shape
        (3, ['1'], torch.Size([4]))
    """
    chosen = find_measurable_layers(network, layers)
    route = ForwardRoute()
    route.change(SimpleInferer() if inferer is None else inferer, windows)
    if device is None:
        device = next(chain(network.parameters(), network.buffers()), torch.empty(0)).device
    seen = {name: _RunningMean() for name in chosen}
    hooks = [layer.register_forward_hook(partial(_observe, seen[name])) for name, layer in chosen.items()]
    count, look = 0, RunningLook()
    try:
        with evaluating(network), torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            for count, (image, file) in enumerate(_one_by_one(images, device), start=1):
                if not torch.isfinite(image).all():
                    raise ValueError(f"source image {count}{file} has NaN or infinite values: repair or remove it")
                look.add(image)
                for window in Windows(route, image).cut(image):
                    network(in_precision_of(network, window))
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise ValueError("there are no source images to measure")
    measured = {name: each.statistics() for name, each in seen.items() if each.count}
    if not measured:
        raise ValueError(f"none of the layers has features with spatial axes: {', '.join(chosen)}")
    return SourceStatistics(measured, count, fingerprint(network), look=look.look())


class _RunningMean:
    """Running mean of the images' means and deviations, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())

    def add(self, value: Tensor) -> None:
        self.count += 1
        self.mean = self.mean + (value - self.mean) / self.count

    def statistics(self) -> LayerStatistics:
        mean, std = self.mean.float()
        return LayerStatistics(mean, std)


def _observe(seen: _RunningMean, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    features = layer_features(layer, inputs[0], output, images=1)
    if features is not None:
        mean, std = instance_statistics(features.float())
        seen.add(torch.cat([mean, std]).cpu().double())


def _one_by_one(
    batches: Iterable[Tensor | Mapping[str, Any]], device: torch.device | str
) -> Iterable[tuple[Tensor, str]]:
    """Yield each image (1, C, \\*spatial) and, if its metadata has one, its file name in brackets."""
    for batch in batches:
        if isinstance(batch, Mapping) and "image" not in batch:
            raise ValueError(f"a batch has no image: {dict(batch)}")
        images = batch["image"] if isinstance(batch, Mapping) else batch
        names = file_names(images)
        plain = convert_to_tensor(images, dtype=torch.float32, device=device, track_meta=False)
        for i, image in enumerate(plain.split(1)):
            yield image, f" ({names[i]})" if i < len(names) else ""
