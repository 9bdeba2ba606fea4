# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgipt_monai.networks import PhotometricJitter

SHAPES = [(1, 1, 16), (1, 3, 16, 18), (1, 2, 8, 9, 7)]


def picture(low: float, high: float, shape: tuple[int, ...] = (1, 3, 16, 16)) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(shape) * (high - low) + low


def jittered(image: Tensor, seed: int, **settings: float) -> Tensor:
    return PhotometricJitter(**settings).set_random_state(seed=seed)(image)


@pytest.mark.parametrize("shape", SHAPES)
def test_same_seed_gives_the_same_view(shape: tuple[int, ...]) -> None:
    image = picture(0, 1, shape)
    first, again, other = (jittered(image, seed) for seed in (5, 5, 6))
    assert first.shape == image.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, image)


def test_calls_in_a_row_differ_and_can_be_replayed() -> None:
    image = picture(0, 1)
    jitter = PhotometricJitter().set_random_state(seed=1)
    views = [jitter(image), jitter(image)]
    assert not torch.equal(*views)
    jitter.set_random_state(seed=1)
    assert all(torch.equal(jitter(image), view) for view in views)


def test_global_random_state_is_neither_used_nor_moved() -> None:
    image = picture(0, 1)
    torch.manual_seed(0)
    first, drawn = jittered(image, 3), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(jittered(image, 3), first)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, -1), (-1000, 3000), (-0.5, 0.5), (100, 101)])
def test_view_stays_in_the_images_own_range(low: float, high: float) -> None:
    image = picture(low, high)
    for seed in range(30):
        view = jittered(image, seed, brightness=0.9, contrast=0.9)
        assert view.amin() >= image.amin()
        assert view.amax() <= image.amax()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, -1), (-1000, 3000)])
def test_brightness_scales_the_distance_from_the_minimum(low: float, high: float) -> None:
    image = picture(low, high)
    factors = []
    for seed in range(40):
        view = jittered(image, seed, contrast=0.0)
        inside = (view < image.amax() - 1e-3 * (high - low)) & (image > image.amin() + 0.1 * (high - low))
        ratio = (view - image.amin())[inside] / (image - image.amin())[inside]
        assert ratio.max() - ratio.min() < 1e-4
        factors.append(ratio.mean().item())
    assert 0.8 - 1e-4 <= min(factors) < 0.87
    assert 1.13 < max(factors) <= 1.2 + 1e-4


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, -1), (-1000, 3000)])
def test_contrast_scales_the_distance_from_the_mean(low: float, high: float) -> None:
    image = picture(low, high)
    mean, margin, factors = image.mean(), 0.1 * (high - low), []
    for seed in range(40):
        view = jittered(image, seed, brightness=0.0)
        inside = (view - image.amin() > 1e-3 * (high - low)) & (image.amax() - view > 1e-3 * (high - low))
        inside &= (image - mean).abs() > margin
        ratio = (view - mean)[inside] / (image - mean)[inside]
        assert ratio.max() - ratio.min() < 1e-4
        factors.append(ratio.mean().item())
    assert 0.8 - 1e-4 <= min(factors) < 0.87
    assert 1.13 < max(factors) <= 1.2 + 1e-4


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, -1), (-1000, 3000)])
def test_no_brightness_and_no_contrast_are_the_identity(low: float, high: float) -> None:
    image = picture(low, high)
    torch.testing.assert_close(jittered(image, 0, brightness=0, contrast=0), image, atol=1e-6 * (high - low), rtol=1e-6)


def test_image_itself_is_left_alone() -> None:
    image = picture(0, 1)
    before = image.clone()
    jittered(image, 0)
    assert torch.equal(image, before)


def test_constant_image_stays_constant() -> None:
    image = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(jittered(image, 0), image)


@pytest.mark.parametrize("setting", ["brightness", "contrast"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan")])
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{setting} must be in \[0, 1\), got {value}"):
        PhotometricJitter(**{setting: value})
