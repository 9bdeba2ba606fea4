# SPDX-License-Identifier: Apache-2.0
"""Which layers of a network can be aligned with its source, and which are chosen."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

__all__ = ["find_norm_layers"]


def find_norm_layers(network: nn.Module, pattern: str | None = None) -> dict[str, nn.Module]:
    """Find the layers that can be aligned: batch norms with stored statistics.

    Args:
        network: any network.
        pattern: regular expression that a layer's dotted name must contain; None takes all.

    Returns:
        Name to layer, in the network's order.

    Raises:
        ValueError: if the network has no such layer, or none with a matching name.
    """
    usable = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }
    if not usable:
        others = Counter(type(m).__name__ for m in network.modules() if isinstance(m, (_NormBase, nn.GroupNorm)))
        found = ", ".join(f"{n} x {name}" for name, n in others.items()) or "no norm layer at all"
        raise ValueError(
            f"{type(network).__name__} has no batch norm with stored source statistics to align with (found {found}): "
            "use a network with batch norm (norm='batch', track_running_stats=True)"
        )
    chosen = {name: layer for name, layer in usable.items() if pattern is None or re.search(pattern, name)}
    if not chosen:
        raise ValueError(f"aligned_layers={pattern!r} matches no batch norm; there are: {', '.join(usable)}")
    return chosen
