# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from mgipt_monai.networks import ConfidenceEnsemble, disagreement
from mgipt_monai.networks.ensemble import slabs


def by_hand(views: list[list[float]], factors: list[float], constant: bool = False) -> list[float]:
    """Eq. 7 at one voxel in plain Python: a list of logits per view to a list of logits."""
    confidences = []
    for logits in views:
        if len(logits) == 1:
            p = 1 / (1 + math.exp(-logits[0]))
            confidences.append(1.0 if constant else max(p, 1 - p))
        else:
            confidences.append(max(math.exp(z) for z in logits) / sum(math.exp(z) for z in logits))
    weights = [f * c / sum(confidences) for f, c in zip(factors, confidences, strict=True)]
    return [sum(w * logits[k] for w, logits in zip(weights, views, strict=True)) for k in range(len(views[0]))]


def test_two_views_of_one_voxel_worked_by_hand() -> None:
    # softmax confidences 3/4 and 1/2, so shares .6 and .4, times 2 and .5: weights 1.2 and .2
    logits = torch.tensor([[math.log(3), 0.0], [5.0, 5.0]]).view(2, 2, 1, 1)
    fused = ConfidenceEnsemble()(logits)
    assert fused.shape == (1, 2, 1, 1)
    assert fused.flatten().tolist() == pytest.approx([1.2 * math.log(3) + 1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("has_instance", [True, False])
def test_every_voxel_follows_the_formula(has_instance: bool, spatial: tuple[int, ...], channels: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, channels, *spatial) * 3
    fused = ConfidenceEnsemble()(logits, has_instance=has_instance)
    assert fused.shape == (1, channels, *spatial)
    factors = [2.0 if has_instance else 0.5, 0.5, 0.5, 0.5]
    voxels = logits.flatten(2)
    for voxel in range(voxels.shape[-1]):
        expected = by_hand(voxels[..., voxel].tolist(), factors)
        assert fused.flatten(2)[0, :, voxel].tolist() == pytest.approx(expected, abs=1e-5)


def test_factors_follow_the_settings() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 1, 1)
    fused = ConfidenceEnsemble(instance_factor=1.5, global_factor=0.25)(logits)
    expected = by_hand(logits.flatten(1).tolist(), [1.5, 0.25, 0.25])
    assert fused.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_whole_number_as_global_factor_keeps_the_instance_factor() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 1, 1)
    fused = ConfidenceEnsemble(instance_factor=2.5, global_factor=1)(logits)
    expected = by_hand(logits.flatten(1).tolist(), [2.5, 1.0, 1.0])
    assert fused.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("choice", "constant"), [("binary", False), ("constant", True)])
def test_one_channel_confidence_is_the_likelier_class_or_constant(choice: str, constant: bool) -> None:
    views = [[4.0], [-1.0], [0.2], [-3.0]]
    fused = ConfidenceEnsemble(one_channel=choice)(torch.tensor(views).view(4, 1, 1, 1))
    assert fused.item() == pytest.approx(by_hand(views, [2, 0.5, 0.5, 0.5], constant)[0], abs=1e-6)


def test_one_channel_confidence_is_binary_unless_told() -> None:
    logits = torch.tensor([math.log(3), -math.log(4)]).view(2, 1, 1, 1)
    assert ConfidenceEnsemble().confidence(logits).flatten().tolist() == pytest.approx([3 / 4, 4 / 5])
    # shares 15/31 and 16/31, times 2 and .5
    expected = 30 / 31 * math.log(3) - 8 / 31 * math.log(4)
    assert ConfidenceEnsemble()(logits).item() == pytest.approx(expected, abs=1e-6)


def test_constant_choice_concerns_one_channel_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 3, 3)
    assert torch.equal(ConfidenceEnsemble(one_channel="constant")(logits), ConfidenceEnsemble()(logits))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("n", "has_instance", "scale"), [(4, True, 0.875), (3, False, 0.5), (1, True, 2.0)])
def test_equal_logits_come_back_scaled(n: int, has_instance: bool, scale: float, channels: int) -> None:
    torch.manual_seed(0)
    one = torch.randn(1, channels, 4, 5)
    fused = ConfidenceEnsemble()(one.expand(n, -1, -1, -1), has_instance)
    torch.testing.assert_close(fused, scale * one)  # (2 + 3 * .5) / 4 = .875


def test_first_view_is_the_instance_prompts_unless_told() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 3, 3)
    fuse = ConfidenceEnsemble()
    assert torch.equal(fuse(logits), fuse(logits, has_instance=True))
    assert not torch.equal(fuse(logits), fuse(logits, has_instance=False))


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[500.0, -500.0], [-500.0, 500.0]])
    for views in (logits.view(2, 2, 1, 1), logits.view(4, 1, 1, 1)):
        assert torch.isfinite(ConfidenceEnsemble()(views)).all()


@pytest.mark.parametrize("setting", ["instance_factor", "global_factor"])
def test_negative_factor_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=r"factors must not be negative, got .*-0\.5"):
        ConfidenceEnsemble(**{setting: -0.5})


def test_unknown_one_channel_confidence_is_refused() -> None:
    with pytest.raises(ValueError, match="one_channel must be one of binary, constant; got 'softmax'"):
        ConfidenceEnsemble(one_channel="softmax")


def test_large_volumes_are_fused_and_compared_slab_by_slab() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 70, 64, 64)
    assert len(slabs(logits)) == 2
    fused, (uncertainty, mean) = ConfidenceEnsemble()(logits), disagreement(logits)
    whole = [ConfidenceEnsemble()(part) for part in logits.split(10, dim=2)]
    torch.testing.assert_close(fused, torch.cat(whole, dim=2))
    maps = [disagreement(part) for part in logits.split(10, dim=2)]
    torch.testing.assert_close(uncertainty, torch.cat([each for each, _ in maps], dim=2))
    assert 0 < mean < 1
    assert uncertainty.shape == (1, 1, 70, 64, 64)
