# SPDX-License-Identifier: Apache-2.0
"""ResUNet against the keys and logits of the published network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mgipt_monai.networks.nets.resunet import ResUNet
from tests.golden_inputs import fill, image

DATA = Path(__file__).parents[1] / "golden"
BACKBONES = ("resnet34", "resnet50")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_state_dict_keys_are_the_published_ones(backbone: str) -> None:
    with np.load(DATA / f"resunet_{backbone}.npz") as golden:
        published = golden["keys"].tolist()
    assert [f"{key} {tuple(value.shape)}" for key, value in ResUNet(backbone).state_dict().items()] == published


@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_are_those_of_the_published_network(backbone: str) -> None:
    with np.load(DATA / f"resunet_{backbone}.npz") as golden:
        published = torch.from_numpy(golden["logits"])
    with torch.no_grad():
        logits = fill(ResUNet(backbone), 7)(image(70, 128))
    assert logits.shape == (1, 2, 128, 128)
    # measured 8e-6 and 1.3e-5 standard deviations; the nearest wrong structure is 0.03 off
    assert (logits[0, :, ::4, ::4] - published).abs().max() <= 1e-3 * published.std()


def test_channels_follow_the_arguments_and_sides_may_differ() -> None:
    net = ResUNet("resnet34", in_channels=1, out_channels=3).eval()
    with torch.no_grad():
        assert net(torch.rand(2, 1, 32, 64)).shape == (2, 3, 32, 64)


def test_gradient_reaches_the_input_for_prompt_tuning() -> None:
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ResUNet().eval()(x).square().sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_unknown_backbone_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'resnet18'.*'resnet34'.*'resnet50'"):
        ResUNet("resnet18")


@pytest.mark.parametrize("shape", [(1, 3, 64, 100), (1, 3, 0, 64), (3, 64, 64)])
def test_input_of_wrong_shape_is_refused_with_the_fix(shape: tuple[int, ...]) -> None:
    message = rf"\({', '.join(map(str, shape))}\).*multiples of 32.*pad"
    with pytest.raises(ValueError, match=message):
        ResUNet().eval()(torch.zeros(shape))
