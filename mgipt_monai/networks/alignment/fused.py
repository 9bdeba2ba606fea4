# SPDX-License-Identifier: Apache-2.0
"""Statistics, normalisation and alignment loss of features in a few passes, whose gradient needs the features alone.

Plain autograd would hold a tensor of the features' size for each operation on them. Here the gradient is written out:
of ``normalised = scale * x + shift`` and the loss it is ``scale * upstream + slope * (x - mean) + constant``, with one
number of each per sample and channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Blend", "align", "alignment_loss", "calibrate", "instance_statistics"]


class Blend(NamedTuple):
    """What features are normalised with: given statistics, blended with the features' own (Eq. 6).

    Mean and variance of the blend are ``weight * given + (1 - weight) * own``. The gradient that flows through the
    features' own part follows from the same number, so the two cannot fall out of step.

    Attributes:
        mean: given mean, (C,) or (B, C).
        variance: given variance, same shape.
        weight: of the given statistics, lambda of Eq. 6, in [0, 1]; 0 leaves the features' own alone.
        fixed: whether the blend is taken as a constant: no gradient flows through it.
    """

    mean: Tensor
    variance: Tensor
    weight: float
    fixed: bool = False

    def statistics(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blend's mean and variance, given the features' own, (B, C) each."""
        return torch.lerp(mean, self.mean, self.weight), torch.lerp(variance, self.variance, self.weight)

    @property
    def slope(self) -> float:
        """Derivative of the blend's mean and variance with respect to the features' own."""
        return 0.0 if self.fixed else 1 - self.weight


def calibrate(
    mean: Tensor, std: Tensor, source_mean: Tensor, source_std: Tensor, source_weight: float
) -> tuple[Tensor, Tensor]:
    """Blend the image's statistics with the source's (Eq. 6).

    Args:
        mean: the image's mean (B, C).
        std: the image's standard deviation (B, C).
        source_mean: stored mean (C,).
        source_std: stored standard deviation (C,).
        source_weight: lambda in [0, 1]; 1 gives the source's statistics, 0 the image's.

    Returns:
        Mean and variance (B, C): ``lambda * source + (1 - lambda) * image``, for the mean and for the variance.
    """
    return Blend(source_mean, source_std.square(), source_weight).statistics(mean, std.square())


def instance_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample and channel over the spatial axes.

    Args:
        x: features (B, C, \\*spatial).

    Returns:
        Mean and standard deviation, each (B, C), differentiable once; the deviation with n - 1 in the denominator, zero
        for a single voxel. Its gradient is zero, not infinite, where a channel is constant.
    """
    return _Statistics.apply(x)


def alignment_loss(mean: Tensor, std: Tensor, source_mean: Tensor, source_std: Tensor) -> Tensor:
    """Distance of a layer's input statistics from the source's (Eq. 2).

    Args:
        mean: (B, C).
        std: (B, C).
        source_mean: (C,).
        source_std: (C,).

    Returns:
        One loss per sample (B,): mean over the channels of the absolute differences of mean and of deviation.
    """
    return (mean - source_mean).abs().mean(dim=1) + (std - source_std).abs().mean(dim=1)


def align(
    x: Tensor,
    layer: nn.Module,
    blend: Callable[[Tensor, Tensor], Blend | None],
    target: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Normalise features with statistics that their own have a part in, and measure their alignment loss.

    Args:
        x: features (B, C, \\*spatial).
        layer: the norm layer, for its ``eps``, ``weight`` and ``bias``; the latter two may be None.
        blend: from the features' mean and standard deviation, (B, C) each, to what is blended with them to normalise;
            None normalises with the features' own alone.
        target: from the features' mean and deviation to those to align with, taken as given; None measures no loss.

    Returns:
        Normalised features, and their loss (B,), see :func:`alignment_loss`, or None. Both are differentiable once,
        with respect to ``x`` and to the layer's weight and bias.

    Example:
        >>> x, layer = torch.rand(2, 3, 8, 8), nn.BatchNorm2d(3)
        >>> source = torch.zeros(3), torch.ones(3)
        >>> normalised, loss = align(x, layer, lambda mean, std: None, lambda mean, std: source)
        >>> torch.allclose(normalised.mean((2, 3)), torch.zeros(2, 3), atol=1e-5), loss.shape
        (True, torch.Size([2]))
    """
    return _Align.apply(x, layer.weight, layer.bias, layer.eps, blend, target)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = _measure(x, torch.empty_like(x))
        ctx.save_for_backward(x, mean, std)
        return mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mean_gradient: Tensor, std_gradient: Tensor) -> Tensor:
        x, mean, std = ctx.saved_tensors
        return _of_features(x, mean, mean_gradient, _of_variance(std_gradient, std), torch.empty_like(x))


