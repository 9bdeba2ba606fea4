# SPDX-License-Identifier: Apache-2.0
"""Learn the rule of site correction for one network from its own labelled source images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import torch
from monai.inferers import Inferer, SimpleInferer
from monai.metrics import compute_dice
from monai.networks.layers import GaussianFilter
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.nn import functional

from mgipt_monai.methods.site_correction import IMAGE_SHARE
from mgipt_monai.networks.alignment.layers import NEEDS_BATCH_NORM, evaluating, find_norm_layers
from mgipt_monai.networks.alignment.site import SiteNorms, SiteStatistics, distances
from mgipt_monai.networks.alignment.site_rule import LayerContent, SiteRule, window_of
from mgipt_monai.networks.alignment.windows import ForwardRoute, Output, Windows
from mgipt_monai.networks.prompts.early_stop import Head, binarize, check_head
from mgipt_monai.utils.provenance import fingerprint
from mgipt_monai.utils.state_checks import is_whole

__all__ = ["SimulatedSite", "learn_site_rule"]

logger = logging.getLogger(__name__)

TRUSTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
"""Those tried. Real sites harm more than simulated ones, so the largest is one that no real site measured forbids."""
LEAST_IMAGES = 12
SMALLEST = 1e-4
"""Added to a structure's share of the image, so that an absent one has a logarithm."""


class SimulatedSite:
    """The look of an imaginary site: tone curve, gain of each channel, uneven light, blur and noise, all fixed.

    The range of an image's intensities stays as it was.

    Args:
        seed: chooses the site.
        severity: 0 leaves images as they are, 1 is a clearly different camera or scanner, 2 an extreme one.
        channels: number of image channels.
        dims: number of spatial axes.

    Example:
        >>> site = SimulatedSite(seed=1, severity=1.0, channels=3, dims=2)
        >>> image = torch.rand(1, 3, 16, 16)
        >>> changed = site(image)
        >>> changed.shape, torch.equal(changed, image)
        (torch.Size([1, 3, 16, 16]), False)
    """

    def __init__(self, seed: int, severity: float, channels: int, dims: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=self._generator) * 2 - 1

        gain = draw(channels) if channels > 1 else torch.zeros(1)
        self.gain = (0.35 * severity * gain).exp().view(1, -1, *[1] * dims)
        self.gamma = math.exp(0.6 * severity * draw(1).item())
        self.sigma = 1.5 * severity * abs(draw(1).item())
        self.noise = 0.04 * severity * abs(draw(1).item())
        self.light = 0.5 * severity * draw(1, channels, *[3] * dims)

    def __call__(self, image: Tensor) -> Tensor:
        """Return an image (1, C, \\*spatial) as the site would show it."""
        lowest, highest = image.min(), image.max()
        changed = ((image - lowest) / (highest - lowest).clamp(min=1e-6)) ** self.gamma * self.gain.to(image)
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[image.ndim - 2]
        light = functional.interpolate(self.light.to(image), size=image.shape[2:], mode=mode, align_corners=True)
        changed = changed * light.exp()
        if self.sigma > 0.1:
            changed = GaussianFilter(image.ndim - 2, self.sigma).to(image.device)(changed)
        changed = changed + self.noise * torch.randn(image.shape, generator=self._generator).to(image)
        changed = (changed - changed.min()) / (changed.max() - changed.min()).clamp(min=1e-6)
        return changed * (highest - lowest) + lowest


@dataclass(frozen=True)
class _Stream:
    """A simulated stream: images of the source, as they are or as another site would show them."""

    name: str
    chosen: Sequence[int]
    look: Callable[[Tensor], Tensor] | None = None


