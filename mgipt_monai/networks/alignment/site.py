# SPDX-License-Identifier: Apache-2.0
"""Site statistics, which separate a site's effect on features from image content, and norm layers that correct it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mgipt_monai.networks.alignment.fused import Blend, instance_statistics, normalize
from mgipt_monai.networks.alignment.layers import stored_statistics
from mgipt_monai.networks.alignment.norms import AlignedNorms
from mgipt_monai.networks.alignment.site_rule import SiteRule
from mgipt_monai.networks.alignment.windows import ForwardRoute, Windows
from mgipt_monai.utils.state_checks import check_finite, check_keys, check_number, check_tensor, is_whole

__all__ = ["SiteNorms", "SiteStatistics"]

FARTHEST = 3.0
"""Bound on the logarithm of a deviation's ratio to the source's, so that a silent channel is not infinitely far."""

SOURCE_IMAGES = 10
"""Number of a site's images that weigh as much as a rule's source images where their spread is concerned."""


def distances(mean: Tensor, std: Tensor, source_mean: Tensor, source_std: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far statistics (B, C) are from the source's (C,): ``z`` and ``r`` of :class:`SiteStatistics`."""
    return (mean - source_mean) / source_std, (std / source_std).log().clamp(-FARTHEST, FARTHEST)


