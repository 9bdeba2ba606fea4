# SPDX-License-Identifier: Apache-2.0
"""The look of images: tone and low-frequency amplitudes, compared with the source's and corrected in the image.

Instance, group and layer norm take an image's own mean and deviation away, so inside such a network these say nothing
about its scanner. The look is measured in the image instead, as a few numbers per channel: the quantiles of its values
(its tone), and the amplitudes of its lowest frequencies, as those that a prompt multiplies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgipt_monai.networks.prompts.frequency import LowFrequencies, prompt_offset, short_axis
from mgipt_monai.utils.state_checks import check_finite, check_keys, check_tensor

if TYPE_CHECKING:
    from mgipt_monai.networks.alignment.site import SiteStatistics

__all__ = [
    "FEWEST_IMAGES",
    "LookAverages",
    "RunningLook",
    "SiteLook",
    "SourceLook",
    "amplitudes",
    "change_amplitudes",
    "change_tone",
    "tone",
]

SIDE = 5
"""Number of low frequencies along each axis."""
LEVELS = 17
"""Number of quantiles."""
OUTERMOST = 0.002
"""Share of the values beyond the outermost quantiles, which are noise."""
MOST_VALUES = 2**18
"""Number of values that the quantiles of a channel are taken of, at most; a larger image is thinned out evenly."""
SLAB = 2**22
"""Number of values that are mapped at once, so that little memory is taken."""
TINY = 1e-6
"""Least amplitude."""
LEAST_SPREAD = 0.01
"""Least spread of the source images, in logarithms and in parts of the range of tones: what does not vary in them."""
UNKNOWN = 1e6
"""Spread of a frequency that no source image has."""
SPREAD = torch.tensor([[1.0], [0.0]])
"""Spread of the source's images in units of itself, of means and of deviations, of which there are none here."""
FEWEST_IMAGES = 10
"""Number of source images whose spread may be relied on."""


def _low(image: Tensor) -> LowFrequencies:
    return LowFrequencies(image, SIDE, offset=prompt_offset(image))


def amplitudes(image: Tensor) -> Tensor:
    """Return the logarithms of the lowest amplitudes, compared with the deviation of all that is finer.

    Args:
        image: (1, C, \\*spatial), at least 5 pixels wide along each axis; a volume may be thinner along one.

    Returns:
        (C, n): of each pair of opposite frequencies one, the zero frequency last; NaN for those that a thin volume
        lacks.

    Raises:
        ValueError: if the image is smaller.

    Example:
        >>> image = torch.rand(1, 3, 32, 32)
        >>> torch.allclose(amplitudes(image), amplitudes(2 * image), atol=1e-4)
        True
    """
    return _amplitudes(_low(image))


