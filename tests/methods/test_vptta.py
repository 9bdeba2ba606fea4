# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mgipt_monai import VPTTA
from mgipt_monai.networks import BlendedNorms, LowFrequencies
from tests import golden_inputs
from tests.conftest import assert_batch_equals_one_by_one, identical, same_state, snapshot, stream, tiny_network

DATA = Path(__file__).parent.parent / "golden"


def small(**settings: object) -> VPTTA:
    """A memory that is full after three images, used from the third on."""
    return VPTTA(tiny_network(), **{"memory_size": 3, "neighbours": 2, **settings})


def test_released_setting_matches_the_released_outputs() -> None:
    golden = np.load(DATA / "vptta_seed11.npz")
    vptta = VPTTA.released(golden_inputs.network(11))
    for i in range(20):
        probability = vptta(golden_inputs.image(11000 + i)).sigmoid()[0]
        np.testing.assert_allclose(probability[:, ::16, ::16], golden[f"out{i}"], atol=1e-4)
        np.testing.assert_allclose(vptta.prompts[-1][0], golden[f"prompt{i}"], atol=1e-3)
        area = (probability > 0.5).sum(dim=(1, 2)).numpy()
        assert np.abs(area - golden[f"mask_area{i}"]).max() <= 2


def test_released_side_is_a_hundredth_of_the_image_unless_overridden() -> None:
    network = tiny_network()
    assert [VPTTA.released(network, image_side=side).side for side in (32, 352, 512)] == [1, 3, 5]
    polyp = VPTTA.released(network, image_side=352, lr=0.01, side=4, centred=True, start="memory")
    assert (polyp.lr, polyp.side, polyp.centred, polyp.start) == (0.01, 4, True, "memory")


def test_network_is_bit_identical_after_a_stream(network: nn.Module) -> None:
    before = snapshot(network)
    vptta = VPTTA(network.train(), memory_size=3, neighbours=2)
    for image in stream(5):
        vptta(image)
    assert identical(before, snapshot(network))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any("forward" in layer.__dict__ for layer in network.modules())


@pytest.mark.parametrize("start", ["memory", "latest"])
def test_same_stream_is_bit_identical(start: str) -> None:
    one, other = ([vptta(image) for image in stream(5)] for vptta in (small(start=start), small(start=start)))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_prompt_starts_from_ones_until_there_are_enough_neighbours() -> None:
    network = tiny_network()
    vptta = VPTTA(network)
    for n, image in enumerate(stream(17), start=1):
        vptta(image)
        current = 1 / (math.sqrt(n) / 5 + 1)
        plain = BlendedNorms(network, source_weight=1 - current).loss(image, "calibrated").item()
        assert (vptta.last[0]["loss_before"] == pytest.approx(plain, rel=1e-5)) == (n <= 16)


def test_prompt_starts_from_a_mix_of_the_most_similar_images_prompts() -> None:
    vptta = small(side=1)
    vptta.amplitudes = [torch.tensor(a).view(1, 3, 1, 1) for a in ([3.0, 4.0, 0.0], [0.0, 0.0, 1.0], [2.0, 0.0, 0.0])]
    vptta.prompts = [torch.full((1, 3, 1, 1), value) for value in (1.0, 9.0, 2.0)]
    weights = np.exp([0.6 / 0.2, 1 / 0.2])  # cosines of the first and the last, the two nearest
    expected = (weights @ [1.0, 2.0]) / weights.sum()
    start = vptta._initial_prompt(torch.tensor([5.0, 0.0, 0.0]).view(1, 3, 1, 1))
    torch.testing.assert_close(start, torch.full((1, 3, 1, 1), expected, dtype=torch.float32))


def test_latest_start_goes_on_from_the_previous_prompt(images: list[torch.Tensor]) -> None:
    vptta = small(start="latest")
    vptta(torch.cat(images[:2]))
    previous = vptta.prompts[-1].clone()
    vptta(images[2])
    prompted = LowFrequencies(images[2], 5).apply(previous)
    assert vptta.last[0]["loss_before"] == pytest.approx(vptta.norms.loss(prompted, "calibrated").item(), rel=1e-5)


def test_memory_is_first_in_first_out_and_bounded() -> None:
    vptta, images, prompts = small(), stream(6), []
    for image in images:
        vptta(image)
        prompts.append(vptta.prompts[-1])
    assert len(vptta.prompts) == len(vptta.amplitudes) == 3
    assert all(torch.equal(kept, made) for kept, made in zip(vptta.prompts, prompts[-3:], strict=True))
    for amplitude, image in zip(vptta.amplitudes, images[-3:], strict=True):
        low = torch.fft.fftshift(torch.fft.fft2(image).abs() / (24 * 24), dim=(2, 3))[..., 10:15, 10:15]
        torch.testing.assert_close(amplitude, low)


def test_default_memory_holds_forty_images_and_the_record_says_how_many() -> None:
    vptta = VPTTA(tiny_network(), side=1)
    vptta(torch.cat(stream(42)))
    assert [record["memory"] for record in vptta.last] == [*range(1, 41), 40, 40]
    assert sum(tensor.numel() for tensor in vptta.adaptation_state()["amplitudes"]) == 40 * 3


def test_cost_is_two_forwards_and_one_backward(images: list[torch.Tensor]) -> None:
    vptta, calls = small(), []
    vptta.network.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    for image in images:
        calls.clear()
        vptta(image)
        assert (vptta.last[0]["forwards"], vptta.last[0]["backwards"]) == (sum(calls), 1) == (2, 1)


def test_step_lowers_the_loss(images: list[torch.Tensor]) -> None:
    vptta = VPTTA(tiny_network())
    vptta(images[0])
    prompted = LowFrequencies(images[0], 5).apply(vptta.prompts[0])
    assert vptta.norms.loss(prompted, "calibrated").item() < vptta.last[0]["loss_before"]


