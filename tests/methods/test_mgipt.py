# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import UNet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mgipt_monai import MGIPT, Source
from mgipt_monai.methods import Guard
from mgipt_monai.networks import (
    ConfidenceEnsemble,
    FrequencyPrompt,
    GlobalPrompts,
    InstancePrompt,
    PhotometricJitter,
    SiteStatistics,
)
from tests.conftest import assert_batch_equals_one_by_one, identical, same_state, snapshot, stream, tiny_network


def test_network_is_bit_identical_after_a_stream(network: nn.Module, images: list[torch.Tensor]) -> None:
    before = snapshot(network)
    names = list(network.state_dict())
    mgipt = MGIPT(network.train(), steps=2)
    for image in images:
        mgipt(image)
    assert identical(before, snapshot(network))
    assert list(network.state_dict()) == names
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any("forward" in layer.__dict__ for layer in network.modules())


def test_adaptation_lowers_the_loss_and_changes_the_prediction(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    mgipt = MGIPT(network)
    for image in images:
        adapted = mgipt(image)
        record = mgipt.last[0]
        assert record["loss_after"] < record["loss_before"]
        assert not torch.equal(adapted, Source(network)(image))


def test_numbers_are_read_as_often_however_many_steps_there_are() -> None:
    # a GPU is waited for at each reading
    class Readings(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []
    for steps in (1, 6):
        mgipt = MGIPT(tiny_network(), InstancePrompt(steps=steps, early_stop=False))
        with Readings() as readings:
            mgipt(stream(1)[0])
        counts.append(readings.count)
    # all that comes on top is Adam's own count of steps, which lies on the CPU
    assert counts[1] - counts[0] == 3 * 5


def test_state_size_is_constant_and_a_few_hundred_numbers(mgipt: MGIPT) -> None:
    sizes = set()
    for image in stream(6):
        mgipt(image)
        state = mgipt.adaptation_state()
        sizes.add(sum(prompt.numel() for role in ("students", "teachers") for prompt in state[role]))
    assert sizes == {2 * 3 * (9 + 25 + 49)}


def test_state_holds_tensors_and_plain_types_and_loads_weights_only(mgipt: MGIPT, images: list[torch.Tensor]) -> None:
    mgipt(images[0])
    file = io.BytesIO()
    torch.save(mgipt.adaptation_state(), file)
    file.seek(0)
    assert same_state(torch.load(file, weights_only=True), mgipt.adaptation_state())


def test_state_holds_no_image_content(images: list[torch.Tensor]) -> None:
    # an image moves each number of a student by the learning rate, up, down or not at all: a sign is all that it leaves
    mgipt = MGIPT(tiny_network(), steps=1)
    mgipt(images[0])
    for prompt in mgipt.adaptation_state()["students"]:
        moves = (prompt - 1).abs()
        assert torch.all((moves < 1e-6) | ((moves - 0.05).abs() < 1e-3))


def test_same_seed_and_stream_are_bit_identical(images: list[torch.Tensor]) -> None:
    runs = []
    for _ in range(2):
        mgipt = MGIPT(tiny_network(), steps=3, seed=5)
        runs.append([mgipt(image) for image in images])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_global_random_state_is_neither_used_nor_changed(images: list[torch.Tensor]) -> None:
    import random

    import numpy as np

    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        outputs.append(MGIPT(tiny_network_with_rng_kept(), steps=2)(images[0]))
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all()
        assert before[2] == random.getstate()
    assert torch.equal(*outputs)


def tiny_network_with_rng_kept() -> nn.Module:
    with torch.random.fork_rng():
        return tiny_network()


class _RecordedJitter(PhotometricJitter):
    def __init__(self) -> None:
        super().__init__()
        self.views: list[torch.Tensor] = []

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.views.append(super().__call__(image))
        return self.views[-1]


def test_jitter_depends_on_the_seed_and_the_image_index_alone() -> None:
    image = stream(1)[0]

    def views(seed: int, index: int) -> list[torch.Tensor]:
        jitter = _RecordedJitter()
        mgipt = MGIPT(tiny_network(), jitter=jitter, steps=1, seed=seed)
        mgipt.images_seen = index
        mgipt(image)
        return jitter.views

    assert torch.equal(views(0, 0)[0], views(0, 0)[0])
    assert not torch.equal(views(0, 0)[0], views(1, 0)[0])
    assert not torch.equal(views(0, 0)[0], views(0, 1)[0])
    assert not torch.equal(*views(0, 0)[:2])


def test_batch_gives_what_its_images_give_one_by_one(images: list[torch.Tensor]) -> None:
    assert_batch_equals_one_by_one(lambda: MGIPT(tiny_network(), steps=2), images)


def test_saving_and_resuming_equals_not_stopping(images: list[torch.Tensor]) -> None:
    whole = MGIPT(tiny_network(), steps=2)
    expected = [whole(image) for image in images]
    first = MGIPT(tiny_network(), steps=2)
    outputs = [first(image) for image in images[:2]]
    second = MGIPT(tiny_network(), steps=2)
    second.load_adaptation_state(first.adaptation_state())
    outputs += [second(image) for image in images[2:]]
    assert all(torch.equal(one, other) for one, other in zip(expected, outputs, strict=True))
    assert same_state(whole.adaptation_state(), second.adaptation_state())


def test_reset_starts_the_stream_anew(mgipt: MGIPT, images: list[torch.Tensor]) -> None:
    fresh = mgipt.adaptation_state()
    first = mgipt(images[0])
    mgipt(images[1])
    mgipt.reset()
    assert same_state(mgipt.adaptation_state(), fresh)
    assert mgipt.last == []
    assert torch.equal(mgipt(images[0]), first)


def test_returned_state_is_a_copy(mgipt: MGIPT, images: list[torch.Tensor]) -> None:
    mgipt(images[0])
    state = mgipt.adaptation_state()
    kept = copy.deepcopy(state)
    state["teachers"][0].zero_()
    assert same_state(mgipt.adaptation_state(), kept)


def test_works_under_no_grad_inference_mode_and_autocast(images: list[torch.Tensor]) -> None:
    expected = MGIPT(tiny_network(), steps=2)(images[0])
    with torch.no_grad():
        assert torch.equal(MGIPT(tiny_network(), steps=2)(images[0]), expected)
    mgipt = MGIPT(tiny_network(), steps=2)
    with torch.inference_mode():
        assert torch.equal(mgipt(images[0].clone()), expected)
    mgipt(images[1])  # nothing made under inference_mode is left behind
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(MGIPT(tiny_network(), steps=2)(images[0]), expected)


def test_output_needs_no_gradient_and_double_input_is_taken(mgipt: MGIPT, images: list[torch.Tensor]) -> None:
    logits = mgipt(images[0].double())
    assert not logits.requires_grad
    assert logits.dtype == torch.float32


def test_meta_data_of_the_image_stay_with_the_logits(mgipt: MGIPT, images: list[torch.Tensor]) -> None:
    image = MetaTensor(images[0], meta={"filename_or_obj": "eye.png", "affine": torch.eye(4)})
    logits = mgipt(image)
    assert isinstance(logits, MetaTensor)
    assert logits.meta["filename_or_obj"] == "eye.png"
    assert torch.equal(logits.as_tensor(), MGIPT(tiny_network(), steps=2)(images[0]))


@pytest.mark.parametrize(("dims", "channels", "classes"), [(1, 1, 1), (2, 1, 1), (2, 4, 3), (3, 1, 2), (3, 2, 1)])
def test_any_dimension_and_number_of_channels(dims: int, channels: int, classes: int) -> None:
    mgipt = MGIPT(tiny_network(dims, channels, classes), steps=1, global_sizes=(3, 5))
    (image,) = stream(1, size=12, channels=channels, dims=dims)
    assert mgipt(image).shape == (1, classes, *[12] * dims)


def test_odd_sizes_that_are_not_square(mgipt: MGIPT) -> None:
    assert mgipt(torch.rand(1, 3, 17, 30, generator=torch.Generator().manual_seed(0))).shape == (1, 2, 17, 30)


def test_softmax_head_is_checked_by_argmax(images: list[torch.Tensor]) -> None:
    mgipt = MGIPT(tiny_network(out_channels=3), head="softmax", steps=2)
    assert mgipt(images[0]).shape == (1, 3, 24, 24)
    with pytest.raises(ValueError, match="at least two channels"):
        MGIPT(tiny_network(out_channels=1), head="softmax", steps=1)(images[0])


def test_monai_unet_with_all_its_batch_norms_is_aligned() -> None:
    unet = UNet(2, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1, norm="batch")
    mgipt = MGIPT(unet, steps=1)
    assert mgipt(stream(1, size=32, channels=1)[0]).shape == (1, 2, 32, 32)
    assert len(mgipt.norms.layers) == sum(isinstance(m, nn.BatchNorm2d) for m in unet.modules())


def test_cost_is_what_the_paper_states(images: list[torch.Tensor]) -> None:
    mgipt = MGIPT(tiny_network())
    calls = []
    # a hook before the forward, since those that are run for the loss alone end early
    mgipt.network.register_forward_pre_hook(lambda _module, inputs: calls.append(len(inputs[0])))
    for image in images:
        calls.clear()
        mgipt(image)
        record = mgipt.last[0]
        tried = len(record["consistency"])
        assert record["forwards"] == sum(calls) == 3 + 7 * tried + 2 * tried + 4
        assert record["backwards"] == 3 + 7 * tried
        assert record["forwards"] + record["backwards"] in (42, 58)


def test_ensemble_fuses_the_instance_prompt_and_the_teachers(images: list[torch.Tensor]) -> None:
    mgipt = MGIPT(tiny_network(), steps=2)
    fused = mgipt(images[0])
    views = torch.cat([mgipt.instance_prompt(images[0]), mgipt.global_prompts(images[0])])
    with torch.no_grad():
        assert torch.equal(fused, mgipt.ensemble(mgipt.norms.predict(views, "calibrated")))


def test_parts_can_be_left_out(images: list[torch.Tensor]) -> None:
    instance_only = MGIPT(tiny_network(), steps=2, global_sizes=())
    assert instance_only(images[0]).shape == (1, 2, 24, 24)
    assert instance_only.last[0]["global_losses"] == []
    global_only = MGIPT(tiny_network(), instance_sizes=())
    assert global_only(images[0]).shape == (1, 2, 24, 24)
    assert (global_only.last[0]["forwards"], global_only.last[0]["backwards"]) == (6, 3)
    assert global_only.last[0]["loss_before"] is None
    assert len(global_only.last[0]["global_losses"]) == 3


@pytest.mark.parametrize("tuning", ["instance", "released"])
def test_every_way_to_normalise_while_tuning_can_be_chosen(tuning: str, images: list[torch.Tensor]) -> None:
    mgipt = MGIPT(tiny_network(), tuning=tuning, steps=2)
    losses = []
    for image in images[:2]:
        mgipt(image)
        losses.append(mgipt.last[0]["loss_before"])
    reference = {"released": ("instance", "calibrated")}.get(tuning, (tuning, tuning))
    for image, loss, how in zip(images, losses, reference, strict=False):
        assert loss == pytest.approx(mgipt.norms.loss(image, how).item(), rel=1e-4)


def test_objects_and_their_settings_exclude_each_other(network: nn.Module) -> None:
    MGIPT(network, InstancePrompt(steps=3), GlobalPrompts((3,)), ConfidenceEnsemble(), PhotometricJitter())
    with pytest.raises(ValueError, match="set lr, steps on the InstancePrompt"):
        MGIPT(network, InstancePrompt(), lr=0.1, steps=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuning": "batch"}, "'batch'"),
        ({"head": "relu"}, "'relu'"),
        ({"source_weight": 1.5}, "1.5"),
        ({"lr": -1}, "-1"),
        ({"steps": 0}, "0"),
        ({"instance_sizes": (1, 4)}, r"\(1, 4\)"),
        ({"global_sizes": (0,)}, r"\(0,\)"),
        ({"global_sizes": (), "instance_sizes": ()}, "both empty"),
        ({"aligned_layers": "decoder"}, "'decoder' matches no batch norm"),
    ],
)
def test_wrong_settings_fail_at_construction_with_the_value(settings: dict, message: str, network: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        MGIPT(network, **settings)


def test_network_without_usable_norm_layer_is_refused_with_what_it_has() -> None:
    with pytest.raises(ValueError, match="found 2 x InstanceNorm2d"):
        MGIPT(UNet(2, 1, 1, channels=(4, 8), strides=(2,), norm="instance"))


def test_torchscript_network_is_refused() -> None:
    with pytest.raises(TypeError, match="TorchScript"):
        MGIPT(torch.jit.trace(tiny_network().eval(), torch.rand(1, 3, 8, 8)))


def test_method_around_a_method_is_refused(mgipt: MGIPT) -> None:
    with pytest.raises(TypeError, match="already adapts"):
        MGIPT(mgipt)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.clone().index_fill_(3, torch.tensor([2]), float("nan")), "NaN or infinite"),
        (lambda x: x * float("inf"), "NaN or infinite"),
        (lambda x: torch.full_like(x, 0.5), "constant"),
        (lambda x: x[:, :2], "channels"),
        (lambda x: x[..., :5, :5], "smaller than a prompt of side 7"),
        (lambda x: x[0, 0], "batch of images"),
    ],
)
def test_bad_image_is_an_error_that_leaves_the_state_bit_identical(spoil, message: str) -> None:
    images = stream(3)
    mgipt, clean = (MGIPT(tiny_network(), steps=2) for _ in range(2))
    for method in (mgipt, clean):
        method(images[0])
    with pytest.raises((ValueError, RuntimeError), match=message):
        mgipt(spoil(images[1]))
    assert same_state(mgipt.adaptation_state(), clean.adaptation_state())
    assert torch.equal(mgipt(images[2]), clean(images[2]))


