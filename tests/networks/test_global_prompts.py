# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mgipt_monai.networks import GlobalPrompts
from tests.networks.test_frequency_prompt import full_fft

SIZES = (3, 5, 7)


def problem(spatial: tuple[int, ...] = (15, 16), n: int = 3) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    torch.manual_seed(2)
    images = [torch.rand(1, 2, *spatial) + i for i in range(n)]
    target = torch.rand(1, 2, *spatial) * 3
    return images, lambda x: (x - target).square().flatten(1).sum(dim=1)


def brightness(images: Tensor) -> Tensor:
    return images.flatten(1).sum(dim=1)


def state_of(prompts: GlobalPrompts) -> dict[str, list[Tensor]]:
    return copy.deepcopy({"students": prompts.students, "teachers": prompts.teachers})


def same(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        len(one[role]) == len(other[role]) and all(map(torch.equal, one[role], other[role])) for role in one
    )


def started(sizes: tuple[int, ...] = SIZES) -> GlobalPrompts:
    prompts = GlobalPrompts(sizes)
    images, loss = problem()
    for image in images[:2]:
        prompts.step(image, loss)
    return prompts


@pytest.mark.parametrize("lr", [0.05, 0.01])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("spatial", "sizes"), [((15, 16), SIZES), ((15, 16), (1, 2, 3)), ((7, 8, 9), (1, 3))])
def test_one_step_moves_each_number_by_the_learning_rate(
    spatial: tuple[int, ...], sizes: tuple[int, ...], centred: bool, lr: float
) -> None:
    (image, *_), loss = problem(spatial)
    prompts = GlobalPrompts(sizes, lr=lr, centred=centred)
    prompts.step(image, loss)
    for size, student in zip(sizes, prompts.students, strict=True):
        ones = torch.ones(1, 2, *[size] * len(spatial), requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(full_fft(image, ones, centred)).sum(), ones)
        assert gradient.abs().min() > 1e-3
        torch.testing.assert_close(student, 1 - lr * gradient.sign(), atol=1e-4 * lr, rtol=0)


