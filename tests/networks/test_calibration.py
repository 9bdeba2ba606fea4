# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from mgipt_monai.networks import calibrate, instance_statistics
from mgipt_monai.networks.alignment.norms import check_normalization

SPATIAL = [(9,), (6, 7), (3, 4, 5)]


@pytest.mark.parametrize("spatial", SPATIAL)
def test_statistics_are_per_sample_and_channel_with_the_unbiased_deviation(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *spatial) * 4 + 7
    mean, std = instance_statistics(x)
    assert mean.shape == std.shape == (2, 3)
    for sample in range(2):
        for channel in range(3):
            values = x[sample, channel].double()
            assert mean[sample, channel].item() == pytest.approx(values.mean().item(), rel=1e-6)
            by_hand = (((values - values.mean()) ** 2).sum() / (values.numel() - 1)).sqrt()
            assert std[sample, channel].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_statistics_of_four_numbers_worked_by_hand() -> None:
    mean, std = instance_statistics(torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 2, 2))
    assert mean.item() == pytest.approx(3)
    assert std.item() == pytest.approx((14 / 3) ** 0.5)  # (4 + 1 + 0 + 9) / 3


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_deviation_of_a_single_voxel_is_zero(dims: int) -> None:
    x = torch.tensor([2.0, -5.0]).view(1, 2, *[1] * dims).requires_grad_()
    mean, std = instance_statistics(x)
    assert torch.equal(mean, torch.tensor([[2.0, -5.0]]))
    assert torch.equal(std, torch.zeros(1, 2))
    (gradient,) = torch.autograd.grad(std.sum() + mean.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, -700.1])
def test_gradient_is_finite_on_a_constant_channel(value: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 2, 6, 7)
    x[:, 0] = value
    x.requires_grad_()
    _, std = instance_statistics(x)
    assert std[0, 0].item() == pytest.approx(0, abs=abs(value) * 1e-6)
    (gradient,) = torch.autograd.grad((std - 1).abs().sum(), x)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1].abs().max() > 0


def test_calibration_ends_at_the_source_and_at_the_image() -> None:
    torch.manual_seed(0)
    mean, std, source_mean, source_std = torch.randn(2, 3), torch.rand(2, 3), torch.randn(3), torch.rand(3)
    at_source = calibrate(mean, std, source_mean, source_std, 1.0)
    at_image = calibrate(mean, std, source_mean, source_std, 0.0)
    assert torch.equal(at_source[0], source_mean.expand(2, 3))
    assert torch.equal(at_source[1], source_std.square().expand(2, 3))
    assert torch.equal(at_image[0], mean)
    assert torch.equal(at_image[1], std.square())


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_calibration_blends_means_and_variances_not_deviations(weight: float) -> None:
    torch.manual_seed(0)
    mean, std, source_mean, source_std = torch.randn(2, 3), torch.rand(2, 3), torch.randn(3), torch.rand(3) + 2
    blended_mean, blended_variance = calibrate(mean, std, source_mean, source_std, weight)
    torch.testing.assert_close(blended_mean, weight * source_mean + (1 - weight) * mean)
    torch.testing.assert_close(blended_variance, weight * source_std**2 + (1 - weight) * std**2)


def test_calibration_worked_by_hand() -> None:
    mean, variance = calibrate(
        torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([11.0]), torch.tensor([3.0]), 0.8
    )
    assert mean.item() == pytest.approx(9)  # .8 * 11 + .2 * 1
    assert variance.item() == pytest.approx(8)  # .8 * 9 + .2 * 4


@pytest.mark.parametrize("value", ["released", "", "Instance"])
def test_unknown_normalisation_is_refused_by_name(value: str) -> None:
    with pytest.raises(ValueError, match=rf"tuning must be one of instance, calibrated, source; got '{value}'"):
        check_normalization("tuning", value)