class SiteStatistics(nn.Module):
    """Running statistics of a site's images, and how much of their distance from the source is due to the site.

    One image's statistics say little about its site: they also reflect image content, such as the size of a structure,
    and normalising with them removes that content. So for each channel of a layer the distances of the images from the
    source, ``z = (mean - source_mean) / source_std`` and ``r = log(std / source_std)``, are averaged along the stream,
    and so are their squares. The averages are the shift; the images' deviation from them is the spread. The network
    copes with a shift that is small compared with the spread, since source images vary as well. Each layer is therefore
    corrected by a share of its shift::

        share = n / (n + caution) * shift^2 / (shift^2 + spread^2)

    where n is the number of images seen, and both squares are averaged over the channels, z and r together. The part
    expected by chance, ``spread^2 / n``, is first subtracted from ``shift^2``. The share is 0 where images scatter
    around the source, and tends to 1 where all differ from it in the same direction.

    The averages are plain means for the first ``horizon`` images. From then on the latest image has the weight
    ``1 / horizon``, so that they follow a stream to its next site.

    With a ``rule``, the part of each image's distance that its content explains is taken off first, and the spread of
    source images stands in for that of the site until enough of its images are seen. Without one, the first image's
    share is 1 / (1 + caution) whatever it shows.

    Args:
        horizon: number of images, at least 2.
        caution: number of source images that the site's images are weighed against, at least 0.

    Raises:
        ValueError: for a setting out of range.

    Attributes:
        rule: what in the network's features is content, see :class:`SiteRule`; None takes all for appearance.

    Example:
        >>> site = SiteStatistics()
        >>> source_mean, source_std = torch.zeros(2), torch.ones(2)
        >>> for _ in range(40):
        ...     site.begin()
        ...     site.observe("norm", torch.full((1, 2), 3.0), torch.ones(1, 2), source_mean, source_std)
        ...     mean, std = site.correct("norm", source_mean, source_std)
        ...     site.end()
        >>> mean[0].item() > 2.7, round(site.evidence, 2)
        (True, 0.95)
    """

    def __init__(self, horizon: int = 20, caution: float = 2.0) -> None:
        super().__init__()
        if not is_whole(horizon) or horizon < 2:
            raise ValueError(f"horizon must be a whole number of images from 2, got {horizon}")
        if not 0 <= caution < float("inf"):
            raise ValueError(f"caution must be at least 0 images, got {caution}")
        self.horizon, self.caution = int(horizon), float(caution)
        self.rule: SiteRule | None = None
        self.reset()

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"horizon={self.horizon}, caution={self.caution}"

    def reset(self) -> None:
        """Forget the site."""
        self._count = 0
        self._averages: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._observed: dict[str, int] = {}
        self._shares: dict[str, Tensor] = {}
        self._corrected: dict[str, tuple[Tensor, Tensor]] = {}
        self._compared: dict[str, tuple[Tensor, Tensor]] = {}

    def begin(self) -> None:
        """Start an image; an image that was started before without :meth:`end` is discarded."""
        self._latest, self._observed, self._shares, self._corrected, self._compared = {}, {}, {}, {}, {}

    def observe(self, name: str, mean: Tensor, std: Tensor, source_mean: Tensor, source_std: Tensor) -> None:
        """Add a layer's input statistics of the current image, for the whole image or some of its windows.

        Args:
            name: the layer's name.
            mean: mean of the layer's input, (B, C), for each of B windows; those of an image count alike.
            std: its standard deviation, (B, C), above 0.
            source_mean: (C,).
            source_std: (C,), above 0.
        """
        z, r = distances(mean, std, source_mean, source_std)
        if self.rule is not None:
            z, r = self.rule.layers[name].appearance(z, r)
        seen = torch.stack([z, r, z.square(), r.square()]).mean(dim=1)
        before = self._observed.get(name, 0)
        count = self._observed[name] = before + len(mean)
        self._latest[name] = torch.lerp(self._latest[name], seen, len(mean) / count) if before else seen
        self._corrected.pop(name, None)

    def correct(
        self, name: str, source_mean: Tensor, source_std: Tensor, source_spread: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean and deviation of a layer's input at the site, moved from the source's by the layer's share.

        Args:
            name: the layer's name; it must have been observed, for the current image or an earlier one.
            source_mean: (C,).
            source_std: (C,), above 0.
            source_spread: squared spread of the source's images in z and r, (2, C) or (2, 1), which counts beside the
                site's own; None takes the rule's, if there is one.

        Returns:
            Mean and deviation to normalise with, each (C,).
        """
        if name in self._corrected:
            return self._corrected[name]
        averages = self._with_latest(name).to(source_mean.device)  # those of a state are on the CPU
        shift, spread = averages[:2], (averages[2:] - averages[:2].square()).clamp(min=0)
        seen = self._count + (name in self._latest)
        # an exponential average is worth that many images; a single image has no spread
        effective = min(seen, 2 * self.horizon - 1)
        if source_spread is None and self.rule is not None:
            source_spread = self.rule.layers[name].spread.to(spread).view_as(spread)
        if source_spread is not None:  # the site's own counts for more with each image
            spread = (SOURCE_IMAGES * source_spread + effective * spread) / (SOURCE_IMAGES + effective - 1)
        elif effective > 1:
            spread = spread * effective / (effective - 1)
        square = (shift.square() - spread / effective).mean().clamp(min=0)
        noise = spread.mean()
        share = square / (square + noise).clamp(min=1e-12) * seen / (seen + self.caution)
        self._shares[name], self._compared[name] = share, (noise, square)
        z, r = share * shift
        self._corrected[name] = source_mean + source_std * z, source_std * r.exp()
        return self._corrected[name]

    def _with_latest(self, name: str) -> Tensor:
        latest = self._latest.get(name)
        if latest is None:
            return self._averages[name]
        if name not in self._averages:
            return latest
        return torch.lerp(self._averages[name].to(latest.device), latest, max(1 / (self._count + 1), 1 / self.horizon))

    def shift(self, name: str) -> Tensor:
        """Return the average distance z of a layer's means from the source's, (C,), with the current image's."""
        return self._with_latest(name)[0]

    def beyond(self, name: str) -> float:
        """Return how much of a layer's squared shift is beyond the spread, ``1 - spread^2 / shift^2``, at least 0."""
        noise, square = self._compared[name]
        return (1 - noise / square.clamp(min=1e-12)).clamp(min=0).item()

    @property
    def layers(self) -> list[str]:
        """Names of the layers that the averages are of."""
        return list(self._averages)

    @property
    def is_settled(self) -> bool:
        """Whether the averages are over as many images as they will ever be."""
        return self._count >= self.horizon

    @property
    def evidence(self) -> float:
        """Mean share over the layers for the current image, in [0, 1): the evidence for another site."""
        return torch.stack(list(self._shares.values())).mean().item() if self._shares else 0.0

    def end(self) -> None:
        """Add the current image to the averages."""
        self._averages = {**self._averages, **{name: self._with_latest(name) for name in self._latest}}
        self._count += 1
        self._corrected = {}

    def adaptation_state(self) -> dict[str, Any]:
        """Return the state: the number of images, and four averages per channel of each layer."""
        return {"count": self._count, "averages": {name: a.cpu().clone() for name, a in self._averages.items()}}

    def load_adaptation_state(self, state: dict[str, Any], channels: dict[str, int]) -> None:
        """Restore what :meth:`adaptation_state` returned.

        Args:
            state: the state.
            channels: number of channels of each layer that may be in it.

        Raises:
            ValueError: if it does not fit; nothing is changed then.
        """
        check_keys("site statistics", state, {"count", "averages"})
        check_number("count", state["count"], least=0, whole=True)
        check_keys("averages", state["averages"], set())
        for name, averages in state["averages"].items():
            if name not in channels:
                raise ValueError(f"the state has averages of a layer {str(name)[:60]!r} that is not aligned")
            check_tensor(f"averages of {name}", averages)
            if averages.shape != (4, channels[name]):
                shape = tuple(averages.shape)
                raise ValueError(f"the state's averages of {name} have the shape {shape}, not {(4, channels[name])}")
            check_finite(f"averages of {name}", averages)
        if bool(state["count"]) != bool(state["averages"]):
            raise ValueError(f"the state has {state['count']} images but averages of {len(state['averages'])} layers")
        self.begin()
        self._count = state["count"]
        self._averages = {name: averages.clone() for name, averages in state["averages"].items()}


class SiteNorms(AlignedNorms):
    """Batch norms of a frozen network; within :meth:`corrected_to`, ``calibrated`` uses a site's statistics.

    Otherwise they act like :class:`AlignedNorms`, whose ``calibrated`` blends the image's statistics with the source's.

    Example:
        >>> import torch
        >>> norms = SiteNorms(torch.nn.Sequential(torch.nn.BatchNorm2d(3)).eval())
        >>> site = SiteStatistics(caution=0)
        >>> with norms.corrected_to(site, observe=True):
        ...     features = norms.predict(torch.rand(1, 3, 8, 8), "calibrated")
        >>> features.mean().abs().item() < 1e-5  # one image and no caution: its own statistics
        True
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.site: SiteStatistics | None = None
        self.observe = False
        self.image_share: Sequence[float] | float = 0.0
        self.strength = 1.0

    @contextmanager
    def corrected_to(
        self,
        site: SiteStatistics,
        observe: bool = False,
        image_share: Sequence[float] | float = 0.0,
        strength: float = 1.0,
    ) -> Iterator[None]:
        """Use a site's statistics for ``calibrated`` within the block.

        Args:
            site: the site's statistics.
            observe: whether each layer first adds its input's statistics to the site's, for an image or its windows.
            image_share: weight of the image's own statistics in a blend with the site's (1 - lambda of Eq. 6, with the
                site in the source's place), in [0, 1]. With several, the images of a batch are as many equal groups,
                with a share each and without gradients.
            strength: how far the source's statistics move to the site's, in [0, 1].
        """
        self.site, self.observe, self.image_share, self.strength = site, observe, image_share, strength
        try:
            yield
        finally:
            self.site, self.observe, self.image_share, self.strength = None, False, 0.0, 1.0

    def known_evidence(self, site: SiteStatistics) -> float:
        """Return the evidence of the images that a site has seen so far, without another."""
        site.begin()
        for name in site.layers:
            site.correct(name, *self._source(name))
        return site.evidence

    def look(self, image: Tensor) -> None:
        """Run the network in the windows that are looked at, two at once, which is faster than one by one."""
        windows = list(Windows(ForwardRoute(), image).cut(image) if self.windows is None else self.windows.cut(image))
        for i in range(0, len(windows), 2):
            self.run(torch.cat(windows[i : i + 2]), "calibrated")

    def align(self, name: str, features: Tensor) -> Tensor:
        """Normalise a layer's features (B, C, \\*spatial), and measure them only where that is needed."""
        measures = self.observe or self.losses is not None or self._signs is not None or torch.is_grad_enabled()
        if self.normalization != "calibrated" or self.site is None or measures:
            return super().align(name, features)
        shares = [self.image_share] if isinstance(self.image_share, (int, float)) else self.image_share
        means, variances = [], []
        for share, group in zip(shares, features.chunk(len(shares)), strict=True):
            mean, variance = (each.expand(len(group), -1) for each in self._site_statistics(name, self.site))
            if share:
                own_mean, own_std = instance_statistics(group.float())
                mean = torch.lerp(own_mean, mean, 1 - share)
                variance = torch.lerp(own_std.square(), variance, 1 - share)
            means.append(mean)
            variances.append(variance)
        features = features if features.dtype == torch.bfloat16 else features.float()
        return normalize(features, self.layers[name], torch.cat(means), torch.cat(variances))

    def blend(self, name: str, mean: Tensor, std: Tensor) -> Blend | None:
        """Return the site's statistics, blended with the image's own by ``image_share``."""
        if self.normalization != "calibrated" or self.site is None:
            return super().blend(name, mean, std)
        if self.observe:
            self.site.observe(name, mean, (std.square() + self._eps(name)).sqrt(), *self._source(name))
        assert isinstance(self.image_share, (int, float))  # several go without gradients, by align
        return Blend(*self._site_statistics(name, self.site), 1 - self.image_share)

    def _site_statistics(self, name: str, site: SiteStatistics) -> tuple[Tensor, Tensor]:
        """Return the site's mean and variance at a layer."""
        source_mean, source_std = self._source(name)
        mean, std = site.correct(name, source_mean, source_std)
        if self.strength < 1:
            mean = torch.lerp(source_mean, mean, self.strength)
            std = source_std * (std / source_std).pow(self.strength)
        return mean, std.square() - self._eps(name)

    def _source(self, name: str) -> tuple[Tensor, Tensor]:
        # deviations include eps, as in the layer, so that silent source channels do not divide by zero
        mean, variance = stored_statistics(self.layers[name])
        return mean.float(), (variance.float() + self._eps(name)).sqrt()

    def _eps(self, name: str) -> float:
        return self.layers[name].eps  # type: ignore[return-value] # any norm layer has one
