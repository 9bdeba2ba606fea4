# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mgipt_monai.networks import FrequencyPrompt, LowFrequencies

SPATIAL = [
    (16,),
    (17,),
    (7,),
    (4096,),
    (16, 16),
    (17, 15),
    (18, 25),
    (13, 20),
    (7, 7),
    (8, 8, 8),
    (9, 7, 11),
    (7, 12, 10),
]
SIDES = [1, 2, 3, 5, 7]


def block_frequencies(side: int, centred: bool) -> range:
    """The frequencies that a side covers, written out as in the specification."""
    if not centred and side % 2:
        return range(-(side // 2) - 1, side // 2)
    return range(-(side // 2), side - side // 2)


def full_fft(image: Tensor, prompt: Tensor, centred: bool = True) -> Tensor:
    """Eq. 1 word for word: amplitude times prompt on the block, phase kept, inverse transform, real part."""
    spatial = image.shape[2:]
    axes = tuple(range(2, image.ndim))
    spectrum = torch.fft.fftn(image.double(), dim=axes)
    frequencies = block_frequencies(prompt.shape[-1], centred)
    factor = torch.ones(max(len(prompt), len(image)), *image.shape[1:], dtype=torch.float64)
    for index in itertools.product(range(len(frequencies)), repeat=len(spatial)):
        place = tuple(frequencies[i] % n for i, n in zip(index, spatial, strict=True))
        factor[(..., *place)] = prompt[(..., *index)].double()
    amplitude, phase = spectrum.abs() * factor, spectrum.angle()
    prompted = torch.complex(amplitude * phase.cos(), amplitude * phase.sin())
    return torch.fft.ifftn(prompted, dim=axes).real


def random_prompt(n: int, channels: int, side: int, dims: int) -> Tensor:
    return torch.rand(n, channels, *[side] * dims) * 2.5 - 0.5


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spatial", SPATIAL, ids=lambda s: "x".join(map(str, s)))
def test_prompted_image_is_that_of_the_full_fft(spatial: tuple[int, ...], side: int, centred: bool) -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 2, *spatial)
    prompt = random_prompt(1, 2, side, len(spatial))
    prompted = LowFrequencies(image, side, centred).apply(prompt)
    assert prompted.dtype == torch.float32
    torch.testing.assert_close(prompted.double(), full_fft(image, prompt, centred), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", SIDES)
def test_one_step_off_centre_changes_odd_sides_only(side: int) -> None:
    torch.manual_seed(0)
    image, prompt = torch.rand(1, 1, 15, 16), random_prompt(1, 1, side, 2)
    centred, off = (LowFrequencies(image, side, centred).apply(prompt) for centred in (True, False))
    assert torch.equal(centred, off) == (side % 2 == 0)


@pytest.mark.parametrize(("side", "frequency"), [(1, 1), (3, 2), (5, 3), (7, 4)])
def test_off_centre_block_reaches_one_frequency_further_down_and_one_less_up(side: int, frequency: int) -> None:
    wave = torch.cos(2 * torch.pi * frequency * torch.arange(16) / 16).view(1, 1, 16)
    prompt = torch.full((1, 1, side), 3.0)
    torch.testing.assert_close(LowFrequencies(wave, side).apply(prompt), wave, atol=1e-6, rtol=0)
    # only the negative one of the two coefficients is tripled: (3 + 1) / 2
    torch.testing.assert_close(LowFrequencies(wave, side, False).apply(prompt), 2 * wave, atol=1e-6, rtol=0)


def test_prompt_of_side_one_scales_the_mean_of_its_channel() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 2, 9, 12)
    prompted = LowFrequencies(image, 1).apply(torch.tensor([0.0, 3.0]).view(1, 2, 1, 1))
    mean = image.mean((2, 3), keepdim=True)
    expected = image + torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1) * mean
    torch.testing.assert_close(prompted, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spatial", [(17,), (16, 19), (9, 8, 7)])
def test_all_ones_are_the_identity_bit_for_bit(spatial: tuple[int, ...], side: int, centred: bool) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, *spatial) * 1000
    assert torch.equal(FrequencyPrompt(len(spatial), 3, side, centred)(image), image)


@pytest.mark.parametrize("spatial", [(16,), (15, 18), (7, 8, 9)])
def test_every_sample_of_a_batch_has_its_own_prompt(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    images, prompts = torch.rand(3, 2, *spatial), random_prompt(3, 2, 3, len(spatial))
    together = LowFrequencies(images, 3).apply(prompts)
    for i in range(3):
        alone = LowFrequencies(images[i : i + 1], 3).apply(prompts[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)
        expected = full_fft(images[i : i + 1], prompts[i : i + 1])
        torch.testing.assert_close(together[i : i + 1].double(), expected, atol=1e-5, rtol=0)


def test_one_image_takes_many_prompts() -> None:
    torch.manual_seed(0)
    image, prompts = torch.rand(1, 3, 15, 18), random_prompt(4, 3, 5, 2)
    low = LowFrequencies(image, 5)
    many = low.apply(prompts)
    assert many.shape == (4, 3, 15, 18)
    for one, prompt in zip(many, prompts, strict=True):
        torch.testing.assert_close(one.double(), full_fft(image, prompt[None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("side", [1, 2, 3, 5])
@pytest.mark.parametrize("spatial", [(16,), (15, 18), (7, 8, 9)])
def test_gradient_of_the_prompt_is_that_of_the_full_fft(spatial: tuple[int, ...], side: int, centred: bool) -> None:
    torch.manual_seed(0)
    image, direction = torch.rand(2, 2, *spatial), torch.randn(2, 2, *spatial)
    prompt = random_prompt(2, 2, side, len(spatial)).requires_grad_()
    (gradient,) = torch.autograd.grad((LowFrequencies(image, side, centred).apply(prompt) * direction).sum(), prompt)
    (expected,) = torch.autograd.grad((full_fft(image, prompt, centred) * direction).sum(), prompt)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("centred", [True, False])
def test_module_applies_its_own_trainable_prompt(centred: bool) -> None:
    torch.manual_seed(0)
    prompt = FrequencyPrompt(spatial_dims=2, in_channels=3, side=5, centred=centred)
    assert [(name, tuple(p.shape)) for name, p in prompt.named_parameters()] == [("amplitude", (1, 3, 5, 5))]
    with torch.no_grad():
        prompt.amplitude.copy_(random_prompt(1, 3, 5, 2))
    images = torch.rand(2, 3, 15, 18)
    prompted = prompt(images)
    torch.testing.assert_close(prompted.double(), full_fft(images, prompt.amplitude, centred), atol=1e-5, rtol=0)
    prompted.square().sum().backward()
    assert prompt.amplitude.grad.abs().min() > 0


def test_prompts_are_centred_unless_told() -> None:
    torch.manual_seed(0)
    image, amplitude = torch.rand(1, 1, 16, 16), random_prompt(1, 1, 3, 2)
    module = FrequencyPrompt(2, 1, 3)
    module.load_state_dict({"amplitude": amplitude})
    for prompted in (module(image), LowFrequencies(image, 3).apply(amplitude)):
        torch.testing.assert_close(prompted.double(), full_fft(image, amplitude, True), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("spatial", "side"), [((4,), 5), ((16, 4), 5), ((2, 16), 3), ((8, 6, 6), 7)])
def test_image_smaller_than_the_prompt_is_refused(spatial: tuple[int, ...], side: int) -> None:
    shape = "x".join(map(str, spatial))
    with pytest.raises(ValueError, match=rf"image of {shape} is smaller than a prompt of side {side}"):
        LowFrequencies(torch.rand(1, 1, *spatial), side)
    with pytest.raises(ValueError, match=rf"image of {shape} is smaller than a prompt of side {side}"):
        FrequencyPrompt(len(spatial), 1, side)(torch.rand(1, 1, *spatial))


@pytest.mark.parametrize("name", ["spatial_dims", "in_channels", "side"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one_are_refused(name: str, value: int) -> None:
    counts = {"spatial_dims": 2, "in_channels": 3, "side": 5, name: value}
    with pytest.raises(ValueError, match=rf"{name} must be at least 1, got {value}"):
        FrequencyPrompt(**counts)


def test_training_works_after_the_same_size_was_seen_in_inference_mode() -> None:
    # 43 x 47 and 53 x 59 are used by no other test, so that nothing is cached for them before
    prompt = FrequencyPrompt(spatial_dims=2, in_channels=1, side=3)
    with torch.inference_mode():
        image = torch.rand(1, 1, 43, 47)
        assert torch.equal(prompt(image), image)
        module_made_inside = FrequencyPrompt(2, 1, 3)
        assert module_made_inside(torch.rand(1, 1, 53, 59)).shape == (1, 1, 53, 59)
    for spatial in ((43, 47), (53, 59)):
        prompt.zero_grad()
        prompt(torch.rand(1, 1, *spatial)).square().sum().backward()
        assert prompt.amplitude.grad[0, 0, 1, 1] > 1


def test_training_works_inside_enable_grad_under_no_grad() -> None:
    prompt = FrequencyPrompt(spatial_dims=2, in_channels=1, side=3)
    with torch.no_grad():
        assert not prompt(torch.rand(1, 1, 41, 61)).requires_grad
        with torch.enable_grad():
            prompt(torch.rand(1, 1, 41, 61)).square().sum().backward()
    assert prompt.amplitude.grad[0, 0, 1, 1] > 1
