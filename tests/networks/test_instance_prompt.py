# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from mgipt_monai.networks import InstancePrompt
from tests.networks.test_frequency_prompt import full_fft


class Distance:
    """A loss with a known optimum, the squared distance from a target image, that notes its calls."""

    def __init__(self, target: Tensor) -> None:
        self.target = target
        self.values: list[float] = []

    def __call__(self, images: Tensor) -> Tensor:
        losses = (images - self.target).square().flatten(1).sum(dim=1)
        self.values.append(losses.sum().item())
        return losses


class Scores:
    """Scripted consistency scores; it notes the prompt that each was asked for."""

    def __init__(self, scores: Iterable[float], image: Tensor | None = None) -> None:
        self.scores = iter(scores)
        self.image = image
        self.asked: list[Tensor] = []

    def __call__(self, prompt: Callable[[Tensor], Tensor]) -> float:
        self.asked.append(prompt(self.image) if self.image is not None else torch.empty(0))
        return next(self.scores)


def never(prompt: Callable[[Tensor], Tensor]) -> float:
    raise AssertionError("no consistency check was wanted")


def problem(spatial: tuple[int, ...] = (15, 16), channels: int = 2) -> tuple[Tensor, Distance]:
    torch.manual_seed(1)
    image = torch.rand(1, channels, *spatial)
    return image, Distance(torch.rand(1, channels, *spatial) * 2)


def gradient_at_ones(image: Tensor, loss: Distance, side: int) -> Tensor:
    ones = torch.ones(1, image.shape[1], *[side] * (image.ndim - 2), requires_grad=True)
    return torch.autograd.grad((full_fft(image, ones) - loss.target).square().sum(), ones)[0]


def tuned_by_hand(image: Tensor, target: Tensor, sizes: tuple[int, ...], steps: int, lr: float, betas: tuple) -> Tensor:
    """Steps 1 and 2 of the specification, with full Fourier transforms and a ring of its own parameters."""
    dims, prompt = image.ndim - 2, None
    for size in sizes:
        values = torch.ones(1, image.shape[1], *[size] * dims, requires_grad=True)
        centre, inside = torch.ones_like(values), torch.zeros_like(values)
        if prompt is not None:
            margin = (size - prompt.shape[-1]) // 2
            middle = (..., *[slice(margin, size - margin)] * dims)
            centre[middle], inside[middle] = prompt, 1.0
        adam = torch.optim.Adam([values], lr=lr, betas=betas)
        for _ in range(steps):
            adam.zero_grad()
            (full_fft(image, torch.where(inside > 0, centre, values)) - target).square().sum().backward()
            adam.step()
        prompt = torch.where(inside > 0, centre, values).detach()
    return prompt


@pytest.mark.parametrize("steps", [1, 4])
def test_every_size_takes_as_many_loss_calls_as_steps(steps: int) -> None:
    image, loss = problem()
    tuning = InstancePrompt(sizes=(1, 3, 5), steps=steps).tune(image, loss, Scores([0.1] * 3))
    assert len(loss.values) == 3 * steps
    assert list(tuning.losses) == [1, 3, 5]
    assert [value for size in (1, 3, 5) for value in tuning.losses[size]] == pytest.approx(loss.values)
    assert all(len(values) == steps for values in tuning.losses.values())


