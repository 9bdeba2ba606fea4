# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mgipt_monai.networks import alignment_loss, calibrate, instance_statistics
from mgipt_monai.networks.alignment.fused import ROWS, Blend, align, normalize

SPATIAL = [(9,), (6, 7), (3, 4, 5)]
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
WEIGHTS = {"instance": 0.0, "calibrated": 0.8, "source": 1.0}


def norm_layer(dims: int, affine: bool = True, eps: float = 1e-5) -> nn.Module:
    layer = NORMS[dims](3, affine=affine, eps=eps).eval()
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.3, 3.0)
    if affine:
        nn.init.uniform_(layer.weight, 0.5, 2.0)
        nn.init.uniform_(layer.bias, -1.0, 1.0)
    return layer


def stored(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.running_mean, layer.running_var.sqrt()


def fused(x: Tensor, layer: nn.Module, weight: float) -> tuple[Tensor, Tensor]:
    mean, std = stored(layer)
    return align(x, layer, lambda m, s: Blend(mean, std.square(), weight), lambda m, s: (mean, std))


def plain(x: Tensor, layer: nn.Module, weight: float) -> tuple[Tensor, Tensor]:
    """The same, left to autograd."""
    shape = (*x.shape[:2], *[1] * (x.ndim - 2))
    std, mean = torch.std_mean(x.flatten(2), dim=2)
    blended_mean, variance = calibrate(mean, std, *stored(layer), weight)
    normalised = (x - blended_mean.view(shape)) / (variance.view(shape) + layer.eps).sqrt()
    if layer.affine:
        normalised = normalised * layer.weight.view(1, *shape[1:]) + layer.bias.view(1, *shape[1:])
    return normalised, alignment_loss(mean, std, *stored(layer))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_values_and_gradients_are_those_of_plain_autograd(weight: float, spatial: tuple, affine: bool) -> None:
    torch.manual_seed(0)
    layer = norm_layer(len(spatial), affine).double()
    x = (torch.randn(2, 3, *spatial, dtype=torch.double) * 3 + 1).requires_grad_()
    direction = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    made, expected = fused(x, layer, weight), plain(x, layer, weight)
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other)
    gradients, plain_gradients = (
        torch.autograd.grad((normalised * direction).sum() + 5 * loss[1], inputs)
        for normalised, loss in (made, expected)
    )
    for one, other in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_gradient_is_that_of_finite_differences(weight: float, spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = norm_layer(len(spatial)).double()
    x = torch.randn(2, 3, *spatial, dtype=torch.double, requires_grad=True)

    def with_parameters(x: Tensor, *_parameters: Tensor) -> tuple[Tensor, Tensor]:
        return fused(x, layer, weight)

    # the parameters are moved in place, so that the layer has the moved ones
    assert torch.autograd.gradcheck(with_parameters, (x, layer.weight, layer.bias))


def test_gradient_of_the_statistics_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(instance_statistics, x)


def test_no_gradient_passes_through_a_blend_that_is_taken_as_given() -> None:
    torch.manual_seed(0)
    layer, x = norm_layer(2, affine=False), torch.randn(1, 3, 5, 5, requires_grad=True)
    direction = torch.randn_like(x)
    normalised, loss = align(x, layer, lambda m, s: Blend(m, s.square(), 0.0, fixed=True))
    assert loss is None
    (gradient,) = torch.autograd.grad((normalised * direction).sum(), x)
    variance = x.detach().var((2, 3), keepdim=True)
    torch.testing.assert_close(gradient, direction / (variance + layer.eps).sqrt())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("spatial", SPATIAL)
def test_with_the_biased_variance_it_is_instance_norm(spatial: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    layer = norm_layer(len(spatial), affine)
    x = torch.randn(2, 3, *spatial) * 3 + 1
    voxels = x[0, 0].numel()
    made, _ = align(x, layer, lambda m, s: Blend(m, s.square() * (voxels - 1) / voxels, 1.0))
    expected = functional.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=layer.eps)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def test_with_the_sources_statistics_it_is_batch_norm() -> None:
    torch.manual_seed(0)
    layer, x = norm_layer(2, eps=0.1), torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(fused(x, layer, 1.0)[0], layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_constant_channel_gives_the_bias_and_a_finite_gradient(value: float) -> None:
    layer = norm_layer(2)
    x = torch.full((1, 3, 4, 4), value, requires_grad=True)
    normalised, loss = fused(x, layer, 0.0)
    torch.testing.assert_close(normalised, layer.bias.view(1, 3, 1, 1).expand(1, 3, 4, 4), atol=1e-3, rtol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    # the mean alone moves: its distance's sign, over 3 channels and 16 voxels
    expected = (x[0, :, 0, 0].detach() - layer.running_mean).sign() / 48
    torch.testing.assert_close(gradient[0, :, 2, 1], expected)


def test_deviation_keeps_its_digits_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 64, 64, generator=generator, dtype=torch.double).float() + 1000
    _, std = instance_statistics(x)
    assert std.item() == pytest.approx(x.double().std().item(), rel=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_features_stay_in_their_order_in_memory(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 7).contiguous(memory_format=memory_format).requires_grad_()
    normalised, loss = fused(x, norm_layer(2), 0.8)
    (gradient,) = torch.autograd.grad(normalised.square().sum() + loss.sum(), x)
    for each in (normalised, gradient):
        assert each.is_contiguous(memory_format=memory_format)


def test_nothing_of_the_features_size_is_held_for_the_gradient_but_themselves() -> None:
    x, held = torch.randn(1, 3, 32, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        fused(x, norm_layer(2), 0.8)
    large = [tensor for tensor in held if tensor.numel() >= x.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


def test_gradient_of_the_deviation_keeps_its_digits_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 32, 32, generator=generator) * 0.01 + 1000
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(wide.std(), wide)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(instance_statistics(x)[1].sum(), x)
    torch.testing.assert_close(gradient.double(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_given_statistics_need_one_pass(count: int, affine: bool, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    layer = norm_layer(2, affine, eps=0.1)
    x = (torch.randn(count, 3, 6, 7) * 3 + 1).contiguous(memory_format=layout)
    mean, variance = torch.randn(count, 3), torch.rand(count, 3) + 0.5
    expected = align(x, layer, lambda *_: Blend(mean, variance, 1.0))[0]
    made = normalize(x, layer, mean, variance)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    assert made.stride() == x.stride()
    half = normalize(x.bfloat16(), layer, mean, variance)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("count", [1, 2])
def test_statistics_of_large_features_with_channels_innermost(count: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(count, 8, 260, 200) * 2 + 5).contiguous(memory_format=torch.channels_last)
    assert x.numel() > 4 * ROWS
    mean, std = instance_statistics(x)
    expected = torch.std_mean(x.double().flatten(2), dim=2)[::-1]
    for one, other in zip((mean, std), expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=0, rtol=1e-6)