def test_batch_gives_what_its_images_give_one_by_one() -> None:
    assert_batch_equals_one_by_one(small, stream(5))


@pytest.mark.parametrize("start", ["memory", "latest"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_saving_and_resuming_equals_not_stopping(stop: int, start: str) -> None:
    images, whole, first, second = stream(7), *(small(start=start) for _ in range(3))
    expected = [whole(image) for image in images]
    outputs = [first(image) for image in images[:stop]]
    file = io.BytesIO()
    torch.save(first.adaptation_state(), file)
    file.seek(0)
    second.load_adaptation_state(torch.load(file, weights_only=True))
    outputs += [second(image) for image in images[stop:]]
    assert all(torch.equal(one, other) for one, other in zip(expected, outputs, strict=True))
    assert same_state(whole.adaptation_state(), second.adaptation_state())


def test_reset_starts_the_stream_anew(images: list[torch.Tensor]) -> None:
    vptta = small()
    fresh = vptta.adaptation_state()
    first = [vptta(image) for image in images]
    vptta.reset()
    assert same_state(vptta.adaptation_state(), fresh)
    assert all(torch.equal(vptta(image), logits) for image, logits in zip(images, first, strict=True))


def test_returned_state_is_a_copy(images: list[torch.Tensor]) -> None:
    vptta = small()
    vptta(images[0])
    state = vptta.adaptation_state()
    kept = copy.deepcopy(state)
    for name in ("amplitudes", "prompts", "moments"):
        state[name][0].zero_()
    assert same_state(vptta.adaptation_state(), kept)
    # neither does the stream write into a state handed out, or into a loaded one
    other = small()
    other.load_adaptation_state(kept)
    before = copy.deepcopy(kept)
    other(images[1])
    assert same_state(kept, before)


def test_deepcopy_pickle_and_bind_go_on_alike(images: list[torch.Tensor]) -> None:
    vptta = small()
    vptta(torch.cat(images[:3]))
    rebound = copy.deepcopy(vptta)
    rebound.bind(copy.deepcopy(vptta.network))
    copies = [copy.deepcopy(vptta), pickle.loads(pickle.dumps(vptta)), rebound]
    expected = vptta(images[3])
    assert all(torch.equal(other(images[3]), expected) for other in copies)


def test_works_under_inference_mode_and_autocast(images: list[torch.Tensor]) -> None:
    plain, inference = small(), small()
    expected = [plain(image) for image in images]
    with torch.inference_mode():
        assert torch.equal(inference(images[0].clone()), expected[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inference(images[1]), expected[1])
    assert torch.equal(inference(images[2]), expected[2])


@pytest.mark.parametrize(("dims", "channels", "classes"), [(1, 1, 1), (2, 1, 1), (2, 4, 3), (3, 1, 2)])
def test_any_dimension_and_number_of_channels(dims: int, channels: int, classes: int) -> None:
    vptta = VPTTA(tiny_network(dims, channels, classes), memory_size=2, neighbours=1)
    for image in stream(2, size=12, channels=channels, dims=dims):
        assert vptta(image).shape == (1, classes, *[12] * dims)
    assert vptta.prompts[-1].shape == (1, channels, *[5] * dims)


def test_images_of_a_stream_may_differ_in_size_but_not_in_channels(images: list[torch.Tensor]) -> None:
    vptta = VPTTA(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)), memory_size=2, neighbours=1)
    vptta(images[0])
    assert vptta(torch.cat([images[1], images[2]], dim=3)).shape == (1, 1, 24, 48)
    before = vptta.adaptation_state()
    with pytest.raises(ValueError, match=r"shape \(1, 2, 5, 5\), the stream's have \(1, 3, 5, 5\)"):
        vptta(images[3][:, :2])
    with pytest.raises(ValueError, match="smaller than a prompt of side 5"):
        vptta(images[3][..., :4])
    assert same_state(vptta.adaptation_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, "-1"),
        ({"betas": (0.9, 1.5)}, r"1\.5"),
        ({"side": 0}, "side .* got 0"),
        ({"side": 2.5}, r"side .* got 2\.5"),
        ({"memory_size": 0}, "memory_size .* got 0"),
        ({"neighbours": 0}, "neighbours .* got 0"),
        ({"neighbours": 41}, r"memory_size \(40\), got 41"),
        ({"warm_n": 0}, "warm_n .* got 0"),
        ({"start": "ones"}, "memory, latest; got 'ones'"),
        ({"aligned_layers": "decoder"}, "'decoder' matches no batch norm"),
    ],
)
def test_wrong_settings_fail_at_construction_with_the_value(settings: dict, message: str, network: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        VPTTA(network, **settings)


def test_wrong_states_are_refused_and_change_nothing(images: list[torch.Tensor]) -> None:
    vptta, larger, other_side = small(), small(memory_size=9), small(side=3)
    for method in (vptta, larger, other_side):
        method(torch.cat(images))
    good = vptta.adaptation_state()
    nan = copy.deepcopy(good)
    nan["prompts"][1][0, 0, 0, 0] = float("nan")
    cases = [
        ({}, "lacks amplitudes, images_seen"),
        ({**good, "method": "MGIPT"}, "method 'MGIPT'"),
        (larger.adaptation_state(), "'prompts': 4.* at most 3"),
        ({**good, "amplitudes": []}, "'amplitudes': 0"),
        ({**good, "moments": []}, "'moments': 0"),
        (other_side.adaptation_state(), r"\(1, 3, 3, 3\), this has side 5"),
        (nan, "not finite"),
    ]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            vptta.load_adaptation_state(state)
        assert same_state(vptta.adaptation_state(), good)