def learn_site_rule(
    network: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    head: Head = "sigmoid",
    severities: Sequence[float] = (0.5, 1.0),
    sites: int = 3,
    length: int = 12,
    harm: float = 0.1,
    limit: int = 200,
    seed: int = 0,
    output: Output | None = None,
    inferer: Inferer | None = None,
    windows: int = 2,
) -> SiteRule:
    """Learn the rule of site correction from labelled source images; the network stays as it is.

    The images show how the network's features vary with the structures' sizes (:meth:`LayerContent.measure`). How far
    the evidence may be trusted is tried on simulated streams: with what every second image shows, on the others. Some
    streams differ in content alone: the images with the smallest and with the largest structures, and a random choice.
    The others are shown as by :class:`SimulatedSite`. The trust is the largest, and at most 2, with which at most
    ``harm`` of the images lose more than a point of DSC, in the streams of either kind.

    Args:
        network: the source network, with batch norm that stores its statistics.
        batches: dicts with ``image`` (B, C, \\*spatial) and ``label``: a channel in [0, 1] for each structure, at the
            image's size; at least 12 images, better a hundred.
        head: ``sigmoid`` or ``softmax``, whose first channel is the background.
        severities: of the simulated sites.
        sites: number of simulated sites of each severity.
        length: largest number of images of a stream, at least 2.
        harm: share of images that may lose more than a point, in [0, 1].
        limit: at most this number of images is read.
        seed: chooses sites and images.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.
        inferer: a ``SlidingWindowInferer`` or ``SliceInferer`` for a network that is shown windows; the rule then holds
            for windows of this size. None shows it whole images.
        windows: number of windows of an image that the site is told from, as in adaptation.

    Returns:
        The rule, for :class:`SiteCorrection`.

    Raises:
        ValueError: for a setting out of range, too few images, labels that do not fit, or a network without usable norm
            layers.
    """
    check_head(head)
    for setting, value, least in (("sites", sites, 0), ("length", length, 2), ("limit", limit, LEAST_IMAGES)):
        if not is_whole(value) or value < least:
            raise ValueError(f"{setting} must be a whole number from {least}, got {value!r}")
    if not 0 <= harm <= 1:
        raise ValueError(f"harm must be in [0, 1], got {harm}")
    if not all(0 < severity <= 3 for severity in severities):
        raise ValueError(f"severities must be above 0 and at most 3, got {list(severities)}")
    find_norm_layers(network, None, NEEDS_BATCH_NORM)
    items = list(_pairs(batches, next(chain(network.parameters(), network.buffers())).device, limit))
    if len(items) < LEAST_IMAGES:
        raise ValueError(f"a rule takes at least {LEAST_IMAGES} labelled source images, got {len(items)}")
    route = ForwardRoute(output=output)
    route.change(SimpleInferer() if inferer is None else inferer, windows)
    norms = SiteNorms(network, route=route)
    try:
        with evaluating(network), torch.no_grad(), torch.autocast(items[0][0].device.type, enabled=False):
            statistics, sizes, second = _statistics(norms, items)
            half = {name: LayerContent.measure(seen[~second], sizes[~second]) for name, seen in statistics.items()}
            rule = SiteRule(half, TRUSTS[0], len(items), fingerprint(network), window_of(route.inferer))
            tried = items[1::2]
            content, looks = _streams(tried, severities, sites, length, seed)
            losses = [
                torch.cat([_losses(norms, rule, tried, stream, head) for stream in streams]) if streams else None
                for streams in (content, looks)
            ]
    finally:
        norms.detach()
    trusted = [TRUSTS[0]]
    for i, trust in enumerate(TRUSTS):
        shares = [(each[:, i] > 1).double().mean().item() for each in losses if each is not None]
        logger.info("trust %g: of the images, %s lose more than a point", trust, ", ".join(f"{s:.0%}" for s in shares))
        if max(shares) > harm:
            break
        trusted.append(trust)
    layers = {name: LayerContent.measure(seen, sizes) for name, seen in statistics.items()}
    return replace(rule, layers=layers, trust=trusted[-1])