def _amplitudes(low: LowFrequencies) -> Tensor:
    rest = low.apply(low.coefficients.real.new_zeros(1, *low.shape)).flatten(2).std(dim=2)[0]
    found = low.coefficients[0].abs().clamp(min=TINY).log()
    found = found - rest.clamp(min=TINY).log().view(-1, *[1] * (found.ndim - 1))
    if low.short is not None:
        whole = found.new_full(low.shape, math.nan)
        whole.narrow(low.short - 1, low.zero, 1).copy_(found)
        found = whole
    found = found.flatten(1)
    return found[:, : found.shape[1] // 2 + 1]


def change_amplitudes(image: Tensor, change: Tensor) -> Tensor:
    """Add to the logarithms of an image's lowest amplitudes; phases stay.

    Args:
        image: (1, C, \\*spatial).
        change: (C, n), as from :func:`amplitudes`.

    Returns:
        The changed image, same shape.
    """
    return _changed(_low(image), change)


def _changed(low: LowFrequencies, change: Tensor) -> Tensor:
    return low.apply(torch.cat([change, change[:, :-1].flip(1)], dim=1).view(1, *low.shape).exp())


def tone(image: Tensor) -> Tensor:
    """Return the quantiles of each channel's values, without those that equal its darkest value, such as padding.

    Args:
        image: (1, C, \\*spatial).

    Returns:
        (C, 17), increasing.

    Example:
        >>> ramp = torch.linspace(0, 1, 1001).view(1, 1, 7, 11, 13)
        >>> round(tone(ramp)[0, 8].item(), 3)
        0.5
    """
    levels = torch.linspace(0, 1, LEVELS, device=image.device).clamp(OUTERMOST, 1 - OUTERMOST)
    found = []
    for values in image[0].flatten(1):
        darkest = values.min()
        thinned = values[:: max(1, math.ceil(len(values) / MOST_VALUES))]
        brighter = thinned[thinned > darkest]
        found.append(torch.quantile(brighter if len(brighter) else darkest[None], levels))
    return torch.stack(found)


def change_tone(image: Tensor, places: Tensor, change: Tensor) -> Tensor:
    """Add to an image's values what is given at some of them, interpolated between these and constant beyond.

    Args:
        image: (1, C, \\*spatial).
        places: the values, (C, n), increasing.
        change: what is added there, (C, n).

    Returns:
        The changed image, same shape.
    """
    result = torch.empty_like(image)
    for given, values, at, added in zip(image[0], result[0], places, change, strict=True):
        gaps = (at[1:] - at[:-1]).clamp(min=TINY)
        slopes = (added[1:] - added[:-1]) / gaps
        flat = values.view(-1)
        for start in range(0, flat.numel(), SLAB):
            value = given.reshape(-1)[start : start + SLAB]
            inside = value.clamp(at[0], at[-1])
            i = torch.bucketize(inside, at[1:-1].contiguous(), out_int32=True)
            flat[start : start + SLAB] = value + added[i] + slopes[i] * torch.minimum(inside - at[i], gaps[i])
    return result


@dataclass(frozen=True)
class LookAverages:
    """Mean and spread over the source images of one kind of numbers, (C, n) each, float32."""

    mean: Tensor
    spread: Tensor


@dataclass(frozen=True)
class SourceLook:
    """The look of the source images, a part of :class:`SourceStatistics`.

    Attributes:
        amplitudes: of :func:`amplitudes`.
        tone: of :func:`tone`.

    Raises:
        ValueError: at construction, for averages that are not finite 32-bit numbers, do not match, or have a negative
            spread.
    """

    amplitudes: LookAverages
    tone: LookAverages

    def __post_init__(self) -> None:
        for name, averages in vars(self).items():
            for value in vars(averages).values():
                check_tensor(f"look of the source, {name}", value)
                check_finite(f"look of the source, {name}", value)
            if averages.mean.ndim != 2 or averages.mean.shape != averages.spread.shape:
                raise ValueError(f"mean and spread of the source's {name} do not match")
            if (averages.spread < 0).any():
                raise ValueError(f"the source's {name} have a negative spread")
        if len(self.amplitudes.mean) != len(self.tone.mean) or self.tone.mean.shape[1] != LEVELS:
            raise ValueError("the channels or numbers of the source's look do not match")

    def content(self) -> dict[str, Any]:
        """Return what a file holds of it."""
        return {name: vars(averages) for name, averages in vars(self).items()}

    @classmethod
    def of(cls, content: Any) -> SourceLook:
        """Build it from what a file holds; ValueError if that does not fit."""
        check_keys("look of the source", content, {"amplitudes", "tone"})
        for averages in content.values():
            check_keys("look of the source", averages, {"mean", "spread"})
        return cls(
            **{name: LookAverages(content[name]["mean"], content[name]["spread"]) for name in ("amplitudes", "tone")}
        )


class RunningLook:
    """Running sums of the looks of images and their squares, in double precision."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._is_small = False

    def add(self, image: Tensor) -> None:
        """Add an image (1, C, \\*spatial); one that is too small leaves the source without a look."""
        try:
            short_axis(image, SIDE)
            self._is_small |= image.ndim < 3
        except ValueError:
            self._is_small = True
        if self._is_small:
            return
        for name, found in (("amplitudes", amplitudes(image)), ("tone", tone(image))):
            value = found.double().cpu()
            known = value.isfinite()
            value = value.where(known, torch.zeros_like(value))
            seen = torch.stack([known.double(), value, value.square()])
            self._sums[name] = self._sums[name] + seen if name in self._sums else seen

    def look(self) -> SourceLook | None:
        """Return the images' look, or None if one was too small."""
        if self._is_small or not self._sums:
            return None
        found = {}
        for name, (count, total, squares) in self._sums.items():
            mean = total / count.clamp(min=1)
            variance = (squares - count * mean.square()) / (count - 1).clamp(min=1)
            spread = torch.where(count > 0, variance.clamp(min=0).sqrt(), UNKNOWN)
            found[name] = LookAverages(mean.float(), spread.float())
        return SourceLook(**found)


class SiteLook:
    """Corrects the look of a site's images as far as it is beyond what the source's images vary in.

    First the amplitudes are corrected, then the tone of the result. A site's mean look is compared with the source's
    in spreads of the source's images. What is beyond the spread, ``1 - spread^2 / shift^2``, opens a gate: below a half
    partly, from a half on fully. Through it each image is changed by the site's share of its shift, see
    :class:`SiteStatistics`, which keeps the averages.

    Args:
        source: the look of the source's images.

    Example:
        >>> from mgipt_monai.networks import SiteStatistics
        >>> images = [torch.rand(1, 1, 16, 16) for _ in range(10)]
        >>> running = RunningLook()
        >>> for image in images:
        ...     running.add(image)
        >>> look, site = SiteLook(running.look()), SiteStatistics(caution=0)
        >>> site.begin()
        >>> corrected, beyond = look.correct(images[0] ** 3, site)
        >>> beyond > 0.9, (corrected - images[0]).abs().mean() < (images[0] ** 3 - images[0]).abs().mean()
        (True, tensor(True))
    """

    def __init__(self, source: SourceLook) -> None:
        self._source: dict[str, tuple[Tensor, Tensor]] = {}
        for name, averages in vars(source).items():
            scale = averages.mean[:, -1:] - averages.mean[:, :1] if name == "tone" else 1.0
            least = torch.as_tensor(LEAST_SPREAD * scale).clamp(min=TINY)
            self._source[name] = averages.mean, torch.maximum(averages.spread, least.expand_as(averages.spread))

    @property
    def numbers(self) -> dict[str, int]:
        """How many numbers of an image are averaged, by the names under which the site keeps them."""
        return {name: mean.numel() for name, (mean, _) in self._source.items()}

    def correct(self, image: Tensor, site: SiteStatistics) -> tuple[Tensor, float]:
        """Add an image's look to the site's and correct it.

        Args:
            image: (1, C, \\*spatial), unadapted.
            site: the site's averages, in which an image was started.

        Returns:
            The corrected image, and what of the site's shift is beyond the source's spread, in [0, 1).

        Raises:
            ValueError: for an image with other axes or channels than the source's, or one that is too small.
        """
        low = _low(image)
        _, change, first = self._compare("amplitudes", _amplitudes(low), site)
        if change.any():
            image = _changed(low, change)
        places, change, second = self._compare("tone", tone(image), site)
        if change.any():
            image = change_tone(image, places, change)
        return image, max(first, second)

    def _compare(self, name: str, found: Tensor, site: SiteStatistics) -> tuple[Tensor, Tensor, float]:
        """Return the site's mean (C, n), what corrects it, and how much of it is beyond the source's spread."""
        mean, spread = (each.to(found.device) for each in self._source[name])
        if found.shape != mean.shape:
            raise ValueError(
                f"the image has {name} of shape {tuple(found.shape)}, the source's images of {tuple(mean.shape)}: "
                "measure the source statistics again with images like these"
            )
        found = found.where(found.isfinite(), mean)
        source = mean.flatten(), spread.flatten()
        site.observe(name, found.view(1, -1), source[1][None], *source)
        corrected, _ = site.correct(name, *source, source_spread=SPREAD.to(found.device))
        beyond = site.beyond(name)
        shift = site.shift(name).view_as(mean) * spread
        return mean + shift, min(1.0, 2 * beyond) * (mean - corrected.view_as(mean)), beyond
