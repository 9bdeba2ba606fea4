# SPDX-License-Identifier: Apache-2.0
"""Norm layers that normalise with what their site does to the features, instead of what one image does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .aligned_layer import AlignedLayer
from .alignment import AlignedNorms
from .calibration import calibrate
from .site_statistics import SiteStatistics

__all__ = ["SiteNorms"]


class _SiteLayer(AlignedLayer):
    def blend(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        norms, eps = self.norms, self.layer.eps
        if norms.normalization != "calibrated" or norms.site is None:
            return super().blend(mean, std)
        # deviations with eps, as the layer takes them: a channel that is silent in the source divides by something too
        source = self.layer.running_mean, (self.layer.running_var + eps).sqrt()
        std = (std.square() + eps).sqrt()
        if norms.looks:
            norms.site.look(self.name, mean, std, *source)
        mean, variance = calibrate(mean, std, *norms.site.correct(self.name, *source), 1 - norms.image_share)
        return mean, variance - eps

    def share(self) -> float:
        return super().share() if self.norms.site is None else self.norms.image_share


class SiteNorms(AlignedNorms):
    """Batch norms of a frozen network that, while :meth:`calibrated_to` a site, normalise ``calibrated`` with its part.

    Otherwise they are :class:`AlignedNorms`, whose ``calibrated`` blends the image's statistics with the source's.

    Example:
        >>> import torch
        >>> norms = SiteNorms(torch.nn.Sequential(torch.nn.BatchNorm2d(3)).eval())
        >>> site = SiteStatistics(caution=0)
        >>> with norms.calibrated_to(site, looks=True):
        ...     features = norms.predict(torch.rand(1, 3, 8, 8), "calibrated")
        >>> features.mean().abs().item() < 1e-5  # one image and no caution: its own statistics
        True
    """

    layer_forward = _SiteLayer

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.site: SiteStatistics | None = None
        self.looks = False
        self.image_share = 0.0

    @contextmanager
    def calibrated_to(self, site: SiteStatistics, looks: bool = False, image_share: float = 0.0) -> Iterator[None]:
        """Normalise ``calibrated`` with a site's statistics meanwhile.

        Args:
            site: what is known of the site.
            looks: whether each layer shows the site what it sees first, of one image or of windows of it.
            image_share: weight of the image's own statistics beside the site's (1 - lambda of Eq. 6, with the site in
                the source's place), in [0, 1].
        """
        self.site, self.looks, self.image_share = site, looks, image_share
        try:
            yield
        finally:
            self.site, self.looks, self.image_share = None, False, 0.0