def test_failure_in_the_middle_of_a_batch_undoes_the_whole_batch(mgipt: MGIPT) -> None:
    good = stream(1)[0]
    before = mgipt.adaptation_state()
    mgipt.norms.network.register_forward_pre_hook(_FailAfter(40))
    with pytest.raises(RuntimeError, match="broken"):
        mgipt(torch.cat([good, good]))
    assert same_state(mgipt.adaptation_state(), before)
    assert not any("forward" in layer.__dict__ for layer in mgipt.network.modules())


class _FailAfter:
    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, *_args: object) -> None:
        self.calls -= 1
        if self.calls < 30:
            raise RuntimeError("broken")


def test_wrong_states_are_refused_and_change_nothing(mgipt: MGIPT, images: list[torch.Tensor]) -> None:
    mgipt(images[0])
    good = mgipt.adaptation_state()
    other_sizes = MGIPT(tiny_network(), steps=1, global_sizes=(3,))
    other_sizes(images[0])
    nan = copy.deepcopy(good)
    nan["students"][1][0, 0, 0, 0] = float("nan")
    cases = [
        ({}, "lacks images_seen, method"),
        ({**good, "version": 99}, "version 99"),
        ({**good, "method": "VPTTA"}, "method 'VPTTA'"),
        (other_sizes.adaptation_state(), r"sizes \(3,\)"),
        (nan, "not finite"),
    ]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            mgipt.load_adaptation_state(state)
        assert same_state(mgipt.adaptation_state(), good)