def _pairs(batches: Iterable[Mapping[str, Any]], device: torch.device, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield image (1, C, \\*spatial) and label (1, K, \\*spatial) of each source image, on the network's device."""
    count = 0
    for batch in batches:
        images, labels = (convert_to_tensor(batch[key], dtype=torch.float32, track_meta=False) for key in _KEYS)
        if len(images) != len(labels) or images.shape[2:] != labels.shape[2:]:
            raise ValueError(f"images {tuple(images.shape)} and labels {tuple(labels.shape)} are not of the same size")
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            if count == limit:
                return
            if not torch.isfinite(image).all():
                raise ValueError(f"source image {count + 1} has NaN or infinite values: repair or remove it")
            count += 1
            yield image.to(device), label.to(device)


_KEYS = ("image", "label")


class _Statistics(SiteStatistics):
    """Site statistics that note those of each image or window, and correct nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[Tensor]] = {}

    def observe(self, name: str, mean: Tensor, std: Tensor, source_mean: Tensor, source_std: Tensor) -> None:
        """Note a layer's statistics."""
        seen = torch.cat(distances(mean, std, source_mean, source_std), dim=1)
        self.seen.setdefault(name, []).append(seen.cpu())

    def correct(
        self, name: str, source_mean: Tensor, source_std: Tensor, source_spread: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the source's."""
        return source_mean, source_std


def _statistics(norms: SiteNorms, items: Sequence[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Look at each image, whole or in the windows that the site is told from.

    Returns:
        Each layer's statistics of N images or windows, (N, 2C); the structures' sizes in them, (N, K); and whether each
        belongs to one of every second image, (N,).
    """
    statistics, sizes, second = _Statistics(), [], []
    for i, (image, label) in enumerate(items):
        norms.start(image)
        with norms.corrected_to(statistics, observe=True):
            norms.look(image)
        own = [_sizes(window) for window in cast(Windows, norms.windows).cut(label)]
        sizes += own
        second += [i % 2 == 1] * len(own)
    return {name: torch.cat(seen) for name, seen in statistics.seen.items()}, torch.cat(sizes), torch.tensor(second)


def _sizes(label: Tensor) -> Tensor:
    return (label.flatten(2).mean(dim=2) + SMALLEST).log().cpu()


def _streams(
    items: Sequence[tuple[Tensor, Tensor]], severities: Sequence[float], sites: int, length: int, seed: int
) -> tuple[list[_Stream], list[_Stream]]:
    """Return the streams that differ in content alone, and those of other sites."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(chosen: Sequence[int]) -> list[int]:
        return [chosen[i] for i in torch.randperm(len(chosen), generator=generator).tolist()]

    every = list(range(len(items)))
    content = [_Stream("as they are", shuffled(every)[:length])]
    part = min(length, max(2, len(items) // 3))
    for k, sizes in enumerate(torch.cat([_sizes(label) for _, label in items]).unbind(dim=1)):
        order = sizes.argsort(stable=True).tolist()
        content.append(_Stream(f"smallest structures {k}", shuffled(order[:part])))
        content.append(_Stream(f"largest structures {k}", shuffled(order[-part:])))
    image = items[0][0]
    looks = []
    for severity in severities:
        for _ in range(sites):
            own = int(torch.randint(2**31, (1,), generator=generator))
            look = SimulatedSite(own, severity, image.shape[1], image.ndim - 2)
            looks.append(_Stream(f"severity {severity:g}", shuffled(every)[:length], look))
    return content, looks


def _losses(
    norms: SiteNorms, rule: SiteRule, items: Sequence[tuple[Tensor, Tensor]], stream: _Stream, head: Head
) -> Tensor:
    """Return the points of DSC that each image of a stream loses with each trust, (N, trusts)."""
    site = SiteStatistics()
    site.rule = rule
    losses = []
    for i in stream.chosen:
        image, label = items[i]
        image = image if stream.look is None else stream.look(image)
        norms.start(image)
        site.begin()
        source = norms.predict(image)
        if rule.window is not None:
            with norms.corrected_to(site, observe=True):
                norms.look(image)
        with norms.corrected_to(site, observe=rule.window is None):
            corrected = norms.predict(image, "calibrated")
        evidence = site.evidence
        with norms.corrected_to(site, image_share=IMAGE_SHARE):
            own = norms.predict(image, "calibrated")
        site.end()
        adapted, before = (corrected + own) / 2, _dsc(source, label, head)
        after = [_dsc(torch.lerp(source, adapted, min(1.0, (t * evidence) ** 2)), label, head) for t in TRUSTS]
        losses.append(before - torch.stack(after))
    found = torch.stack(losses)
    logger.info("%s: evidence %.2f at the end", stream.name, evidence)
    return found


def _dsc(logits: Tensor, label: Tensor, head: Head) -> Tensor:
    """Return the mean DSC over the structures in percent, 100 for one that is absent and not found."""
    masks = binarize(logits, head)
    if masks.shape != label.shape:
        raise ValueError(f"{logits.shape[1]} output channels do not fit labels of {label.shape[1]} structures")
    return 100 * compute_dice(masks, (label > 0.5).float(), ignore_empty=False).mean()
