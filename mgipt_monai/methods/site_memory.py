# SPDX-License-Identifier: Apache-2.0
"""The memory of sites: what was learnt at each stays apart, so that images from elsewhere do not spoil it.

An image's signature says how far it is from the source at the network's first norm layer. A site is the running mean
and spread of its images' signatures. The memory decides where an image belongs, not how it is predicted.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.utils.state_checks import check_finite, check_keys, check_number, check_tensor, is_whole

__all__ = ["Remembering", "SiteMemory"]

CLIP = 1.5
"""An image counts as at most this many spreads away from its site, so that one image hardly moves or widens it."""
FLOOR = 0.1
"""Smallest spread, in deviations of the source."""
SETTLED = 20
"""Number of images after which a site is as good as any other."""


@dataclass(eq=False)
class _Site:
    """A site: the number of its images, the averages of their signatures and squares (4, C), and what was learnt."""

    count: int
    averages: Tensor
    learnt: dict[str, Any] | None

    @property
    def spread(self) -> Tensor:
        variance = (self.averages[2:] - self.averages[:2].square()).clamp(min=0)
        return (variance + FLOOR**2).sqrt()


class SiteMemory(nn.Module):
    """Keeps what a method has learnt at several sites, and tells from an image's signature at which site it is.

    An image near the current site continues it. One near another known site goes back there: what was learnt there
    takes the place of what was learnt since. One that is near none opens a new site, which starts from a copy of what
    was learnt at the nearest. So a jump of the stream is a decision, and what comes after it leaves the old site as it
    was.

    The distance of an image from a site is in spreads of the site's images, as root mean square over the channels. A
    site's averages follow its latest images, each clipped to 1.5 spreads. If there are too many sites, the one with the
    fewest images is given up; from 20 images on all count alike, and the least recently used one goes.

    The state has constant size once all sites are known, and no image content: for each site a number, four averages
    per channel of the first norm layer, and what was learnt there.

    Args:
        max_distance: largest distance of an image from its site, in spreads.
        sites: largest number of sites, at least 2.
        horizon: number of images over which a site's averages are taken, at least 2.
        warm_up: number of a stream's first images that count as one site, at least 2.

    Raises:
        ValueError: at construction, for a setting out of range.

    Example:
        >>> memory = SiteMemory(warm_up=2)
        >>> here, there = torch.zeros(2, 4), torch.ones(2, 4)
        >>> found = [memory.visit(signature, lambda: {"learnt": "here"}) for signature in (here, here, there, here)]
        >>> found  # nothing to restore until the stream comes back
        [None, None, None, {'learnt': 'here'}]
    """

    def __init__(self, max_distance: float = 2.0, sites: int = 3, horizon: int = 100, warm_up: int = 10) -> None:
        super().__init__()
        if not 0 < max_distance < math.inf:
            raise ValueError(f"max_distance must be above 0 spreads, got {max_distance}")
        for name, value in (("sites", sites), ("horizon", horizon), ("warm_up", warm_up)):
            if not is_whole(value) or value < 2:
                raise ValueError(f"{name} must be a whole number from 2, got {value}")
        self.max_distance, self.sites = float(max_distance), int(sites)
        self.horizon, self.warm_up = int(horizon), int(warm_up)
        self.reset()

    def extra_repr(self) -> str:
        """Return the settings."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in ("max_distance", "sites", "horizon", "warm_up"))

    def reset(self) -> None:
        """Forget all sites."""
        self._sites: list[_Site] = []  # the latest first: that is the current one

    def visit(self, signature: Tensor, learnt: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Find the site of an image and add the image to it.

        Args:
            signature: of the image, (2, C), see :class:`mgipt_monai.networks.AlignedNorms`.
            learnt: returns a copy of what the method has learnt so far; called if the image is not at the current site.

        Returns:
            What the method goes on from: what was learnt at the image's site or, for a new site, at the nearest; None
            if that is what the method has.

        Raises:
            ValueError: if the signature has other channels than the sites.
        """
        signature = signature.detach().cpu()
        seen = torch.cat([signature, signature.square()])
        if self._sites and seen.shape != self._sites[0].averages.shape:
            raise ValueError(
                f"the first norm layer has {seen.shape[1]} channels, the known sites have "
                f"{self._sites[0].averages.shape[1]}: start a new stream with reset()"
            )
        found = None
        if not self._sites:
            self._open(seen)
        else:
            current = self._sites[0]
            nearest, distance = self._find(signature)
            is_new = distance > self.max_distance
            if is_new or nearest is not current:
                current.learnt = learnt()
                found = None if nearest is current else nearest.learnt
            if is_new:
                self._open(seen)
            elif nearest is not current:
                self._sites.remove(nearest)
                self._sites.insert(0, nearest)
                nearest.learnt = None
        self._add(signature)
        return found

    @property
    def is_elsewhere(self) -> bool:
        """Whether the latest image was unlike those that the stream began with, at a site of few images so far."""
        return len(self._sites) > 1 and self._sites[0].count < self.warm_up

    def _find(self, signature: Tensor) -> tuple[_Site, float]:
        """Return the nearest site and its distance; in the warm-up that is the only one."""
        best = max(self._sites, key=lambda site: min(site.count, SETTLED))
        if best.count < self.warm_up:
            return self._sites[0], 0.0
        distances = [self._distance(signature, site, best) for site in self._sites]
        return min(zip(self._sites, distances, strict=True), key=lambda pair: pair[1])

    def _distance(self, signature: Tensor, site: _Site, best: _Site) -> float:
        # few images say little about their spread
        spread = (site if site.count >= self.warm_up else best).spread
        return ((signature - site.averages[:2]) / spread).square().mean().sqrt().item()

    def _open(self, seen: Tensor) -> None:
        if len(self._sites) == self.sites:
            # the last of those with the fewest images: the least recently used
            self._sites.remove(min(reversed(self._sites), key=lambda site: min(site.count, SETTLED)))
        self._sites.insert(0, _Site(0, seen, None))

    def _add(self, signature: Tensor) -> None:
        site = self._sites[0]
        if site.count >= self.warm_up:
            reach = CLIP * site.spread
            signature = site.averages[:2] + (signature - site.averages[:2]).clamp(-reach, reach)
        site.count += 1
        seen = torch.cat([signature, signature.square()])
        site.averages = torch.lerp(site.averages, seen, max(1 / site.count, 1 / self.horizon))

    def adaptation_state(self) -> dict[str, Any]:
        """Return the state: the sites, the current one first, which has nothing put aside."""
        return {"sites": [copy.deepcopy(vars(site)) for site in self._sites]}

    def check_adaptation_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless the state's sites fit; what was learnt there is for the method to check."""
        check_keys("memory", state, {"sites"})
        sites = state["sites"]
        if not isinstance(sites, list) or len(sites) > self.sites:
            raise ValueError(f"the memory's sites must be a list of at most {self.sites}")
        for place, site in enumerate(sites):
            check_keys("memory's site", site, {"count", "averages", "learnt"})
            check_number("number of a site's images", site["count"], least=1, whole=True)
            check_tensor("averages of a site", site["averages"])
            shape = tuple(site["averages"].shape)
            if len(shape) != 2 or shape[0] != 4 or shape != tuple(sites[0]["averages"].shape):
                raise ValueError(f"the state's averages of the sites do not match: shape {shape}")
            check_finite("averages of a site", site["averages"])
            if (site["learnt"] is None) != (place == 0):
                raise ValueError("each of the memory's sites but the current one must have something learnt")

    def load_adaptation_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`adaptation_state` returned.

        Raises:
            ValueError: if it does not fit; nothing is changed then.
        """
        self.check_adaptation_state(state)
        keys = ("count", "averages", "learnt")
        self._sites = [_Site(**{key: copy.deepcopy(site[key]) for key in keys}) for site in state["sites"]]


class Remembering(AdaptationMethod):
    """A method that keeps what it learns apart for each site.

    A subclass implements ``_learnt`` and ``_load_learnt``, has its norm layers in ``source_norms``, and calls
    :meth:`_visit` for each image before it learns from it.

    Args:
        network: see :class:`AdaptationMethod`.
        memory: ``default`` uses :class:`SiteMemory` with its defaults; with None all images count alike.
        output: see :class:`AdaptationMethod`.
    """

    def __init__(
        self, network: nn.Module, memory: SiteMemory | Literal["default"] | None, output: Output | None = None
    ) -> None:
        super().__init__(network, output)
        self.memory = SiteMemory() if memory == "default" else memory

    @abstractmethod
    def _learnt(self) -> dict[str, Any]:
        """Return a copy of what the method has learnt at the current site."""

    @abstractmethod
    def _load_learnt(self, learnt: dict[str, Any]) -> None:
        """Restore what ``_learnt`` returned; raise ValueError, without changing anything, if it does not fit."""

    def _visit(self, image: Tensor) -> bool:
        """Go to the image's site, and return whether it is another one; what was learnt there is restored."""
        if self.memory is None:
            return False
        norms = self.source_norms()
        if norms.signature is None:
            norms.sign(image)
        if norms.signature is None:
            return False  # no norm layer takes part
        learnt = self.memory.visit(norms.signature, self._learnt)
        if learnt is not None:
            self._load_learnt(learnt)
        return learnt is not None

    def _state_record(self) -> dict[str, Any]:
        return {} if self.memory is None else {"elsewhere": self.memory.is_elsewhere}

    def _reset(self) -> None:
        if self.memory is not None:
            self.memory.reset()

    def _state(self) -> dict[str, Any]:
        memory = {} if self.memory is None else {"memory": self.memory.adaptation_state()}
        return {**self._learnt(), **memory}

    def _completed(self, state: dict[str, Any]) -> dict[str, Any]:
        # states of version 0.1 have no memory
        fresh: dict[str, Any] = {} if self.memory is None else {"memory": {"sites": []}}
        return {**fresh, **state} if isinstance(state, dict) else state

    def _load_state(self, state: dict[str, Any]) -> None:
        before, sites = self._learnt(), []
        if self.memory is not None:
            self.memory.check_adaptation_state(state["memory"])
            sites = state["memory"]["sites"]
        try:
            for learnt in [*(site["learnt"] for site in sites[1:]), state]:
                self._load_learnt(learnt)
        except ValueError:
            self._load_learnt(before)
            raise
        if self.memory is not None:
            self.memory.load_adaptation_state(state["memory"])