def test_deepcopy_and_pickle_go_on_alike_and_apart(images: list[torch.Tensor]) -> None:
    mgipt = MGIPT(tiny_network(), steps=2)
    mgipt(images[0])
    copies = [copy.deepcopy(mgipt), pickle.loads(pickle.dumps(mgipt))]
    expected = mgipt(images[1])
    for other in copies:
        assert other.network is not mgipt.network
        assert torch.equal(other(images[1]), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoint_of_the_plain_network_loads_into_the_method(strict: bool) -> None:
    # a pipeline whose network is replaced by the method keeps its checkpoint loader
    mgipt = MGIPT(tiny_network(seed=1))
    plain = tiny_network(seed=2).state_dict()
    assert mgipt.load_state_dict(plain, strict=strict) == torch.nn.Module().load_state_dict({})
    assert identical(snapshot(mgipt.network), plain)
    mgipt.load_state_dict(MGIPT(tiny_network(seed=3)).state_dict())
    assert identical(snapshot(mgipt.network), snapshot(tiny_network(seed=3)))
    with pytest.raises(RuntimeError, match="Missing key"):
        mgipt.load_state_dict({key: value for key, value in plain.items() if key != "0.bias"})


def test_two_methods_can_share_a_network(images: list[torch.Tensor]) -> None:
    shared = tiny_network()
    one, other = MGIPT(shared, steps=2), MGIPT(shared, steps=2, source_weight=0.5)
    alone = MGIPT(tiny_network(), steps=2)
    for image in images[:2]:
        result = one(image)
        other(image)
        assert torch.equal(result, alone(image))


def test_bind_keeps_the_state_on_a_copied_network(images: list[torch.Tensor]) -> None:
    mgipt, untouched = (MGIPT(tiny_network(), steps=2) for _ in range(2))
    for method in (mgipt, untouched):
        method(images[0])
    mgipt.bind(copy.deepcopy(mgipt.network).train().requires_grad_(True))
    assert torch.equal(mgipt(images[1]), untouched(images[1]))


def test_printing_the_method_shows_the_settings_of_its_parts() -> None:
    printed = repr(MGIPT(tiny_network(), steps=4, guard=Guard(min_agreement=0.8)))
    for text in ("InstancePrompt(sizes=(1, 3, 5), steps=4", "GlobalPrompts(sizes=(3, 5, 7)", "min_agreement=0.8"):
        assert text in printed
    for part in (ConfidenceEnsemble(), SiteStatistics(), FrequencyPrompt(2, 3, 5)):
        assert "=" in repr(part)