class _Align(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        blend: Callable[[Tensor, Tensor], Blend | None],
        target: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> tuple[Tensor, Tensor | None]:
        normalised = torch.empty_like(x)
        mean, std = _measure(x, normalised)
        source_mean, source_std = (mean, std) if target is None else target(mean, std)
        loss = None if target is None else alignment_loss(mean, std, source_mean, source_std)
        given = blend(mean, std)
        own = mean, std.square()
        blended_mean, blended_variance = own if given is None else given.statistics(*own)
        inverse = torch.rsqrt(blended_variance + eps)
        scale = inverse if weight is None else inverse * weight
        shift = -blended_mean * scale if bias is None else torch.addcmul(bias, blended_mean, scale, value=-1)
        torch.mul(x, _over_space(scale, x), out=normalised).add_(_over_space(shift, x))
        ctx.save_for_backward(x, mean, std, source_mean, source_std, blended_mean, inverse, scale)
        ctx.slope = 1.0 if given is None else given.slope
        return normalised, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, of_loss: Tensor | None) -> tuple[Any, ...]:
        x, mean, std, source_mean, source_std, blended_mean, inverse, scale = ctx.saved_tensors
        space = tuple(range(2, x.ndim))
        of_shift = upstream.sum(space)
        scratch = torch.sub(x, _over_space(mean, x)).mul_(upstream)
        of_scale = torch.addcmul(scratch.sum(space), mean - blended_mean, of_shift)

        per_channel = 0 if of_loss is None else of_loss[:, None] / mean.shape[1]
        of_mean = (mean - source_mean).sign_() * per_channel
        of_variance = _of_variance((std - source_std).sign_() * per_channel, std)
        of_mean.addcmul_(of_shift, scale, value=-ctx.slope)
        of_variance.addcmul_(of_scale * scale, inverse.square(), value=-ctx.slope / 2)
        of_x = _of_features(x, mean, of_mean, of_variance, scratch).addcmul_(upstream, _over_space(scale, x))
        of_weight = (of_scale * inverse).sum(0) if ctx.needs_input_grad[1] else None
        of_bias = of_shift.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None, None


def _measure(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation; ``scratch``, of the features' shape, is overwritten."""
    space = tuple(range(2, x.ndim))
    mean = x.mean(space)
    # two passes, since the mean of squares less the squared mean loses digits where the mean is large
    torch.sub(x, _over_space(mean, x), out=scratch)
    return mean, (scratch.square_().sum(space) / max(x[0, 0].numel() - 1, 1)).sqrt_()


def _of_variance(std_gradient: Tensor, std: Tensor) -> Tensor:
    """Turn the gradient of the deviation into that of the variance, zero where a channel is constant."""
    return torch.where(std > 0, std_gradient / (2 * std), 0)


def _of_features(x: Tensor, mean: Tensor, mean_gradient: Tensor, variance_gradient: Tensor, out: Tensor) -> Tensor:
    """Return in ``out`` the gradient of the features, given those of their mean and variance (B, C)."""
    voxels = x[0, 0].numel()
    slope = variance_gradient * (2 / max(voxels - 1, 1))
    # centred first: of a channel that is nearly constant the slope is steep
    torch.sub(x, _over_space(mean, x), out=out).mul_(_over_space(slope, x))
    return out.add_(_over_space(mean_gradient / voxels, x))


def _over_space(values: Tensor, x: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (x.ndim - 2))
