# SPDX-License-Identifier: Apache-2.0
"""Fused statistics, normalisation and alignment loss of features, whose gradient needs only the features.

Plain autograd would keep a tensor of the features' size for each operation. Here the gradient is written out: for
``normalised = scale * x + shift`` and the loss it is ``scale * upstream + slope * (x - mean) + constant``, with one
number of each per sample and channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["Blend", "align", "alignment_loss", "calibrate", "instance_statistics", "normalize"]

ROWS = 2**16
"""Number of values that are squared at once where channels are innermost, so that they stay in the processor's cache.
Smaller features stay there anyway."""


class Blend(NamedTuple):
    """Statistics to normalise features with: given ones, blended with the features' own (Eq. 6).

    Mean and variance of the blend are ``weight * given + (1 - weight) * own``. The gradient through the features' own
    part uses the same weight, so the two stay consistent.

    Attributes:
        mean: given mean, (C,) or (B, C).
        variance: given variance, same shape.
        weight: weight of the given statistics, lambda of Eq. 6, in [0, 1]; 0 uses only the features' own.
        fixed: whether the blend is treated as a constant, through which no gradient flows.
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
    """Normalise features with a blend of given statistics and their own, and measure their alignment loss.

    Args:
        x: features (B, C, \\*spatial).
        layer: the norm layer, for its ``eps``, ``weight`` and ``bias``; the latter two may be None.
        blend: maps the features' mean and standard deviation, (B, C) each, to the blend to normalise with; a result of
            None normalises with the features' own statistics only.
        target: maps the features' mean and deviation to those to align with, treated as constants; None measures no
            loss.

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


def normalize(x: Tensor, layer: nn.Module, mean: Tensor, variance: Tensor) -> Tensor:
    """Normalise features with given statistics, in one pass over them and without measuring them.

    Args:
        x: features (B, C, \\*spatial).
        layer: the norm layer, for its ``eps``, ``weight`` and ``bias``; the latter two may be None.
        mean: float32, (B, C).
        variance: likewise.

    Returns:
        Normalised features, in the features' own precision.

    Example:
        >>> x, layer = torch.rand(2, 3, 8, 8), nn.BatchNorm2d(3)
        >>> mean, std = instance_statistics(x)
        >>> torch.allclose(normalize(x, layer, mean, std.square()), align(x, layer, lambda *_: None)[0], atol=1e-5)
        True
    """
    numbers = (layer.eps, layer.weight, layer.bias)
    eps, weight, bias = cast("tuple[float, Tensor | None, Tensor | None]", numbers)
    scale, shift = _scale_and_shift(mean, torch.rsqrt(variance + eps), weight, bias)
    if not x.is_contiguous():  # with the channels innermost
        return torch.addcmul(_over_space(shift, x), x, _over_space(scale, x)).to(x.dtype)
    # torch's batch norm is one pass; each sample's channel is a channel of its own
    nought, unit = torch.zeros_like(scale).flatten(), torch.ones_like(scale).flatten()
    channels = x.reshape(1, -1, *x.shape[2:])
    return functional.batch_norm(channels, nought, unit, scale.flatten(), shift.flatten(), eps=0.0).view(x.shape)


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
        variance_gradient = _variance_gradient(std_gradient, std)
        return _features_gradient(x, mean, mean_gradient, variance_gradient, torch.empty_like(x))


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
        scale, shift = _scale_and_shift(blended_mean, inverse, weight, bias)
        if x.is_contiguous():
            torch.mul(x, _over_space(scale, x), out=normalised).add_(_over_space(shift, x))
        else:  # faster with the channels innermost only
            torch.addcmul(_over_space(shift, x), x, _over_space(scale, x), out=normalised)
        ctx.save_for_backward(x, mean, std, source_mean, source_std, blended_mean, inverse, scale)
        ctx.slope = 1.0 if given is None else given.slope
        return normalised, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, loss_gradient: Tensor | None) -> tuple[Any, ...]:
        x, mean, std, source_mean, source_std, blended_mean, inverse, scale = ctx.saved_tensors
        space = tuple(range(2, x.ndim))
        shift_gradient = upstream.sum(space)
        scratch = torch.sub(x, _over_space(mean, x)).mul_(upstream)
        scale_gradient = torch.addcmul(scratch.sum(space), mean - blended_mean, shift_gradient)

        per_channel = 0 if loss_gradient is None else loss_gradient[:, None] / mean.shape[1]
        mean_gradient = (mean - source_mean).sign_() * per_channel
        variance_gradient = _variance_gradient((std - source_std).sign_() * per_channel, std)
        mean_gradient.addcmul_(shift_gradient, scale, value=-ctx.slope)
        variance_gradient.addcmul_(scale_gradient * scale, inverse.square(), value=-ctx.slope / 2)
        x_gradient = _features_gradient(x, mean, mean_gradient, variance_gradient, scratch)
        x_gradient.addcmul_(upstream, _over_space(scale, x))
        weight_gradient = (scale_gradient * inverse).sum(0) if ctx.needs_input_grad[1] else None
        bias_gradient = shift_gradient.sum(0) if ctx.needs_input_grad[2] else None
        return x_gradient, weight_gradient, bias_gradient, None, None, None


def _measure(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation; ``scratch``, with the features' shape, is overwritten."""
    space = tuple(range(2, x.ndim))
    mean = x.mean(space)
    # two passes: the mean of squares minus the squared mean loses digits if the mean is large
    if x.numel() > 4 * ROWS and x.ndim == 4 and not x.is_contiguous():
        rows = x.split(max(ROWS // (x.numel() // x.shape[2]), 1), dim=2)
        squares = torch.stack([(row - _over_space(mean, row)).square_().sum(space) for row in rows]).sum(dim=0)
    else:
        squares = torch.sub(x, _over_space(mean, x), out=scratch).square_().sum(space)
    return mean, (squares / max(x[0, 0].numel() - 1, 1)).sqrt_()


def _scale_and_shift(
    mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    scale = inverse if weight is None else inverse * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


def _variance_gradient(std_gradient: Tensor, std: Tensor) -> Tensor:
    """Convert the gradient of the deviation to that of the variance, zero where a channel is constant."""
    return torch.where(std > 0, std_gradient / (2 * std), 0)


def _features_gradient(
    x: Tensor, mean: Tensor, mean_gradient: Tensor, variance_gradient: Tensor, out: Tensor
) -> Tensor:
    """Return in ``out`` the gradient of the features, given those of their mean and variance (B, C)."""
    voxels = x[0, 0].numel()
    slope = variance_gradient * (2 / max(voxels - 1, 1))
    # centre first: the slope is steep where a channel is nearly constant
    torch.sub(x, _over_space(mean, x), out=out).mul_(_over_space(slope, x))
    return out.add_(_over_space(mean_gradient / voxels, x))


def _over_space(values: Tensor, x: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (x.ndim - 2))
