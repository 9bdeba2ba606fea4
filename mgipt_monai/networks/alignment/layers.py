# SPDX-License-Identifier: Apache-2.0
"""Which layers of a network can be aligned with its source, and which of their features are measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

__all__ = [
    "evaluating",
    "find_listed_layers",
    "find_measurable_layers",
    "find_norm_layers",
    "has_stored_statistics",
    "layer_features",
    "stored_statistics",
]

MEASURE = (
    "`mgipt source-statistics SOURCE_IMAGES FILE --weights WEIGHTS` (for a bundle of your own: merge "
    "configs/existing_source_statistics.yaml into its inference config)"
)
"""How to write a statistics file."""

GIVE_A_FILE = (
    f"measure them once on source images with {MEASURE} and pass the file as statistics (in the bundle: "
    "statistics_path)"
)

NEEDS_BATCH_NORM = (
    "this method needs batch norm (norm='batch', track_running_stats=True); with a statistics file, MGIPT and the "
    "preset steady adapt networks without it"
)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluate a network within the block, and restore the mode of each of its modules."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def has_stored_statistics(layer: nn.Module) -> bool:
    """Whether the layer normalises with stored statistics: batch norm, or instance norm that tracks them."""
    return isinstance(layer, _NormBase) and layer.running_mean is not None


def stored_statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the mean and variance that a layer stores, (C,) each."""
    assert isinstance(layer, _NormBase)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def find_norm_layers(network: nn.Module, pattern: str | None = None, advice: str = GIVE_A_FILE) -> dict[str, nn.Module]:
    """Find the layers that can be aligned without a statistics file: those with stored statistics.

    Args:
        network: any network.
        pattern: regular expression that a layer's dotted name must contain; None takes all.
        advice: end of the error message for a network without such a layer.

    Returns:
        Name to layer, in the network's order.

    Raises:
        ValueError: if the network has no such layer, or none with a matching name.
    """
    usable = {name: layer for name, layer in network.named_modules() if has_stored_statistics(layer)}
    if not usable:
        others = Counter(type(m).__name__ for m in network.modules() if _is_norm(m))
        found = ", ".join(f"{n} x {name}" for name, n in others.items()) or "no norm layer at all"
        raise ValueError(
            f"{type(network).__name__} stores no source statistics to align with (found {found}): {advice}"
        )
    return _matching(usable, pattern, "batch norm")


def find_measurable_layers(network: nn.Module, pattern: str | None = None) -> dict[str, nn.Module]:
    """Find the layers whose source statistics can be measured: batch, instance, group and layer norms.

    A layer norm counts if it normalises over the last axis only. In a network without any of these, convolutions are
    used instead.

    Args:
        network: any network.
        pattern: regular expression that a layer's dotted name must contain; None takes all.

    Returns:
        Name to layer, in the network's order.

    Raises:
        ValueError: if the network has no such layer, or none with a matching name.
    """
    layers = dict(network.named_modules())
    usable = {name: layer for name, layer in layers.items() if _is_norm(layer)}
    usable = usable or {name: layer for name, layer in layers.items() if isinstance(layer, _ConvNd)}
    if not usable:
        raise ValueError(f"{type(network).__name__} has neither a norm layer nor a convolution to measure")
    return _matching(usable, pattern, "norm layer or convolution")


def find_listed_layers(
    network: nn.Module, names: Iterable[str], pattern: str | None = None, origin: str = "the statistics"
) -> dict[str, nn.Module]:
    """Find the layers of a statistics file.

    Args:
        network: the network that the file was made for.
        names: the dotted names of the file's layers.
        pattern: regular expression that a name must contain; None takes all.
        origin: name of the file in error messages.

    Returns:
        Name to layer, in the file's order.

    Raises:
        ValueError: if the network lacks one of them, or none has a matching name.
    """
    layers = dict(network.named_modules())
    if unknown := [name for name in names if name not in layers]:
        raise ValueError(
            f"{origin} was made in another network, {type(network).__name__} has no layer "
            f"{', '.join(unknown[:4])}: measure them again with {MEASURE}"
        )
    return _matching({name: layers[name] for name in names}, pattern, "layer of the statistics file")


def _is_norm(layer: nn.Module) -> bool:
    if isinstance(layer, nn.LayerNorm):
        return len(layer.normalized_shape) == 1
    return isinstance(layer, (_NormBase, nn.GroupNorm))


def _matching(layers: dict[str, nn.Module], pattern: str | None, kind: str) -> dict[str, nn.Module]:
    chosen = {name: layer for name, layer in layers.items() if pattern is None or re.search(pattern, name)}
    if not chosen:
        raise ValueError(f"the name pattern {pattern!r} matches no {kind}; there are: {', '.join(layers)}")
    return chosen


def layer_features(layer: nn.Module, layer_input: Tensor, layer_output: Tensor, images: int) -> Tensor | None:
    """Arrange a layer's features by image, channel and position.

    Args:
        layer: a norm layer, whose input is measured, or a convolution, whose output is. The channels of a layer norm
            are its last axis.
        layer_input: (N, ...). N is the number of images, or a multiple of it if the network folds the windows of an
            image into the batch, those of the first image first.
        layer_output: (N, ...).
        images: number of images in this forward.

    Returns:
        Features (images, C, \\*spatial), with an image's windows as the first spatial axis if there are several. None
        if there are no spatial axes, so that one image has no statistics, or if N is not a multiple.
    """
    features = layer_output if isinstance(layer, _ConvNd) else layer_input
    if features.ndim < 3 or len(features) % images:
        return None
    if isinstance(layer, nn.LayerNorm):
        features = features.movedim(-1, 1)
    return features if len(features) == images else features.unflatten(0, (images, -1)).movedim(1, 2)
