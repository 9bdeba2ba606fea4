# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DeepSupervisionLoss, DiceLoss
from torch import Tensor
from torch.nn import functional

from mgipt_monai.networks.nets.losses import BoundaryWeightedLoss


def logits_like(mask: Tensor) -> Tensor:
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))


def square(size: int = 24) -> Tensor:
    mask = torch.zeros(2, 1, size, size)
    mask[..., 6:15, 8:16] = 1
    return mask


def unweighted(logits: Tensor, mask: Tensor) -> Tensor:
    # MONAI counts the intersection twice, so the same smoothing is twice as large there
    iou = DiceLoss(sigmoid=True, jaccard=True, smooth_nr=2, smooth_dr=2)
    return functional.binary_cross_entropy_with_logits(logits, mask) + iou(logits, mask)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_without_a_boundary_it_is_plain_cross_entropy_and_soft_iou(value: float) -> None:
    mask = torch.full((2, 3, 40, 40), value)
    logits = logits_like(mask)
    torch.testing.assert_close(BoundaryWeightedLoss()(logits, mask), unweighted(logits, mask))


def test_without_strength_it_is_plain_for_any_mask() -> None:
    logits = logits_like(square())
    torch.testing.assert_close(BoundaryWeightedLoss(strength=0)(logits, square()), unweighted(logits, square()))
    assert not torch.isclose(BoundaryWeightedLoss()(logits, square()), unweighted(logits, square()))


def test_worked_by_hand() -> None:
    # a window of 3 over one inside pixel of three: means 1/2, 1/3, 0; weights 1 + 5/2, 1 + 10/3, 1 in each column
    mask = torch.tensor([[[[0.0, 1.0, 0.0, 0.0]]]])
    weights = [1 + 5 / 2, 1 + 5 * 2 / 3, 1 + 5 / 3, 1.0]
    probabilities = [0.5, 0.8, 0.1, 0.3]
    entropies = [-math.log(0.5), -math.log(0.8), -math.log(0.9), -math.log(0.7)]
    entropy = sum(w * e for w, e in zip(weights, entropies, strict=True)) / sum(weights)
    both = weights[1] * 0.8
    either = weights[0] * 0.5 + weights[1] * 1 + weights[2] * 0.1 + weights[3] * 0.3
    expected = entropy + 1 - (both + 1) / (either + 1)
    logits = torch.tensor(probabilities).logit().view(1, 1, 1, 4)
    assert BoundaryWeightedLoss(window=3)(logits, mask).item() == pytest.approx(expected, rel=1e-5)


def test_a_mistake_at_the_boundary_costs_more_than_one_far_from_it() -> None:
    mask = square(64)
    right = 20 * mask - 10
    costs = []
    for row, column in ((5, 12), (60, 60)):  # near the square, and far away
        wrong = right.clone()
        wrong[..., row, column] = 10
        costs.append(BoundaryWeightedLoss()(wrong, mask))
    assert costs[0] > 1.2 * costs[1] > 0


def test_each_image_and_channel_counts_alike() -> None:
    mask = torch.cat([square(), 1 - square()], dim=1)
    logits = logits_like(mask)
    loss = BoundaryWeightedLoss()
    alone = [loss(logits[i : i + 1, k : k + 1], mask[i : i + 1, k : k + 1]) for i in range(2) for k in range(2)]
    torch.testing.assert_close(loss(logits, mask), torch.stack(alone).mean())


def test_an_empty_mask_has_a_gradient_that_lowers_every_logit() -> None:
    logits = torch.zeros(1, 1, 8, 8, requires_grad=True)
    BoundaryWeightedLoss()(logits, torch.zeros(1, 1, 8, 8)).backward()
    assert (logits.grad > 0).all()


def test_deep_supervision_adds_the_outputs_losses_up() -> None:
    loss, mask = BoundaryWeightedLoss(), square()
    outputs = [scale * logits_like(mask) for scale in (3.0, 2.0, 1.0, 0.5)]
    total = DeepSupervisionLoss(loss, weight_mode="same")(outputs, mask)
    torch.testing.assert_close(total, torch.stack([loss(output, mask) for output in outputs]).sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 30}, "window must be a positive odd number of pixels, got 30"),
        ({"window": -1}, "got -1"),
        ({"strength": -0.5}, "strength must be at least 0, got -0.5"),
        ({"strength": math.nan}, "got nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoundaryWeightedLoss(**settings)


@pytest.mark.parametrize("shape", [(1, 1, 8, 9), (1, 8, 8)])
def test_shapes_that_differ_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape \(B, K, H, W\), got \(1, 1, 8, 8\)"):
        BoundaryWeightedLoss()(torch.zeros(1, 1, 8, 8), torch.zeros(shape))
