# SPDX-License-Identifier: Apache-2.0
"""The rule of site correction for one network: what in its features is content, and how far evidence is trusted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from monai.inferers import Inferer, SliceInferer, SlidingWindowInferer
from monai.utils import ensure_tuple
from torch import Tensor

from mgipt_monai.utils.provenance import BesideWeights
from mgipt_monai.utils.state_checks import check_finite, check_keys, check_number, check_tensor

__all__ = ["LayerContent", "SiteRule", "read_rule"]

LEARN = "`mgipt site-rule SITES FILE --weights WEIGHTS`"


@dataclass(frozen=True)
class LayerContent:
    """How a layer's statistics vary among source images with what is in them.

    The statistics of an image are its distances from the layer's stored ones, ``z`` and ``r`` of
    :class:`SiteStatistics`, one after the other: (2C,).

    Attributes:
        center: mean over the source images, (2C,).
        directions: orthonormal directions in which the statistics change with the structures' sizes, (K, 2C).
        limits: how far content moves an image in each direction, (K,), at least 0.
        spread: variance of the source images' statistics without content, (2C,), at least 0.
    """

    center: Tensor
    directions: Tensor
    limits: Tensor
    spread: Tensor

    @classmethod
    def measure(cls, statistics: Tensor, sizes: Tensor) -> LayerContent:
        """Measure it in source images.

        The directions are those of a linear regression of the statistics on the sizes, and their limits twice the
        deviation of what it explains: content is taken for the cause of a change only as far as sizes vary.

        Args:
            statistics: of each image, (N, 2C).
            sizes: logarithm of the share of each image that each structure takes, (N, K).
        """
        center, sizes = statistics.mean(dim=0), sizes - sizes.mean(dim=0)
        slopes = torch.linalg.lstsq(sizes, statistics - center, driver="gelsd").solution
        directions = torch.linalg.svd(slopes, full_matrices=False).Vh
        limits = 2 * (sizes @ slopes @ directions.T).std(dim=0)
        content = cls(center, directions, limits, torch.zeros_like(center))
        without = torch.cat(content.appearance(*statistics.chunk(2, dim=1)), dim=1)
        return replace(content, spread=without.var(dim=0))

    def appearance(self, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part of an image's distances, (B, C) each, that content does not explain."""
        distance = torch.cat([z, r], dim=1) - self.center.to(z)
        directions, limits = self.directions.to(z), self.limits.to(z)
        content = (distance @ directions.T).clamp(-limits, limits) @ directions
        z, r = (distance - content).chunk(2, dim=1)
        return z, r


@dataclass(frozen=True)
class SiteRule(BesideWeights):
    """Numbers of site correction for one network, learnt from its labelled source images.

    See :func:`mgipt_monai.methods.learn_site_rule`.

    Attributes:
        layers: dotted name of a norm layer to its content.
        trust: reciprocal of the evidence at which the source's weight becomes 0, above 0.
        images: number of source images.
        fingerprint: of the network's weights, see :func:`mgipt_monai.utils.provenance.fingerprint`.
        window: sides of the windows that the network was shown; None for whole images.
        path: the file it was read from; None if it was not read from a file.

    Raises:
        ValueError: at construction, for numbers out of range or tensors that do not fit one another.
    """

    layers: Mapping[str, LayerContent]
    trust: float
    images: int
    fingerprint: str
    window: tuple[int, ...] | None = None
    path: str | None = None

    kind: ClassVar[str] = "rule of site correction"
    made_with: ClassVar[str] = LEARN

    def __post_init__(self) -> None:
        self._check_provenance()
        for name, layer in self.layers.items():
            for key, value in vars(layer).items():
                check_tensor(f"{key} of {name}", value)
                check_finite(f"{key} of {name}", value)
            if layer.center.ndim != 1 or len(layer.center) % 2 or not len(layer.center):
                raise ValueError(f"the rule's center of {name} has the shape {tuple(layer.center.shape)}, not (2C,)")
            if layer.directions.ndim != 2 or layer.directions.shape[1:] != layer.center.shape:
                raise ValueError(f"the rule's directions of {name} have the shape {tuple(layer.directions.shape)}")
            if layer.limits.shape != layer.directions.shape[:1] or (layer.limits < 0).any():
                raise ValueError(f"the rule's limits of {name} are not one number from 0 for each direction")
            if layer.spread.shape != layer.center.shape or (layer.spread < 0).any():
                raise ValueError(f"the rule's spread of {name} is not one number from 0 for each statistic")
        check_number("trust", self.trust, least=1e-6, most=1e6)
        for side in self.window or ():
            check_number("side of a window", side, least=-1, whole=True)

    def _content(self) -> dict[str, Any]:
        layers = {name: dict(vars(layer)) for name, layer in self.layers.items()}
        window = {} if self.window is None else {"window": list(self.window)}
        return {"layers": layers, "trust": float(self.trust), **window}

    @classmethod
    def _of(cls, content: Mapping[str, Any], path: str) -> SiteRule:
        check_keys("rule", content, {"trust"})
        layers = {name: _layer(name, layer) for name, layer in content["layers"].items()}
        window = None if content.get("window") is None else tuple(content["window"])
        return cls(layers, content["trust"], content["images"], content["fingerprint"], window, path)

    def check_layers(self, channels: Mapping[str, int]) -> None:
        """Raise ValueError unless the rule has each of these layers, with this number of channels."""
        for name, number in channels.items():
            found = len(self.layers[name].center) // 2 if name in self.layers else 0
            if found != number:
                raise ValueError(
                    f"the rule of site correction has {found} channels for {name}, which has {number}: "
                    f"learn it with {LEARN}"
                )

    def check_inferer(self, inferer: Inferer) -> None:
        """Raise ValueError unless an inferer shows the network what the rule was learnt from."""
        wanted = window_of(inferer)
        if wanted != self.window:
            raise ValueError(
                f"{self.origin} was learnt from {_shown(self.window)}, and the {type(inferer).__name__} shows the "
                f"network {_shown(wanted)}: learn one with learn_site_rule(..., inferer=...), or leave it out (in the "
                "bundle: rule_path)"
            )


def window_of(inferer: Inferer) -> tuple[int, ...] | None:
    """Return the sides of an inferer's windows or slices, None if it shows the network whole images."""
    if not isinstance(inferer, SlidingWindowInferer):
        return None
    sides = list(ensure_tuple(inferer.roi_size))
    if isinstance(inferer, SliceInferer) and len(sides) > 2:  # from its first volume on, with the axis it cuts along
        del sides[inferer.spatial_dim]
    return tuple(sides)


def _shown(window: tuple[int, ...] | None) -> str:
    return "whole images" if window is None else f"windows of {'x'.join(map(str, window))}"


def _layer(name: str, layer: Any) -> LayerContent:
    check_keys(f"content of {name}", layer, {"center", "directions", "limits", "spread"})
    return LayerContent(layer["center"], layer["directions"], layer["limits"], layer["spread"])


def read_rule(rule: SiteRule | str | os.PathLike[str] | None) -> SiteRule | None:
    """Return the rule, read from a file if a path is given."""
    return rule if rule is None or isinstance(rule, SiteRule) else SiteRule.load(rule)