def test_published_settings_are_the_defaults() -> None:
    (image, *_), _ = problem()
    prompts = GlobalPrompts()
    prompts.step(image, brightness)
    assert [tuple(p.shape) for p in prompts.students] == [(1, 2, 3, 3), (1, 2, 5, 5), (1, 2, 7, 7)]
    assert [tuple(p.shape) for p in prompts.teachers] == [(1, 2, 3, 3), (1, 2, 5, 5), (1, 2, 7, 7)]
    for student, teacher in zip(prompts.students, prompts.teachers, strict=True):
        middle = (0, 0, student.shape[-1] // 2, student.shape[-1] // 2)  # the zero frequency: centred blocks
        assert student[middle].item() == pytest.approx(0.95, abs=1e-5)
        assert teacher[middle].item() == pytest.approx(0.1 + 0.9 * 0.95, abs=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_students_are_those_of_a_loop_with_one_fresh_adam_each(centred: bool) -> None:
    images, loss = problem()
    prompts = GlobalPrompts(SIZES, lr=0.03, betas=(0.5, 0.9), centred=centred)
    students = [torch.ones(1, 2, size, size, requires_grad=True) for size in SIZES]
    for image in images:
        expected_losses = []
        for student in students:
            adam = torch.optim.Adam([student], lr=0.03, betas=(0.5, 0.9))
            value = loss(full_fft(image, student, centred)).sum()
            adam.zero_grad()
            value.backward()
            adam.step()
            expected_losses.append(value.item())
        losses = prompts.step(image, loss)
        assert losses.shape == (3,)
        assert not losses.requires_grad
        assert losses.tolist() == pytest.approx(expected_losses, rel=1e-4)
        for student, expected in zip(prompts.students, students, strict=True):
            torch.testing.assert_close(student, expected.detach(), atol=1e-4, rtol=0)


def test_losses_are_of_the_students_before_the_step() -> None:
    images, loss = problem()
    prompts = GlobalPrompts(SIZES)
    first = prompts.step(images[0], loss)
    assert first.tolist() == [loss(images[0]).item()] * 3
    expected = [loss(full_fft(images[1], student)).item() for student in prompts.students]
    assert prompts.step(images[1], loss).tolist() == pytest.approx(expected, rel=1e-5)


def test_teacher_follows_the_student_worked_by_hand() -> None:
    # the brightness falls with the zero frequency's factor: the student goes 1, .95, .90, .85
    image = torch.rand(1, 1, 12, 13) + 1
    prompts = GlobalPrompts((1, 3), lr=0.05, teacher_decay=0.1)
    for student, teacher in ((0.95, 0.955), (0.90, 0.9055), (0.85, 0.85555)):
        prompts.step(image, brightness)
        for i, middle in enumerate(((0, 0, 0, 0), (0, 0, 1, 1))):
            assert prompts.students[i][middle].item() == pytest.approx(student, abs=1e-5)
            assert prompts.teachers[i][middle].item() == pytest.approx(teacher, abs=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.9])
def test_teachers_keep_the_decays_share_of_themselves(decay: float) -> None:
    images, loss = problem()
    prompts = GlobalPrompts(SIZES, teacher_decay=decay)
    teachers = [torch.ones(1, 2, size, size) for size in SIZES]
    for image in images:
        prompts.step(image, loss)
        teachers = [decay * old + (1 - decay) * new for old, new in zip(teachers, prompts.students, strict=True)]
        for teacher, expected in zip(prompts.teachers, teachers, strict=True):
            torch.testing.assert_close(teacher, expected, atol=1e-6, rtol=0)
    if decay == 0:
        assert all(map(torch.equal, prompts.teachers, prompts.students))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("spatial", [(15, 16), (7, 8, 9)])
def test_prediction_is_with_the_teachers(spatial: tuple[int, ...], centred: bool) -> None:
    (image, *_), loss = problem(spatial)
    prompts = GlobalPrompts(SIZES, centred=centred)
    prompts.step(image, loss)
    prompted = prompts(image)
    assert prompted.shape == (3, *image.shape[1:])
    assert not prompted.requires_grad
    for i in range(3):
        by_teacher = full_fft(image, prompts.teachers[i], centred)[0]
        by_student = full_fft(image, prompts.students[i], centred)[0]
        torch.testing.assert_close(prompted[i].double(), by_teacher, atol=1e-5, rtol=0)
        assert (prompted[i] - by_student).abs().max() > 1e-3


def test_first_image_is_predicted_as_it_is_before_any_step() -> None:
    (image, *_), _ = problem()
    assert torch.equal(GlobalPrompts(SIZES)(image), image.expand(3, -1, -1, -1))


def test_off_centre_prompts_act_one_frequency_lower() -> None:
    wave = torch.cos(2 * torch.pi * 2 * torch.arange(16) / 16).view(1, 1, 16)
    state = {"students": [torch.ones(1, 1, 3)], "teachers": [torch.full((1, 1, 3), 3.0)]}
    prompted = []
    for centred in (True, False):
        prompts = GlobalPrompts((3,), centred=centred, offset="none")
        prompts.load_adaptation_state(state)
        prompted.append(prompts(wave))
    torch.testing.assert_close(prompted[0], wave, atol=1e-6, rtol=0)  # covers -1 .. 1
    torch.testing.assert_close(prompted[1], 2 * wave, atol=1e-6, rtol=0)  # covers -2 .. 0: one of the pair, tripled


def test_prediction_changes_no_prompt() -> None:
    prompts = started()
    before = state_of(prompts)
    prompts(problem()[0][0])
    assert same(state_of(prompts), before)


def test_state_round_trip_goes_on_bit_for_bit() -> None:
    images, loss = problem(n=4)
    prompts = started()
    file = io.BytesIO()
    torch.save(prompts.adaptation_state(), file)
    file.seek(0)
    other = GlobalPrompts(SIZES)
    other.load_adaptation_state(torch.load(file, weights_only=True))
    assert same(state_of(other), state_of(prompts))
    for image in images[2:]:
        assert torch.equal(other.step(image, loss), prompts.step(image, loss))
        assert torch.equal(other(image), prompts(image))
    assert same(state_of(other), state_of(prompts))


def test_state_is_a_copy_both_ways() -> None:
    prompts = started()
    before = state_of(prompts)
    state = prompts.adaptation_state()
    assert same(state, before)
    for tensor in (*state["students"], *state["teachers"]):
        tensor.fill_(9)
    state["students"].clear()
    assert same(state_of(prompts), before)

    loaded, state = GlobalPrompts(SIZES), prompts.adaptation_state()
    loaded.load_adaptation_state(state)
    for tensor in (*state["students"], *state["teachers"]):
        tensor.fill_(9)
    state["teachers"].clear()
    assert same(state_of(loaded), before)


def test_step_does_not_write_into_a_state_taken_before() -> None:
    images, loss = problem()
    prompts = started()
    state = prompts.adaptation_state()
    before = copy.deepcopy(state)
    prompts.step(images[2], loss)
    assert same(state, before)


def test_state_before_the_first_image_is_empty_and_can_be_loaded() -> None:
    empty = GlobalPrompts(SIZES).adaptation_state()
    assert empty == {"students": [], "teachers": []}
    prompts = started()
    prompts.load_adaptation_state(empty)
    (image, *_), _ = problem()
    assert torch.equal(prompts(image), image.expand(3, -1, -1, -1))


def spoilt(role: str, value: float) -> dict[str, list[Tensor]]:
    state = started().adaptation_state()
    state[role][1][0, 0, 2, 3] = value
    return state


@pytest.mark.parametrize(
    ("make_state", "message"),
    [
        (lambda: started((3, 5)).adaptation_state(), r"students of sizes \(3, 5\), .* have \(3, 5, 7\)"),
        (lambda: started((3, 7, 5)).adaptation_state(), r"students of sizes \(3, 7, 5\), .* have \(3, 5, 7\)"),
        (lambda: started((1, 2, 3)).adaptation_state(), r"students of sizes \(1, 2, 3\), .* have \(3, 5, 7\)"),
        (
            lambda: {**started().adaptation_state(), "teachers": started((3, 5)).teachers},
            r"teachers of sizes \(3, 5\), .* have \(3, 5, 7\)",
        ),
        (lambda: {**started().adaptation_state(), "teachers": []}, "different numbers of students and teachers"),
        (lambda: {**started().adaptation_state(), "students": []}, "different numbers of students and teachers"),
        (lambda: spoilt("students", float("nan")), "students are not finite"),
        (lambda: spoilt("teachers", float("inf")), "teachers are not finite"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_nothing_changes(
    make_state: Callable[[], dict[str, list[Tensor]]], message: str
) -> None:
    prompts = started()
    images, loss = problem()
    prompts.step(images[2], loss)
    before = state_of(prompts)
    with pytest.raises(ValueError, match=message):
        prompts.load_adaptation_state(make_state())
    assert same(state_of(prompts), before)


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (1, 2, 5, 3), (1, 2, 3), (1, 2, 3, 3, 3), (2, 2, 3, 3)])
def test_state_with_prompts_of_different_shapes_is_refused(shape: tuple[int, ...]) -> None:
    prompts = GlobalPrompts((3,))
    with pytest.raises(ValueError, match="teachers"):
        prompts.load_adaptation_state({"students": [torch.ones(1, 2, 3, 3)], "teachers": [torch.ones(shape)]})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 15, 16), "this image has 3 channels and 2 spatial dimensions, the stream.s have 2 and 2"),
        ((1, 1, 15, 16), "this image has 1 channels and 2 spatial dimensions, the stream.s have 2 and 2"),
        ((1, 2, 15, 16, 9), "this image has 2 channels and 3 spatial dimensions, the stream.s have 2 and 2"),
        ((1, 2, 15), "this image has 2 channels and 1 spatial dimensions, the stream.s have 2 and 2"),
    ],
)
def test_image_of_another_kind_in_the_stream_is_refused(shape: tuple[int, ...], message: str) -> None:
    prompts = started()
    before = state_of(prompts)
    with pytest.raises(ValueError, match=message):
        prompts.step(torch.rand(shape), brightness)
    with pytest.raises(ValueError, match=message):
        prompts(torch.rand(shape))
    assert same(state_of(prompts), before)
    prompts.reset()
    assert prompts(torch.rand(shape)).shape == (3, *shape[1:])


