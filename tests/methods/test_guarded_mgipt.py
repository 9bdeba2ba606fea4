# SPDX-License-Identifier: Apache-2.0
"""MGIPT with a guard: what it falls back to, what it learns, what it remembers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from mgipt_monai import MGIPT, AdaptiveInferer, Source
from mgipt_monai.methods import Guard
from mgipt_monai.methods.guard.guard import THRESHOLDS, area_change
from mgipt_monai.networks import measure_source_statistics
from tests.conftest import MixedNet, assert_batch_equals_one_by_one, same_state, stream, tiny_network

OFF = dict.fromkeys(THRESHOLDS)
# limits that no image of these tests keeps within
NEVER = {
    "min_agreement": 1.0,
    "max_area_change": 1.0,
    "max_inconsistency": 0.0,
    "min_loss_drop": 1.0,
    "max_prompt": 0.0,
    "max_distance": 0.0,
    "max_drift": 0.0,
}


def source_network() -> nn.Module:
    """The tiny network with statistics measured over images, so that masks change under adaptation."""
    network = tiny_network().train()
    for layer in (network[1], network[4]):
        layer.reset_running_stats()
        layer.momentum = None
    with torch.no_grad():
        for image in stream(20, seed=9):
            network(image)
    return network


def guarded(network: nn.Module | None = None, warm_up: int = 2, **settings) -> MGIPT:
    """MGIPT of few steps with the given thresholds alone."""
    limits = {name: settings.pop(name) for name in list(settings) if name in OFF}
    guard = Guard(**{**OFF, **limits}, warm_up=warm_up)
    return MGIPT(source_network() if network is None else network, guard=guard, **{"steps": 2, **settings})


def prompts(mgipt: MGIPT) -> dict[str, list[torch.Tensor]]:
    return mgipt.global_prompts.adaptation_state()


def test_guard_without_thresholds_changes_nothing_but_the_cost(images: list[torch.Tensor]) -> None:
    mgipt, plain = guarded(), MGIPT(source_network(), steps=2)
    for image in images:
        assert torch.equal(mgipt(image), plain(image))
        record, expected = mgipt.last[0], plain.last[0]
        assert record["forwards"] == expected["forwards"] + 1
        assert {key: record[key] for key in expected if key != "forwards"} == {
            key: value for key, value in expected.items() if key != "forwards"
        }
        assert (record["decision"], record["learned"], record["reasons"]) == ("adapted", True, [])
    assert same_state(prompts(mgipt), prompts(plain))


def test_without_a_guard_state_and_record_have_no_trace_of_it(mgipt: MGIPT, images: list[torch.Tensor]) -> None:
    mgipt(images[0])
    assert set(mgipt.adaptation_state()) == {"version", "method", "images_seen", "students", "teachers", "memory"}
    assert not {"decision", "learned", "reasons", "signals"} & set(mgipt.last[0])


@pytest.mark.parametrize("name", list(THRESHOLDS))
def test_each_threshold_alone_stops_what_it_should(name: str, images: list[torch.Tensor]) -> None:
    mgipt, plain = guarded(**{name: NEVER[name]}), MGIPT(source_network(), steps=2)
    for image in images[:2]:
        mgipt(image), plain(image)
    before = prompts(mgipt)
    logits = mgipt(images[2])
    record = mgipt.last[0]
    assert len(record["reasons"]) == 1
    signal = THRESHOLDS[name].signal
    assert record["reasons"][0] == THRESHOLDS[name].words.format(record["signals"][signal], NEVER[name])
    assert not record["learned"]
    assert same_state(prompts(mgipt), before)
    if THRESHOLDS[name].refuses:
        assert record["decision"] == "unadapted"
        assert torch.equal(logits, Source(source_network())(images[2]))
        assert torch.equal(mgipt.adapted_input(images[2]), images[2])
    else:
        assert record["decision"] == "adapted"
        assert not torch.equal(logits, Source(source_network())(images[2]))
        assert not torch.equal(mgipt.adapted_input(images[2]), images[2])


def test_signals_are_what_they_say(images: list[torch.Tensor]) -> None:
    mgipt, plain, source = guarded(), MGIPT(source_network(), steps=2), Source(source_network())
    for image in images[:3]:
        mgipt(image)
        masks, others = plain(image) > 0, source(image) > 0
    signals, record = mgipt.last[0]["signals"], plain.last[0]
    assert all(isinstance(value, float) for value in signals.values())
    assert signals["agreement"] == pytest.approx(
        2 * (masks & others).sum().item() / (masks.sum() + others.sum()).item()
    )
    areas = [[mask.sum().item() + 1e-4 * 24 * 24 for mask in each[0]] for each in (masks, others)]
    ratios = [one / other for one, other in zip(*areas, strict=True)]
    assert signals["area_change"] == pytest.approx(max(*ratios, *(1 / ratio for ratio in ratios)))
    assert signals["inconsistency"] == record["consistency"][record["instance_size"]]
    assert signals["loss_drop"] == pytest.approx(1 - record["loss_after"] / record["loss_before"])
    drift = max((teacher - 1).abs().max().item() for teacher in plain.global_prompts.teachers)
    assert signals["drift"] == drift
    assert signals["prompt"] == max(drift, (plain.instance_prompt.amplitude - 1).abs().max().item())
    assert signals["loss"] == pytest.approx(plain.norms.loss(images[2], "source").item())


@pytest.mark.parametrize("part", ["instance_sizes", "global_sizes"])
def test_parts_that_are_left_out_are_not_judged(part: str, images: list[torch.Tensor]) -> None:
    only = {"instance_sizes": {"min_loss_drop": 1.0, "max_inconsistency": 0.0}, "global_sizes": {"max_drift": 0.0}}[
        part
    ]
    mgipt = guarded(**{part: ()}, **only)
    mgipt(images[0])
    assert mgipt.last[0]["reasons"] == []
    whole = guarded(**only)
    whole(images[0])
    assert len(whole.last[0]["reasons"]) == len(only)


def test_area_change_by_hand() -> None:
    def mask(*areas: int) -> torch.Tensor:
        flat = torch.zeros(1, len(areas), 10_000)
        for channel, area in enumerate(areas):
            flat[0, channel, :area] = 1
        return flat.view(1, len(areas), 100, 100)

    assert area_change(mask(500, 40), mask(500, 40)) == 1
    assert area_change(mask(500, 40), mask(500, 81)) == pytest.approx(2)
    assert area_change(mask(500, 81), mask(500, 40)) == pytest.approx(2)
    assert area_change(mask(500, 0), mask(500, 40)) == pytest.approx(41)  # empty
    assert area_change(mask(500, 1), mask(500, 0)) == pytest.approx(2)  # a voxel out of nothing
    assert area_change(mask(0), mask(0)) == 1


@pytest.mark.parametrize(
    ("part", "setting", "value"), [("instance_prompt", "lr", 3e37), ("ensemble", "instance_factor", float("inf"))]
)
def test_adaptation_that_is_not_finite_falls_back(
    part: str, setting: str, value: float, images: list[torch.Tensor]
) -> None:
    # a huge learning rate breaks the tuning, an infinite factor the prediction alone
    mgipt, unguarded, source = guarded(), MGIPT(source_network(), steps=2), Source(source_network())
    mgipt(images[0])
    before, right = prompts(mgipt), getattr(getattr(mgipt, part), setting)
    setattr(getattr(mgipt, part), setting, value)
    assert torch.equal(mgipt(images[1]), source(images[1]))
    record = mgipt.last[0]
    assert (record["decision"], record["learned"]) == ("unadapted", False)
    assert record["reasons"] == ["the adapted prediction is not finite"]
    assert set(record["signals"]) == {"loss", "repeated", "finite"}
    assert same_state(prompts(mgipt), before)
    setattr(getattr(mgipt, part), setting, right)
    mgipt(images[2])
    assert mgipt.last[0]["decision"] == "adapted"

    setattr(getattr(unguarded, part), setting, value)
    with pytest.raises((FloatingPointError, ValueError), match="not finite"):
        unguarded(images[1])


def test_unadapted_prediction_that_is_not_finite_is_an_error(images: list[torch.Tensor]) -> None:
    mgipt = guarded()
    mgipt(images[0])
    before = mgipt.adaptation_state()
    mgipt.network[-1].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the unadapted prediction or its loss is not finite: check the network"):
        mgipt(images[1])
    assert same_state(mgipt.adaptation_state(), before)


def test_five_hundred_times_the_same_image_move_the_prompts_as_once() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    mgipt = guarded(network, instance_sizes=(), global_sizes=(1,))
    (image,) = stream(1, size=8)
    mgipt(image)
    once = mgipt.adaptation_state()
    for _ in range(499):
        mgipt(image)
    assert mgipt.last[0]["reasons"] == ["the image repeats the previous one"]
    assert same_state({**mgipt.adaptation_state(), "images_seen": 1}, once)


def test_noise_in_a_stream_teaches_nothing() -> None:
    # images of half the contrast, which pull the prompts up; noise of triple contrast pulls them down
    clean = [0.5 * image for image in stream(30)]
    generator = torch.Generator().manual_seed(3)
    noisy, noise = list(clean), range(9, 30, 5)
    for i in noise:
        noisy[i] = 3 * torch.rand(1, 3, 24, 24, generator=generator)
    left_out = [image for i, image in enumerate(clean) if i not in noise]

    def teacher(images: list[torch.Tensor], max_distance: float | None) -> torch.Tensor:
        mgipt = guarded(source_network(), 5, max_distance=max_distance, instance_sizes=(), global_sizes=(1,))
        for image in images:
            mgipt(image)
        return mgipt.global_prompts.teachers[0]

    kept = teacher(noisy, max_distance=4.0)
    assert torch.equal(kept, teacher(left_out, None))
    # near the clean stream's: what is missing is a step of 0.05 for each image that was replaced
    assert (kept - teacher(clean, None)).abs().max() < 0.05 * (len(noise) + 1)
    assert (teacher(noisy, None) - teacher(clean, None)).abs().max() > 0.05 * (len(noise) + 1)


def test_drift_is_reset_along_a_stream() -> None:
    mgipt = guarded(max_drift=0.3, instance_sizes=())
    drifts, learned = [], []
    for image in stream(20):
        mgipt(image)
        drifts.append(max((teacher - 1).abs().max().item() for teacher in mgipt.global_prompts.teachers))
        learned.append(mgipt.last[0]["learned"])
    assert not all(learned)
    for drift, kept in zip(drifts, learned, strict=True):
        assert drift <= (0.3 if kept else 0.15)


def test_resuming_equals_not_stopping_and_the_state_size_is_constant() -> None:
    images = stream(8)
    settings = {"max_distance": 1.0, "min_agreement": 0.9, "max_drift": 0.1}
    whole, first, second = (guarded(**settings) for _ in range(3))
    expected, sizes = [], []
    for image in images:
        expected.append((whole(image), whole.last))
        sizes.append(sum(p.numel() for p in whole.global_prompts.teachers + whole.guard.good["teachers"]))
    assert {done[0]["learned"] for _, done in expected} == {True, False}
    assert len(set(sizes[3:])) == 1
    for image in images[:4]:
        first(image)
    file = io.BytesIO()
    torch.save(first.adaptation_state(), file)
    file.seek(0)
    second.load_adaptation_state(torch.load(file, weights_only=True))
    for image, (logits, done) in zip(images[4:], expected[4:], strict=True):
        assert torch.equal(second(image), logits)
        assert second.last == done
    assert same_state(second.adaptation_state(), whole.adaptation_state())


def test_batch_gives_what_its_images_give_one_by_one(images: list[torch.Tensor]) -> None:
    assert_batch_equals_one_by_one(lambda: guarded(min_agreement=0.95, max_distance=1.0), images)


def test_reset_forgets_the_guards_memory_too(images: list[torch.Tensor]) -> None:
    mgipt = guarded(max_drift=1.0)
    fresh = mgipt.adaptation_state()
    mgipt(images[0])
    assert not same_state(mgipt.adaptation_state(), fresh)
    mgipt.reset()
    assert same_state(mgipt.adaptation_state(), fresh)


def test_an_error_rolls_the_guards_memory_back(images: list[torch.Tensor]) -> None:
    mgipt = guarded(max_drift=1.0)
    mgipt(images[0])
    before = mgipt.adaptation_state()
    with pytest.raises(ValueError, match="constant"):
        mgipt(torch.cat([images[1], torch.ones_like(images[1])]))
    mgipt.ensemble.register_forward_hook(_fail_at_the_second_image())
    with pytest.raises(RuntimeError, match="broken"):
        mgipt(torch.cat(images[1:3]))
    assert same_state(mgipt.adaptation_state(), before)


def _fail_at_the_second_image():
    calls = []

    def hook(*_args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("broken")

    return hook


def test_states_without_a_guards_memory_or_with_a_wrong_one_are_refused(images: list[torch.Tensor]) -> None:
    mgipt = guarded(max_drift=1.0)
    mgipt(images[0])
    good = mgipt.adaptation_state()
    without = {key: value for key, value in good.items() if key != "guard"}
    wrong = copy.deepcopy(good)
    wrong["guard"]["teachers"][0][0, 0, 0, 0] = float("nan")
    for state, message in ((without, "lacks guard"), (wrong, "teachers are not finite")):
        with pytest.raises(ValueError, match=message):
            mgipt.load_adaptation_state(state)
        assert same_state(mgipt.adaptation_state(), good)


def test_deepcopy_and_pickle_go_on_alike_and_apart(images: list[torch.Tensor]) -> None:
    mgipt = guarded(max_distance=1.0)
    for image in images[:2]:
        mgipt(image)
    copies = [copy.deepcopy(mgipt), pickle.loads(pickle.dumps(mgipt))]
    mgipt(images[2])
    for other in copies:
        other(images[2])
        assert other.last == mgipt.last


def test_windows_and_networks_without_batch_norm_are_guarded_too(images: list[torch.Tensor]) -> None:
    mgipt = guarded(min_agreement=1.0)
    inferer = SlidingWindowInferer(roi_size=16, sw_batch_size=3)
    expected = inferer(images[0], source_network().eval())
    assert torch.allclose(AdaptiveInferer(mgipt, inferer)(images[0], mgipt.network), expected, atol=1e-6)
    assert mgipt.last[0]["decision"] == "unadapted"

    network = MixedNet()
    statistics = measure_source_statistics(network, stream(3, seed=5))
    mgipt = guarded(network, min_agreement=1.0, statistics=statistics)
    with torch.no_grad():
        assert torch.equal(mgipt(images[0]), network(images[0]))
    assert mgipt.last[0]["decision"] == "unadapted"


def test_thresholds_are_among_the_methods_settings() -> None:
    settings = guarded(min_agreement=0.8).settings()
    assert settings["guard"] == {"min_agreement": 0.8, "warm_up": 2}
