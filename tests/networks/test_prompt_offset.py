# SPDX-License-Identifier: Apache-2.0
"""Z-scored images: a factor on the zero frequency acts, ones change nothing, and other images are not affected."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mgipt_monai import MGIPT
from mgipt_monai.methods import VPTTA
from mgipt_monai.networks import FrequencyPrompt, GlobalPrompts, InstancePrompt, LowFrequencies, prompt_offset
from tests.conftest import assert_batch_equals_one_by_one, stream, tiny_network


def z_scored(count: int, channels: int = 3) -> list[torch.Tensor]:
    images = stream(count, channels=channels)
    spatial = (2, 3)
    return [(image - image.mean(spatial, keepdim=True)) / image.std(spatial, keepdim=True) for image in images]


def test_the_smallest_prompt_lowers_the_loss_of_a_z_scored_image() -> None:
    image = z_scored(1)[0]
    before = {}
    for offset in ("auto", "none"):
        mgipt = MGIPT(tiny_network(), steps=5, instance_sizes=(1,), global_sizes=(), offset=offset)
        mgipt(image)
        record = mgipt.last[0]
        before[offset] = record["loss_before"]
        moved = record["loss_before"] - record["loss_after"]
        assert moved > 1e-3 if offset == "auto" else abs(moved) < 1e-6
        assert (min(record["offset"]) > 1) == (offset == "auto")
    assert before["auto"] == before["none"]


@pytest.mark.parametrize("side", [1, 3, 4])
@pytest.mark.parametrize("shape", [(24,), (16, 17), (8, 9, 10)], ids=str)
def test_the_offset_is_added_before_and_subtracted_afterwards(shape: tuple[int, ...], side: int) -> None:
    image = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    offset = prompt_offset(image)
    moved = image + offset.view(2, 3, *[1] * len(shape))
    prompt = torch.rand(2, 3, *[side] * len(shape)) + 0.5

    prompted = LowFrequencies(image, side, offset=offset).apply(prompt)

    expected = LowFrequencies(moved, side).apply(prompt) - offset.view(2, 3, *[1] * len(shape))
    torch.testing.assert_close(prompted, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset", ["auto", "none", 2])
def test_ones_change_no_bit(offset: str | int) -> None:
    image = z_scored(1)[0]
    assert torch.equal(FrequencyPrompt(2, 3, 5, offset=offset)(image), image)
    assert torch.equal(GlobalPrompts((1, 3), offset=offset)(image), image.expand(2, -1, -1, -1))


def test_images_without_values_below_zero_are_prompted_as_they_are() -> None:
    image = stream(1)[0]
    assert image.min() >= 0
    assert prompt_offset(image).count_nonzero() == 0
    auto, none = (MGIPT(tiny_network(), steps=2, offset=offset) for offset in ("auto", "none"))
    assert torch.equal(auto(image), none(image))
    assert auto.last[0]["offset"] == [0.0, 0.0, 0.0]


def test_each_channel_and_image_has_its_own_offset() -> None:
    images = torch.cat([*stream(1), *z_scored(1)])
    images[0, 1] -= 0.25
    low = -images[0, 1].min().item()
    offsets = prompt_offset(images)
    assert offsets[0].tolist() == [0.0, pytest.approx(low), 0.0]
    assert torch.equal(offsets[1:], prompt_offset(images[1:]))
    assert torch.allclose(prompt_offset(images, 2), 2 * images.std(dim=(2, 3), correction=0))


def test_one_very_dark_voxel_decides_little() -> None:
    image = z_scored(1)[0]
    image[0, 0, 0, 0] = -1000.0
    std, mean = image[0, 0].std(correction=0), image[0, 0].mean()
    assert prompt_offset(image)[0, 0] + mean <= 3 * std + 1e-3


@pytest.mark.parametrize("method", [MGIPT, VPTTA])
def test_a_batch_of_z_scored_images_gives_what_they_give_one_by_one(method: type[nn.Module]) -> None:
    settings = {"steps": 1} if method is MGIPT else {}
    assert_batch_equals_one_by_one(lambda: method(tiny_network(), **settings), [*z_scored(2), *stream(1)])


def test_a_prompt_of_vptta_acts_on_a_z_scored_image() -> None:
    images = z_scored(2)
    changes = {}
    for offset in ("auto", "none"):
        vptta = VPTTA(tiny_network(), side=1, offset=offset)
        vptta(torch.cat(images))
        changes[offset] = (vptta.adapted_input(images[1]) - images[1]).abs().max().item()
    assert changes["none"] < 1e-6
    assert changes["auto"] > 1e-2


def test_the_released_methods_have_no_offset() -> None:
    image = z_scored(1)[0]
    for method in (MGIPT.released(tiny_network(), steps=1), VPTTA.released(tiny_network())):
        method(image)
        assert method.last[0]["offset"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("offset", ["mean", -1, float("nan"), True, None])
def test_an_unknown_offset_is_refused(offset: object) -> None:
    for part in (GlobalPrompts, InstancePrompt, lambda offset: VPTTA(tiny_network(), offset=offset)):
        with pytest.raises(ValueError, match="offset must be auto, none or a number"):
            part(offset=offset)


def test_without_an_offset_the_settings_are_those_of_earlier_states() -> None:
    settings = [MGIPT(tiny_network(), offset="none").settings(), VPTTA(tiny_network(), offset="none").settings()]
    assert not any(
        "offset" in part for part in (*settings, settings[0]["instance_prompt"], settings[0]["global_prompts"])
    )
    assert MGIPT(tiny_network()).settings()["instance_prompt"]["offset"] == "auto"
