# SPDX-License-Identifier: Apache-2.0
"""MGIPT's map of where its views disagree: how long it lasts, and that nothing else notices."""

from __future__ import annotations

import copy

import pytest
import torch

from mgipt_monai import MGIPT
from mgipt_monai.methods import Guard
from tests.conftest import same_state, tiny_network


def test_map_of_each_image_of_the_latest_call(images: list[torch.Tensor]) -> None:
    mgipt, single = MGIPT(tiny_network(), steps=1), MGIPT(tiny_network(), steps=1)
    assert mgipt.uncertainty is None
    mgipt(torch.cat(images[:2]))
    alone = []
    for image in images[:2]:
        single(image)
        alone.append(single.uncertainty)
    assert mgipt.uncertainty.shape == (2, 1, 24, 24)
    assert torch.equal(mgipt.uncertainty, torch.cat(alone))
    assert 0 < mgipt.uncertainty.max() <= 1
    assert all(0 < record["disagreement"] <= 1 for record in mgipt.last)


def test_one_prompt_alone_does_not_disagree(images: list[torch.Tensor]) -> None:
    mgipt = MGIPT(tiny_network(), steps=1, global_sizes=())
    mgipt(images[0])
    assert mgipt.uncertainty.max() < 1e-6


def test_map_is_no_part_of_state_settings_or_copies_and_goes_with_reset(images: list[torch.Tensor]) -> None:
    mgipt = MGIPT(tiny_network(), steps=1)
    keys = set(mgipt.adaptation_state())
    settings = mgipt.settings()
    mgipt(images[0])
    assert set(mgipt.adaptation_state()) == keys
    assert mgipt.settings() == settings
    assert not any("uncertainty" in key for key in mgipt.state_dict())
    other = copy.deepcopy(mgipt)
    before = mgipt.uncertainty.clone()
    other(images[1])
    assert torch.equal(mgipt.uncertainty, before)
    assert same_state(other.adaptation_state(), (mgipt(images[1]), mgipt.adaptation_state())[1])
    mgipt.reset()
    assert mgipt.uncertainty is None


def test_no_map_is_left_of_a_call_that_fails(images: list[torch.Tensor]) -> None:
    mgipt = MGIPT(tiny_network(), steps=1)
    mgipt(images[0])
    with pytest.raises(ValueError, match="constant"):
        mgipt(torch.ones(1, 3, 24, 24))
    assert mgipt.uncertainty is None


def test_map_is_that_of_the_views_where_the_guard_falls_back(images: list[torch.Tensor]) -> None:
    plain, guarded = (
        MGIPT(tiny_network(), steps=1),
        MGIPT(tiny_network(), steps=1, guard=Guard(max_prompt=0.0, max_drift=None)),
    )
    plain(images[0])
    guarded(images[0])
    assert guarded.last[0]["decision"] == "unadapted"
    assert torch.equal(guarded.uncertainty, plain.uncertainty)
    assert guarded.last[0]["disagreement"] == plain.last[0]["disagreement"]