def test_published_settings_are_the_defaults() -> None:
    image, loss = problem()
    prompt = InstancePrompt()
    tuning = prompt.tune(image, loss, Scores([0.1] * 3))
    assert [(size, len(values)) for size, values in tuning.losses.items()] == [(1, 7), (3, 7), (5, 7)]
    expected = tuned_by_hand(image, loss.target, (1, 3, 5), 7, 0.05, (0.9, 0.99))
    torch.testing.assert_close(prompt.amplitude, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("spatial", "sizes"), [((15, 16), (1, 3, 5)), ((14, 17), (3, 7)), ((12, 13), (2, 4)), ((7, 8, 9), (1, 3))]
)
def test_prompt_is_that_of_the_loop_written_by_hand(spatial: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    image, loss = problem(spatial)
    prompt = InstancePrompt(sizes=sizes, steps=4, lr=0.02, betas=(0.5, 0.9))
    prompt.tune(image, loss, Scores([0.1] * 3))
    expected = tuned_by_hand(image, loss.target, sizes, 4, 0.02, (0.5, 0.9))
    torch.testing.assert_close(prompt.amplitude, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sizes", [(1, 3), (3,), (5, 7)])
def test_tuning_starts_from_the_unadapted_image(sizes: tuple[int, ...]) -> None:
    image, loss = problem()
    unadapted = loss(image).item()
    prompt = InstancePrompt(sizes=sizes, steps=3)
    for _ in range(2):  # the second image starts from scratch, too
        tuning = prompt.tune(image, loss, Scores([0.1] * 3))
        assert tuning.losses[sizes[0]][0] == unadapted


def test_growth_starts_from_the_tuned_prompts_loss() -> None:
    image, loss = problem()
    small = InstancePrompt(sizes=(1,), steps=5)
    small.tune(image, loss, never)
    tuning = InstancePrompt(sizes=(1, 3), steps=5).tune(image, loss, Scores([0.1] * 2))
    tuned = (full_fft(image, small.amplitude) - loss.target).square().sum().item()
    assert tuning.losses[3][0] == pytest.approx(tuned, rel=1e-5)


@pytest.mark.parametrize(("spatial", "sizes"), [((15, 16), (1, 3, 5)), ((20,), (3, 7)), ((7, 8, 9), (1, 3, 5))])
def test_growth_moves_the_ring_alone(spatial: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    image, loss = problem(spatial)
    grown: dict[int, Tensor] = {}
    for n in range(1, len(sizes) + 1):
        prompt = InstancePrompt(sizes=sizes[:n], steps=3)
        prompt.tune(image, loss, Scores([0.1] * n))
        grown[sizes[n - 1]] = prompt.amplitude
    for small, large in itertools.pairwise(sizes):
        margin = (large - small) // 2
        middle = (..., *[slice(margin, large - margin)] * len(spatial))
        assert torch.equal(grown[large][middle], grown[small])
        ring = grown[large].clone()
        ring[middle] = 0
        assert (ring != 1).all()  # the middle was set to 0 and counts as moved


@pytest.mark.parametrize(
    ("scores", "size", "checks"),
    [
        ([0.1, 0.2, 0.0], 1, 2),
        ([0.3, 0.2, 0.25], 3, 3),
        ([0.3, 0.1, 0.2], 3, 3),
        ([0.3, 0.2, 0.1], 5, 3),
        ([0.2, 0.2, 0.2], 5, 3),
        ([0.2, 0.1, 0.1], 5, 3),
        ([0.2, 0.2, 0.3], 3, 3),
        ([0.0, 1e-7, 0.0], 1, 2),
    ],
)
def test_growth_stops_at_the_first_strictly_worse_score(scores: list[float], size: int, checks: int) -> None:
    image, loss = problem()
    prompt, script = InstancePrompt(sizes=(1, 3, 5), steps=2), Scores(scores, image)
    tuning = prompt.tune(image, loss, script)
    assert tuning.size == size
    assert len(script.asked) == checks
    assert tuning.consistency == dict(zip((1, 3, 5), scores[:checks], strict=False))
    assert list(tuning.losses) == [1, 3, 5][:checks]
    alone = InstancePrompt(sizes=[s for s in (1, 3, 5) if s <= size], steps=2)
    alone.tune(image, loss, Scores([0.0] * 3))
    assert torch.equal(prompt.amplitude, alone.amplitude)
    assert torch.equal(prompt(image), alone(image))


def test_each_check_is_of_the_prompt_just_tuned() -> None:
    image, loss = problem()
    script = Scores([0.3, 0.2, 0.1], image)
    InstancePrompt(sizes=(1, 3, 5), steps=2).tune(image, loss, script)
    for n, prompted in enumerate(script.asked, start=1):
        expected = tuned_by_hand(image, loss.target, (1, 3, 5)[:n], 2, 0.05, (0.9, 0.99))
        torch.testing.assert_close(prompted.double(), full_fft(image, expected), atol=1e-3, rtol=0)
        assert not prompted.requires_grad


def test_without_early_stop_the_largest_size_is_reached_unchecked() -> None:
    image, loss = problem()
    prompt = InstancePrompt(sizes=(1, 3, 5), steps=2, early_stop=False)
    tuning = prompt.tune(image, loss, never)
    assert tuning.size == 5
    assert tuning.consistency == {}
    assert prompt.amplitude.shape == (1, 2, 5, 5)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_one_size_alone_is_not_checked(size: int) -> None:
    image, loss = problem()
    tuning = InstancePrompt(sizes=(size,), steps=2).tune(image, loss, never)
    assert tuning.size == size
    assert tuning.consistency == {}


@pytest.mark.parametrize("spatial", [(16, 15), (8, 7, 9)])
def test_loss_falls_on_a_simple_problem(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    image = torch.randn(1, 2, *spatial) + 0.1
    loss = Distance(full_fft(image, torch.full((1, 2, *[3] * len(spatial)), 0.6)).float())
    prompt = InstancePrompt(sizes=(1, 3), steps=7, offset="none")
    tuning = prompt.tune(image, loss, Scores([0.1] * 2))
    for losses in tuning.losses.values():
        assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert loss(prompt(image)).item() < 0.2 * tuning.losses[1][0]


@pytest.mark.parametrize("lr", [0.05, 0.01])
@pytest.mark.parametrize(("spatial", "size"), [((16,), 5), ((15, 16), 1), ((15, 16), 5), ((7, 8, 9), 3)])
def test_first_step_is_the_learning_rate_against_the_gradient(spatial: tuple[int, ...], size: int, lr: float) -> None:
    image, loss = problem(spatial)
    prompt = InstancePrompt(sizes=(size,), steps=1, lr=lr)
    prompt.tune(image, loss, never)
    gradient = gradient_at_ones(image, loss, size)
    assert gradient.abs().min() > 3e-5
    torch.testing.assert_close(prompt.amplitude, 1 - lr * gradient.sign(), atol=1e-3 * lr, rtol=0)


def test_volumes_are_tuned_in_three_dimensions() -> None:
    image, loss = problem((7, 8, 9))
    prompt = InstancePrompt(sizes=(1, 3, 5), steps=2)
    assert prompt.tune(image, loss, Scores([0.3, 0.2, 0.1])).size == 5
    assert prompt.amplitude.shape == (1, 2, 5, 5, 5)
    expected = full_fft(image, prompt.amplitude)
    torch.testing.assert_close(prompt(image).double(), expected, atol=1e-5, rtol=0)


def test_forward_applies_the_chosen_prompt_to_any_image() -> None:
    image, loss = problem()
    prompt = InstancePrompt(sizes=(1, 3), steps=3)
    prompt.tune(image, loss, Scores([0.2, 0.1]))
    other = torch.rand(2, 2, 18, 11)
    torch.testing.assert_close(prompt(other).double(), full_fft(other, prompt.amplitude), atol=1e-5, rtol=0)
    assert not prompt.amplitude.requires_grad


def test_forward_is_the_identity_before_tuning_and_after_reset() -> None:
    image, loss = problem()
    prompt = InstancePrompt(sizes=(1, 3), steps=2)
    assert torch.equal(prompt(image), image)
    prompt.tune(image, loss, Scores([0.2, 0.1]))
    assert not torch.equal(prompt(image), image)
    prompt.reset()
    assert prompt.amplitude is None
    assert torch.equal(prompt(image), image)


def test_nothing_of_an_image_survives_to_the_next() -> None:
    image, loss = problem()
    other = torch.rand(1, 2, 15, 16) * 3
    fresh, used = InstancePrompt(steps=2), InstancePrompt(steps=2)
    fresh.tune(image, loss, Scores([0.3, 0.2, 0.1]))
    used.tune(other, loss, Scores([0.1, 0.1, 0.1]))
    assert not torch.equal(used.amplitude, fresh.amplitude)
    used.tune(image, loss, Scores([0.3, 0.2, 0.1]))
    assert torch.equal(used.amplitude, fresh.amplitude)
    assert used.state_dict() == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_is_refused(bad: float) -> None:
    image, _ = problem()
    with pytest.raises(FloatingPointError, match="not finite"):
        InstancePrompt(steps=2).tune(image, lambda x: x.mean((1, 2, 3)) * bad, never)


@pytest.mark.parametrize("sizes", [(1,), (1, 3, 5)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_in_one_step_is_refused_though_the_loss_is(bad: float, sizes: tuple[int]) -> None:
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * bad

    calls = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return (Spoilt.apply(x) if len(calls) == 2 else x).sin().mean((1, 2, 3)).nan_to_num(0.5)

    with pytest.raises(FloatingPointError, match="not finite"):
        InstancePrompt(sizes, steps=4).tune(problem()[0], loss, Scores([0.3, 0.2, 0.1]))
    assert len(calls) == 4  # seen at the end of the size


def test_image_smaller_than_a_size_is_refused() -> None:
    image, loss = problem((4, 16))
    with pytest.raises(ValueError, match="image of 4x16 is smaller than a prompt of side 5"):
        InstancePrompt(sizes=(1, 3, 5), steps=1).tune(image, loss, Scores([0.1] * 3))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 2), r"even number.*got \(1, 2\)"),
        ((1, 3, 6), r"even number.*got \(1, 3, 6\)"),
        ((5, 3), r"even number.*got \(5, 3\)"),
        ((3, 3), r"different whole numbers from 1, got \(3, 3\)"),
        ((0, 2), r"different whole numbers from 1, got \(0, 2\)"),
        ((-1, 1), r"different whole numbers from 1, got \(-1, 1\)"),
        ((1.0, 3.0), r"different whole numbers from 1, got \(1\.0, 3\.0\)"),
    ],
)
def test_sizes_that_do_not_nest_are_refused(sizes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=rf"instance sizes must .*{message}"):
        InstancePrompt(sizes=sizes)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("steps", -2, "steps must be at least 1, got -2"),
        ("lr", 0.0, r"lr must be above 0, got 0\.0"),
        ("lr", -0.05, r"lr must be above 0, got -0\.05"),
        ("lr", float("nan"), "lr must be above 0, got nan"),
        ("betas", (0.9, 1.0), r"betas must be two numbers in \[0, 1\), got \(0\.9, 1\.0\)"),
        ("betas", (-0.1, 0.9), r"betas must be two numbers in \[0, 1\), got \(-0\.1, 0\.9\)"),
        ("betas", (0.9,), r"betas must be two numbers in \[0, 1\), got \(0\.9,\)"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstancePrompt(**{setting: value})
