# SPDX-License-Identifier: Apache-2.0
"""Stacks of few slices take anisotropic prompts, and channels with clicks or guidance stay as they are."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SimpleInferer

from mgipt_monai import MGIPT, VPTTA, AdaptiveInferer
from mgipt_monai.networks import FrequencyPrompt, GlobalPrompts, InstancePrompt, LowFrequencies
from tests.conftest import assert_batch_equals_one_by_one, same_state, stream, tiny_network


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_a_thin_volume_takes_the_zero_frequency_of_its_short_axis(axis: int, centred: bool) -> None:
    sides = [12, 11, 10]
    sides[axis - 2] = 4
    volume = torch.rand(1, 2, *sides)
    prompt = 1 + torch.rand(1, 2, 5, 5, 5)
    prompted = LowFrequencies(volume, 5, centred).apply(prompt)

    # the same change of the mean along the axis as of a flat image, in every slice
    flat = volume.mean(axis)
    middle = prompt.select(axis, 2 if centred else 3)
    change = LowFrequencies(flat, 5, centred).apply(middle) - flat
    torch.testing.assert_close(prompted - volume, change.unsqueeze(axis).expand_as(volume), atol=1e-5, rtol=0)


def test_thick_and_thin_volumes_share_a_stream() -> None:
    thick, thin = stream(2, size=12, channels=1, dims=3)
    images = [thick, thin[..., :4], thick]
    mgipt = MGIPT(tiny_network(3, 1), steps=1)
    for image in images:
        assert mgipt(image).shape[2:] == image.shape[2:]
    assert_batch_equals_one_by_one(lambda: MGIPT(tiny_network(3, 1), steps=1), [thin[..., :4], thick[..., :4]])


def test_a_thin_volume_leaves_the_rest_of_the_prompts_alone() -> None:
    prompts = GlobalPrompts((3, 5))
    prompts.step(stream(1, size=12, channels=1, dims=3)[0][..., :2], lambda x: x.square().mean((1, 2, 3, 4)))
    for student in prompts.students:
        middle = student.shape[-1] // 2
        assert student[..., middle].ne(1).any()
        assert student[..., :middle].eq(1).all()
        assert student[..., middle + 1 :].eq(1).all()


@pytest.mark.parametrize("sides", [(4, 12), (4, 4, 12)])
def test_images_that_are_small_in_another_way_are_refused(sides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is smaller than a prompt of side 5"):
        FrequencyPrompt(len(sides), 1, 5)(torch.rand(1, 1, *sides))


@pytest.mark.parametrize("z_scored", [False, True])
def test_exempt_channels_keep_every_bit(z_scored: bool) -> None:
    image = stream(1)[0] - (0.5 if z_scored else 0)
    seen = []
    network = tiny_network()
    network.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    for method in (
        MGIPT(network, steps=2, prompted_channels=[0, 2]),
        MGIPT(network, InstancePrompt(steps=1, channels=[0, 2]), GlobalPrompts(channels=[0, 2])),
        VPTTA(network, prompted_channels=[0, 2]),
    ):
        seen.clear()
        AdaptiveInferer(method, SimpleInferer())(image, network)
        assert all(torch.equal(one[1], image[0, 1]) for views in seen for one in views)
        assert any(not torch.equal(one[0], image[0, 0]) for views in seen for one in views)


def test_all_channels_named_give_the_same_bits_as_none() -> None:
    image = stream(1)[0]
    named, plain = (MGIPT(tiny_network(), steps=1, prompted_channels=channels) for channels in ([0, 1, 2], None))
    assert torch.equal(named(image), plain(image))
    assert same_state(named.adaptation_state(), plain.adaptation_state())


def test_channels_that_cannot_be_are_refused() -> None:
    for channels in ([], [0, 0], [-1], [0.5]):
        with pytest.raises(ValueError, match="different whole numbers from 0"):
            MGIPT(tiny_network(), prompted_channels=channels)
    with pytest.raises(ValueError, match="the image has 3 channels, none of number 3"):
        MGIPT(tiny_network(), prompted_channels=[3])(stream(1)[0])
