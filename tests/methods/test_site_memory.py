# SPDX-License-Identifier: Apache-2.0
"""The memory of sites: nothing on one site, everything back after a jump, and a bound on what any image can do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from mgipt_monai import MGIPT, AdaptationMethod, SiteCorrection
from mgipt_monai.methods import Guard, SiteMemory
from mgipt_monai.methods.site_memory import CLIP, SETTLED
from tests.conftest import assert_batch_equals_one_by_one, same_state, stream, tiny_network

HOME = stream(24, size=16)


def strange(count: int, seed: int = 5, share: float = 0.1) -> list[torch.Tensor]:
    """Images much darker than those of the home site."""
    return [share * image for image in stream(count, size=16, seed=seed)]


def mgipt(**settings: Any) -> MGIPT:
    return MGIPT(tiny_network(), **{"steps": 1, "instance_sizes": (1, 3), "global_sizes": (3,), **settings})


def prompts_alone(**settings: Any) -> MGIPT:
    return mgipt(instance_sizes=(), **settings)


def steady(**settings: Any) -> SiteCorrection:
    return SiteCorrection(tiny_network(), **settings)


def guarded(**settings: Any) -> MGIPT:
    return mgipt(guard=Guard(max_drift=None, max_prompt=None), **settings)


METHODS = pytest.mark.parametrize("make", [mgipt, prompts_alone, steady, guarded], ids=lambda make: make.__name__)


def learnt(method: AdaptationMethod) -> dict[str, Any]:
    """The state without the memory and the place in the stream."""
    return {key: value for key, value in method.adaptation_state().items() if key not in ("memory", "images_seen")}


def counts(method: AdaptationMethod) -> list[int]:
    return [site["count"] for site in method.adaptation_state()["memory"]["sites"]]


def signature(value: float, spread: float = 0.0, seed: int = 0) -> torch.Tensor:
    return value + spread * torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))


def settled(memory: SiteMemory, value: float = 0.0, images: int = 30) -> None:
    """Let a memory see images of one site, with a spread of 1."""
    for seed in range(images):
        memory.visit(signature(value, 1.0, seed), lambda: {"at": value})


@METHODS
def test_on_one_site_nothing_changes(make: Callable[..., AdaptationMethod]) -> None:
    method, plain = make(), make(memory=None)
    for image in HOME[:10]:
        assert torch.equal(method(image), plain(image))
        assert method.last == [{**plain.last[0], "elsewhere": False}]
    assert len(counts(method)) <= 1  # a guard may keep it from learning
    assert "memory" not in plain.adaptation_state()


@METHODS
def test_after_a_jump_and_back_it_is_as_if_nothing_had_been(make: Callable[..., AdaptationMethod]) -> None:
    method, undisturbed = make(), make()
    for image in HOME[:12]:
        method(image), undisturbed(image)
    before = learnt(method)
    for image in strange(15):
        method(image)
    if "guard" not in before:  # a guard may keep it from learning
        assert not same_state(learnt(method), before)
        assert counts(method) == [15, 12]
    method.images_seen = undisturbed.images_seen  # it seeds the jitter
    for image in HOME[12:16]:
        assert torch.equal(method(image), undisturbed(image))
    if "guard" not in before:
        assert same_state(learnt(method), learnt(undisturbed))
        assert counts(method) == [16, 15]


def test_without_a_memory_a_jump_is_learnt_from() -> None:
    for make in (mgipt, steady):
        method, undisturbed = make(memory=None), make(memory=None)
        for image in HOME[:12]:
            method(image), undisturbed(image)
        for image in strange(15):
            method(image)
        method.images_seen = undisturbed.images_seen
        assert not torch.equal(method(HOME[12]), undisturbed(HOME[12]))


def test_a_new_site_goes_on_from_a_copy() -> None:
    method, plain = mgipt(), mgipt(memory=None)
    for image in [*HOME[:12], strange(1)[0]]:
        assert torch.equal(method(image), plain(image))
    assert counts(method) == [1, 12]
    assert same_state(learnt(method), learnt(plain))


def test_a_new_site_starts_from_the_nearest_and_not_from_the_latest() -> None:
    # else a good image that is a little unusual would go on from what an attack has left
    memory = SiteMemory()
    settled(memory)
    assert memory.visit(signature(100.0), lambda: {"at": "home"}) is None
    assert memory.visit(signature(10.0), lambda: {"at": "attack"}) == {"at": "home"}
    assert [site.learnt for site in memory._sites] == [None, {"at": "attack"}, {"at": "home"}]
    assert memory.visit(signature(0.0), lambda: {"at": "unusual"}) == {"at": "home"}


def test_first_images_count_as_one_site_whatever_they_are() -> None:
    method = steady(memory=SiteMemory(warm_up=6))
    for image in (HOME[0], strange(1)[0], *HOME[1:3], *strange(2)):
        method(image)
    assert counts(method) == [6]


def test_no_image_moves_a_site_by_more_than_its_share() -> None:
    for seed in range(20):
        memory = SiteMemory(max_distance=3.0)
        settled(memory)
        site = copy.deepcopy(memory._sites[0])
        image = signature(0.0, 2.9, seed)
        memory.visit(image, dict)
        moved = (memory._sites[0].averages - site.averages)[:2].abs()
        if memory._sites[0].count == site.count + 1:
            assert (moved <= CLIP * site.spread / (site.count + 1) + 1e-6).all()
            # nor widens it: the clipped image is at most 1.5 spreads away
            assert (memory._sites[0].spread <= site.spread * (1 + CLIP**2 / site.count)).all()


def test_an_image_far_away_does_not_touch_the_site() -> None:
    memory = SiteMemory()
    settled(memory)
    site = copy.deepcopy(vars(memory._sites[0]))
    assert memory.visit(signature(50.0), lambda: {"at": "home"}) is None
    assert torch.equal(memory._sites[1].averages, site["averages"])
    assert memory._sites[1].count == site["count"]
    assert memory._sites[1].learnt == {"at": "home"}
    assert memory.visit(signature(0.0), lambda: {"at": "away"}) == {"at": "home"}
    assert [each.learnt for each in memory._sites] == [None, {"at": "away"}]


def test_the_site_with_the_fewest_images_is_given_up_and_of_equals_the_oldest() -> None:
    memory = SiteMemory(sites=3)
    settled(memory, 0.0, 2 * SETTLED)
    for value in (50.0, 100.0, 150.0, 200.0):  # one image each
        memory.visit(signature(value), dict)
    assert [site.count for site in memory._sites] == [1, 1, 2 * SETTLED]
    assert [round(site.averages[0].mean().item()) for site in memory._sites[:2]] == [200, 150]
    # a settled site is given up only among settled ones, and then by age
    for value in (300.0, 400.0):
        settled(memory, value, 3 * SETTLED)
    assert [site.count for site in memory._sites] == [3 * SETTLED, 3 * SETTLED, 2 * SETTLED]
    memory.visit(signature(500.0), dict)
    assert [site.count for site in memory._sites] == [1, 3 * SETTLED, 3 * SETTLED]


def test_many_kinds_of_strange_images_do_not_push_the_home_site_out() -> None:
    method = steady()
    for image in HOME:
        method(image)
    before = learnt(method)
    for round_ in range(6):
        for share in (0.02, 0.1, 0.3, -0.5, -2.0, 3.0):
            method(strange(1, seed=round_, share=share)[0])
    sites = method.adaptation_state()["memory"]["sites"]
    assert len(sites) == 3
    assert any(same_state(site["learnt"], {"site": before["site"]}) for site in sites[1:])


@METHODS
def test_resumed_at_any_moment_it_ends_as_if_uninterrupted(make: Callable[..., AdaptationMethod]) -> None:
    images = [*HOME[:11], *strange(2), *HOME[11:13], *strange(2, share=-1.0), HOME[13]]
    whole = make()
    outputs = [whole(image) for image in images]
    for stop in (0, 1, 11, 12, 14, 16):
        first, second = make(), make()
        for image in images[:stop]:
            first(image)
        file = io.BytesIO()
        torch.save(first.adaptation_state(), file)
        file.seek(0)
        second.load_adaptation_state(torch.load(file, weights_only=True))
        for image, output in zip(images[stop:], outputs[stop:], strict=True):
            assert torch.equal(second(image), output)
        assert same_state(second.adaptation_state(), whole.adaptation_state())


@METHODS
def test_a_batch_equals_its_images_across_a_jump(make: Callable[..., AdaptationMethod]) -> None:
    assert_batch_equals_one_by_one(make, [*HOME[:11], *strange(2), HOME[11]])


@METHODS
def test_a_failed_image_leaves_no_trace_in_the_memory(make: Callable[..., AdaptationMethod]) -> None:
    method = make()
    for image in HOME[:11]:
        method(image)
    before = method.adaptation_state()

    def fail() -> None:
        with method.transaction():
            method(strange(1)[0])
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert same_state(method.adaptation_state(), before)


@METHODS
def test_a_twin_has_a_memory_of_its_own_until_it_takes_over(make: Callable[..., AdaptationMethod]) -> None:
    method = make()
    for image in HOME[:11]:
        method(image)
    before, twin = method.adaptation_state(), method.twin()
    twin(strange(1)[0])
    twin(HOME[11])
    assert same_state(method.adaptation_state(), before)
    after = twin.adaptation_state()
    method.become(twin)
    assert same_state(method.adaptation_state(), after)


@pytest.mark.parametrize("make", [mgipt, steady])
def test_the_states_size_is_constant_once_all_sites_are_known(make: Callable[..., AdaptationMethod]) -> None:
    def size(state: dict) -> int:
        tensors = [leaf for leaf in _leaves(state) if isinstance(leaf, torch.Tensor)]
        return sum(tensor.numel() for tensor in tensors)

    method, sizes = make(), []
    shares = (0.02, -3.0, 3.0, 0.3, -0.3)
    for image in [*HOME[:12], *(strange(1, seed=i, share=shares[i % 5])[0] for i in range(20)), *HOME[12:]]:
        method(image)
        sizes.append(size(method.adaptation_state()))
    assert len(set(sizes[15:])) == 1
    # no image content: less than one image holds, and no spatial axis but the prompts'
    assert sizes[-1] < 3 * (4 * 6 * 3 + 2 * 3 * 9)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for each in value for leaf in _leaves(each)] if isinstance(value, list) else [value]


@METHODS
def test_a_state_of_an_earlier_version_gets_a_fresh_memory(make: Callable[..., AdaptationMethod]) -> None:
    old, method, undisturbed = make(memory=None), make(), make()
    for image in HOME[:12]:
        old(image), undisturbed(image)
    method(strange(1)[0])
    method.load_adaptation_state(old.adaptation_state())
    assert counts(method) == []
    assert torch.equal(method(HOME[12]), old(HOME[12]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda memory: memory.clear(), "lacks sites"),
        (lambda memory: memory.update(sites={}), "list of at most 3"),
        (lambda memory: memory["sites"].extend(memory["sites"]), "list of at most 3"),
        (lambda memory: memory["sites"][0].pop("count"), "lacks count"),
        (lambda memory: memory["sites"][0].update(count=0), "number of a site's images"),
        (lambda memory: memory["sites"][0].update(count=2.5), "number of a site's images"),
        (lambda memory: memory["sites"][0].update(averages=None), "averages of a site must be a tensor"),
        (lambda memory: memory["sites"][1].update(averages=torch.zeros(4, 7)), "do not match: shape"),
        (lambda memory: memory["sites"][0].update(averages=torch.zeros(24)), "do not match: shape"),
        (lambda memory: memory["sites"][0]["averages"].fill_(float("nan")), "not finite"),
        (lambda memory: memory["sites"][0].update(learnt={}), "something learnt"),
        (lambda memory: memory["sites"][1].update(learnt=None), "something learnt"),
        (lambda memory: memory["sites"][1].update(learnt={}), "lacks"),
        (lambda memory: memory["sites"][1].update(learnt=[1]), "must be a dict"),
    ],
)
@pytest.mark.parametrize("make", [mgipt, steady, guarded])
def test_a_damaged_state_is_refused_and_changes_nothing(
    make: Callable[..., AdaptationMethod], change: Callable[[dict], Any], message: str
) -> None:
    method = make()
    if make is guarded:
        method.guard.max_area_change = method.guard.min_agreement = method.guard.max_distance = None
        method.guard.max_inconsistency = method.guard.min_loss_drop = None
    for image in [*HOME[:11], *strange(1)]:
        method(image)
    before = method.adaptation_state()
    assert counts(method) == [1, 11]
    damaged = copy.deepcopy(before)
    change(damaged["memory"])
    with pytest.raises(ValueError, match=message):
        method.load_adaptation_state(damaged)
    assert same_state(method.adaptation_state(), before)


def test_reset_forgets_the_sites() -> None:
    method, fresh = mgipt(), mgipt()
    for image in [*HOME[:11], *strange(1)]:
        method(image)
    method.reset()
    assert same_state(method.adaptation_state(), fresh.adaptation_state())
    assert torch.equal(method(HOME[0]), fresh(HOME[0]))


def test_the_memory_costs_no_forward() -> None:
    for make in (mgipt, prompts_alone, steady):
        method, plain = make(), make(memory=None)
        for image in HOME[:3]:
            method(image), plain(image)
            for key in ("forwards", "backwards"):
                assert method.last[0][key] == plain.last[0][key]


@pytest.mark.parametrize("make", [mgipt, prompts_alone, steady])
def test_it_works_through_windows(make: Callable[..., AdaptationMethod]) -> None:
    method, undisturbed = make(), make()
    for each in (method, undisturbed):
        each.predict_through(SlidingWindowInferer(roi_size=(12, 12)))
        for image in HOME[:12]:
            each(image)
    for image in strange(3):
        method(image)
    assert counts(method) == [3, 12]
    method.images_seen = undisturbed.images_seen
    assert torch.equal(method(HOME[12]), undisturbed(HOME[12]))
    assert same_state(learnt(method), learnt(undisturbed))


def test_the_released_method_has_no_memory() -> None:
    assert MGIPT.released(tiny_network()).memory is None
    assert mgipt().settings()["memory"] == {"max_distance": 2.0, "sites": 3, "horizon": 100, "warm_up": 10}
    assert "memory" not in mgipt(memory=None).settings()


def test_another_network_needs_a_reset() -> None:
    method = mgipt()
    method(HOME[0])
    other = tiny_network()
    other[0], other[1] = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.BatchNorm2d(5)
    other[3] = torch.nn.Conv2d(5, 6, 3, padding=1)
    method.bind(other)
    with pytest.raises(ValueError, match=r"5 channels, the known sites have 6: .* reset\(\)"):
        method(HOME[1])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_distance", 0), ("max_distance", float("inf")), ("sites", 1), ("horizon", 1.5), ("warm_up", 1)],
)
def test_wrong_settings_fail_with_the_value(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting} must .*{value}"):
        SiteMemory(**{setting: value})