def test_image_sizes_may_change_within_a_stream() -> None:
    prompts = started()
    image = torch.rand(1, 2, 21, 18)
    prompted = prompts(image)
    torch.testing.assert_close(prompted[:1].double(), full_fft(image, prompts.teachers[0]), atol=1e-5, rtol=0)


def test_image_smaller_than_a_prompt_is_refused_and_nothing_changes() -> None:
    prompts = started()
    before = state_of(prompts)
    with pytest.raises(ValueError, match="image of 6x16 is smaller than a prompt of side 7"):
        prompts.step(torch.rand(1, 2, 6, 16), brightness)
    assert same(state_of(prompts), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_is_refused_and_nothing_changes(bad: float) -> None:
    prompts = started()
    before = state_of(prompts)
    with pytest.raises(FloatingPointError, match="not finite"):
        prompts.step(torch.rand(1, 2, 15, 16), lambda x: brightness(x) * bad)
    assert same(state_of(prompts), before)


def test_reset_starts_a_new_stream() -> None:
    images, loss = problem()
    prompts, fresh = started(), GlobalPrompts(SIZES)
    prompts.reset()
    assert prompts.adaptation_state() == {"students": [], "teachers": []}
    assert torch.equal(prompts.step(images[2], loss), fresh.step(images[2], loss))
    assert same(state_of(prompts), state_of(fresh))


def test_no_size_at_all_leaves_the_global_prompts_out() -> None:
    (image, *_), loss = problem()
    prompts = GlobalPrompts(())
    assert prompts.step(image, loss).shape == (0,)
    assert prompts(image).shape == (0, *image.shape[1:])


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("sizes", (3, 3), r"global sizes must be different whole numbers from 1, got \(3, 3\)"),
        ("sizes", (0, 3), r"global sizes must be different whole numbers from 1, got \(0, 3\)"),
        ("sizes", (3, 5.0), r"global sizes must be different whole numbers from 1, got \(3, 5\.0\)"),
        ("lr", 0, "lr must be above 0, got 0"),
        ("lr", -0.1, r"lr must be above 0, got -0\.1"),
        ("betas", (0.9, 1), r"betas must be two numbers in \[0, 1\), got \(0\.9, 1\)"),
        ("betas", (0.9, 0.99, 0.5), r"betas must be two numbers in \[0, 1\), got \(0\.9, 0\.99, 0\.5\)"),
        ("teacher_decay", 1.0, r"teacher_decay must be in \[0, 1\), got 1\.0"),
        ("teacher_decay", -0.1, r"teacher_decay must be in \[0, 1\), got -0\.1"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalPrompts(**{setting: value})
