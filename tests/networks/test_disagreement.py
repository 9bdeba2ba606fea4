# SPDX-License-Identifier: Apache-2.0
"""The disagreement of views: what it is for views that agree, split, and are merely unsure."""

from __future__ import annotations

import math

import pytest
import torch

from mgipt_monai.networks import disagreement
from mgipt_monai.networks.ensemble import disagreement_map

SURE = 40.0


def rand_logits(views: int, channels: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(views, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("head", "channels"), [("sigmoid", 1), ("sigmoid", 3), ("softmax", 3)])
def test_identical_views_and_a_single_view_give_zero(head: str, channels: int) -> None:
    logits = rand_logits(1, channels)
    for views in (logits, logits.repeat(4, 1, 1, 1)):
        uncertainty, mean = disagreement(views, head)
        assert uncertainty.shape == (1, 1, 8, 8)
        assert uncertainty.max() < 1e-6
        assert 0 <= mean < 1e-6


@pytest.mark.parametrize(("head", "channels"), [("sigmoid", 1), ("softmax", 2)])
def test_opposite_sure_views_give_one(head: str, channels: int) -> None:
    sign = torch.tensor([1.0, -1.0])[:channels].view(1, -1, 1, 1) * torch.ones(1, channels, 8, 8)
    uncertainty, mean = disagreement(SURE * torch.cat([sign, -sign]), head)
    assert torch.allclose(uncertainty, torch.ones(1, 1, 8, 8))
    assert mean == pytest.approx(1)


def test_as_many_sure_views_as_classes_give_one() -> None:
    logits = SURE * torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4)
    assert disagreement(logits, "softmax")[0].min() == pytest.approx(1)


def test_value_is_the_mutual_information_in_bits() -> None:
    # probabilities .9 and .5: by hand
    logits = torch.tensor([math.log(9), 0.0]).view(2, 1, 1, 1)
    entropies = [-sum(p * math.log2(p) for p in (q, 1 - q)) for q in (0.7, 0.9, 0.5)]
    expected = entropies[0] - (entropies[1] + entropies[2]) / 2
    assert disagreement(logits)[0].item() == pytest.approx(expected, abs=1e-6)


def test_views_that_are_unsure_alike_do_not_disagree() -> None:
    assert disagreement(torch.zeros(4, 2, 8, 8))[0].max() == 0


def test_structure_with_the_largest_value_counts() -> None:
    logits = rand_logits(4, 3)
    alone = torch.stack([disagreement(logits[:, k : k + 1])[0] for k in range(3)])
    assert torch.equal(disagreement(logits)[0], alone.amax(dim=0))


def test_mean_of_two_sure_views_is_one_less_intersection_over_union_whatever_the_background() -> None:
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, :, 2:8, 2:8] = 1
    masks[1, :, 4:10, 2:8] = 1
    for background in (0, 40):
        logits = torch.nn.functional.pad(SURE * (2 * masks - 1), [background] * 4, value=-SURE)
        assert disagreement(logits)[1] == pytest.approx(1 - 24 / 48)


def test_no_structure_in_any_view_gives_zero_and_broken_views_give_one() -> None:
    assert disagreement(-rand_logits(3, 1).abs())[1] == 0
    uncertainty, mean = disagreement(torch.full((1, 2, 8, 8), torch.nan))
    assert uncertainty.min() == mean == 1


def test_softmax_needs_two_channels() -> None:
    with pytest.raises(ValueError, match="at least two channels"):
        disagreement(torch.zeros(2, 1, 4, 4), "softmax")


@pytest.mark.parametrize(("head", "channels"), [("sigmoid", 1), ("sigmoid", 3), ("softmax", 2), ("softmax", 4)])
def test_the_map_of_windows_is_that_of_images(head: str, channels: int) -> None:
    for scale in (0.1, 1.0, 30.0):
        logits = scale * rand_logits(3, channels)
        logits[:, :, 0] = -9.0 * scale  # where no view sees a structure, not even a softmax head's
        if head == "softmax":
            logits[:, 0, 0] = 9.0 * scale
        uncertainty, mean = disagreement(logits, head)
        found, seen = disagreement_map(logits, head)
        assert torch.allclose(found, uncertainty, atol=2e-6)
        assert not seen[0].any()
        assert seen[1:].any()
        assert found[0, 0][seen].mean().item() == pytest.approx(mean, abs=1e-5)
    logits[1, 0, 0, 0] = math.nan
    found, seen = disagreement_map(logits, head)
    assert found[0, 0, 0, 0] == 1
    assert seen[0, 0]
