# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgipt_monai.networks import consistency_score, got_worse
from mgipt_monai.networks.prompts.early_stop import binarize, check_head

SMOOTH = 1e-5


def sigmoid_logits(*channels: list[int]) -> Tensor:
    """Logits of one row of voxels whose sigmoid is above a half exactly where the masks are one."""
    masks = torch.tensor(channels, dtype=torch.float32)
    return (masks * 3.0 - 0.7)[None, :, None]


def softmax_logits(labels: list[int], classes: int = 3) -> Tensor:
    """Logits of one row of voxels, all negative, whose largest channel is the label."""
    logits = torch.full((1, classes, 1, len(labels)), -5.0)
    for voxel, label in enumerate(labels):
        logits[0, label, 0, voxel] = -1.0
    return logits


def test_sigmoid_score_is_one_dice_over_all_channels_worked_by_hand() -> None:
    one = sigmoid_logits([1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0])
    other = sigmoid_logits([0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0])
    # 5 and 5 voxels, 3 in common: 1 - 6 / 10. Channel by channel it would be (1 - 6 / 8 + 1) / 2 = 0.625
    assert consistency_score(one, other) == pytest.approx(1 - (6 + SMOOTH) / (10 + SMOOTH), abs=1e-6)
    assert consistency_score(one, other, "sigmoid") == consistency_score(one, other)


def test_softmax_score_leaves_the_background_out_worked_by_hand() -> None:
    one, other = softmax_logits([0, 0, 0, 1, 1, 2]), softmax_logits([0, 0, 1, 1, 2, 2])
    # 3 and 4 foreground voxels, 2 with the same label: 1 - 4 / 7. With the background it would be 1 - 8 / 12
    assert consistency_score(one, other, "softmax") == pytest.approx(1 - (4 + SMOOTH) / (7 + SMOOTH), abs=1e-6)


def test_score_is_of_masks_and_not_of_probabilities() -> None:
    one = sigmoid_logits([1, 0, 1], [0, 1, 1])
    other = sigmoid_logits([1, 1, 1], [0, 1, 0])
    expected = consistency_score(one, other)
    assert consistency_score(one * 50, other * 0.01) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("spatial", [(20,), (9, 8), (5, 4, 6)])
@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_score_of_random_logits_follows_the_formula(head: str, spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    pair = torch.randn(2, 1, 3, *spatial)
    if head == "sigmoid":
        one, other = torch.sigmoid(pair) > 0.5
    else:
        labels = pair.argmax(dim=2)
        one, other = torch.stack([labels == k for k in (1, 2)], dim=2)
    both = (one & other).sum().item()
    expected = 1 - (2 * both + SMOOTH) / (one.sum().item() + other.sum().item() + SMOOTH)
    score = consistency_score(*pair, head)
    assert isinstance(score, float)
    assert 0.2 < score < 0.8
    assert score == pytest.approx(expected, abs=1e-6)
    assert consistency_score(*pair.flip(0), head) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_score_is_zero_for_the_same_mask(head: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 9, 8)
    assert consistency_score(logits, logits.clone(), head) == pytest.approx(0, abs=1e-7)


def test_score_is_nearly_one_for_masks_apart() -> None:
    assert consistency_score(sigmoid_logits([1, 1, 0, 0]), sigmoid_logits([0, 0, 1, 1])) == pytest.approx(1, abs=1e-4)
    one, other = softmax_logits([1, 1, 0, 2]), softmax_logits([2, 0, 1, 1])
    assert consistency_score(one, other, "softmax") == pytest.approx(1, abs=1e-4)


def test_score_is_nearly_one_where_only_one_mask_is_empty() -> None:
    assert consistency_score(sigmoid_logits([1, 1, 0, 0]), sigmoid_logits([0] * 4)) == pytest.approx(1, abs=1e-4)


def test_score_is_zero_where_both_masks_are_empty() -> None:
    empty = sigmoid_logits([0] * 4, [0] * 4)
    assert consistency_score(empty, empty * 2) == pytest.approx(0, abs=1e-7)
    background = softmax_logits([0] * 4)
    assert consistency_score(background, background * 0.5, "softmax") == pytest.approx(0, abs=1e-7)


def test_masks_are_every_channel_for_sigmoid_and_the_foreground_for_softmax() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [1.0, -3.0, 4.0]]).view(1, 2, 1, 3)
    assert binarize(logits, "sigmoid").view(2, 3).tolist() == [[1, 0, 1], [1, 0, 1]]
    assert binarize(logits, "softmax").view(1, 3).tolist() == [[0, 0, 1]]


def test_softmax_head_with_one_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two channels; use head='sigmoid'"):
        consistency_score(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), "softmax")


@pytest.mark.parametrize("head", ["argmax", "", "Sigmoid"])
def test_unknown_head_is_refused(head: str) -> None:
    with pytest.raises(ValueError, match=rf"head must be one of sigmoid, softmax; got '{head}'"):
        check_head(head)
    check_head("sigmoid")
    check_head("softmax")


@pytest.mark.parametrize(
    ("previous", "score", "worse"),
    [(0.1, 0.2, True), (0.2, 0.1, False), (0.2, 0.2, False), (0.0, 0.0, False), (0.0, 1e-9, True)],
)
def test_worse_is_a_strictly_larger_distance(previous: float, score: float, worse: bool) -> None:
    assert got_worse(previous, score) is worse
