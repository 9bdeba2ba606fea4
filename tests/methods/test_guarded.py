# SPDX-License-Identifier: Apache-2.0
"""A guard around methods other than MGIPT."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from monai.engines import SupervisedEvaluator
from torch import nn

from mgipt_monai import (
    MGIPT,
    VPTTA,
    AdaptationMethod,
    BatchNormAdaptation,
    SiteCorrection,
    Source,
    Tent,
    TestTimeAdaptationHandler,
)
from mgipt_monai.methods import CoTTA, DyNo, Guard, Guarded
from mgipt_monai.methods.guard.guard import THRESHOLDS
from tests.conftest import assert_batch_equals_one_by_one, identical, same_state, snapshot, stream, tiny_network

OFF = dict.fromkeys(THRESHOLDS)
METHODS: dict[str, Callable[[nn.Module], AdaptationMethod]] = {
    "vptta": VPTTA,
    "steady": SiteCorrection,
    "bn": BatchNormAdaptation,
    "dyno": DyNo,
    "tent": lambda network: Tent(network, lr=0.01),
    "cotta": CoTTA,
    "source": Source,
}


@pytest.mark.parametrize("name", METHODS)
def test_guard_without_thresholds_changes_nothing_but_the_cost(name: str, images: list[torch.Tensor]) -> None:
    plain, guarded = METHODS[name](tiny_network()), Guarded(METHODS[name](tiny_network()), Guard(**OFF))
    for image in images:
        assert torch.equal(guarded(image), plain(image))
        record, expected = guarded.last[0], plain.last[0]
        assert record["forwards"] == expected["forwards"] + 1
        assert all(record[key] == value for key, value in expected.items() if key != "forwards")
        assert (record["decision"], record["learned"], record["reasons"]) == ("adapted", True, [])
    state = guarded.adaptation_state()
    assert same_state({key: value for key, value in state.items() if key != "guard"}, plain.adaptation_state())


@pytest.mark.parametrize("name", METHODS)
def test_refused_image_is_predicted_as_the_source_and_teaches_nothing(name: str, images: list[torch.Tensor]) -> None:
    guarded = Guarded(METHODS[name](tiny_network()), Guard(**{**OFF, "min_agreement": 1.0}))
    guarded.guard.min_agreement = 1.1  # no prediction agrees so well
    before = guarded.method._state()
    assert torch.equal(guarded(images[0]), Source(tiny_network())(images[0]))
    record = guarded.last[0]
    assert (record["decision"], record["learned"], guarded.images_seen) == ("unadapted", False, 1)
    assert same_state(guarded.method._state(), before)


@pytest.mark.parametrize("name", METHODS)
def test_resuming_equals_not_stopping_and_the_network_stays(name: str, images: list[torch.Tensor]) -> None:
    def build() -> Guarded:
        return Guarded(METHODS[name](tiny_network()), Guard(max_distance=1.0, min_agreement=0.5, warm_up=2))

    whole, first, second = build(), build(), build()
    before = snapshot(whole.network)
    expected = [whole(image) for image in images]
    for image in images[:2]:
        first(image)
    second.load_adaptation_state(copy.deepcopy(first.adaptation_state()))
    assert all(torch.equal(second(image), logits) for image, logits in zip(images[2:], expected[2:], strict=True))
    assert same_state(second.adaptation_state(), whole.adaptation_state())
    assert identical(before, snapshot(whole.network))
    whole.reset()
    assert same_state(whole.adaptation_state(), build().adaptation_state())


def test_batch_equals_one_by_one(images: list[torch.Tensor]) -> None:
    assert_batch_equals_one_by_one(lambda: Guarded(VPTTA(tiny_network()), Guard(max_distance=1.0)), images)


def test_mgipts_argument_builds_the_wrapper(images: list[torch.Tensor]) -> None:
    guard, other = Guard(min_agreement=0.95), Guard(min_agreement=0.95)
    built, wrapped = MGIPT(tiny_network(), steps=1, guard=guard), Guarded(MGIPT(tiny_network(), steps=1), other)
    assert type(built) is type(wrapped) is Guarded
    assert built.guard is guard
    assert built.settings() == wrapped.settings()
    assert built.settings()["class"] == "MGIPT"
    assert built.instance_prompt.steps == 1
    assert all(torch.equal(built(image), wrapped(image)) for image in images)


def test_it_is_found_and_copied_like_the_method(images: list[torch.Tensor]) -> None:
    guarded = Guarded(VPTTA(tiny_network()))
    guarded(images[0])
    for other in (copy.deepcopy(guarded), pickle.loads(pickle.dumps(guarded)), guarded.twin()):
        assert torch.equal(other(images[1]), copy.deepcopy(guarded)(images[1]))
    assert guarded.memory_size == 40
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = guarded.no_such_thing


def test_checkpoint_of_the_plain_network_loads_into_it() -> None:
    trained = tiny_network(seed=3)
    guarded = Guarded(MGIPT(tiny_network(), steps=1))
    guarded.load_state_dict(trained.state_dict())
    assert identical(snapshot(guarded.network), snapshot(trained))


def test_it_runs_in_an_evaluator_and_a_failure_leaves_no_trace() -> None:
    network = tiny_network()
    method = Guarded(VPTTA(network), Guard(max_distance=1.0))
    data = [{"image": image} for image in stream(3)]
    engine = SupervisedEvaluator("cpu", data, network=network)
    TestTimeAdaptationHandler(method).attach(engine)
    engine.run()
    before = method.adaptation_state()
    with pytest.raises(ValueError, match="constant"):
        method(torch.cat([data[0]["image"], torch.ones(1, 3, 24, 24)]))
    assert same_state(method.adaptation_state(), before)


def test_wrong_arguments_fail_at_construction(network: nn.Module) -> None:
    with pytest.raises(TypeError, match="without a guard, such as MGIPT"):
        Guarded(Guarded(VPTTA(network)))
    with pytest.raises(TypeError, match="got Sequential"):
        Guarded(network)
    bare = nn.Sequential(nn.Conv2d(3, 2, 1))
    with pytest.raises(ValueError, match="stores no source statistics"):
        Guarded(Source(bare))
