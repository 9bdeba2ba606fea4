# SPDX-License-Identifier: Apache-2.0
"""Forwards for the loss alone end at the last layer that is measured."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from mgipt_monai import MGIPT
from mgipt_monai.networks import AlignedNorms
from tests.conftest import stream, tiny_network


class Recorded(nn.Module):
    """A network of layers run in an order of its own, which is written down."""

    def __init__(self, order: str = "ab") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.BatchNorm2d(3) for name in "abc"})
        for layer in self.layers.values():
            layer.running_mean.normal_()
        self.conv, self.order, self.run = nn.Conv2d(3, 3, 3), order, ""
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.run = ""
        for name in self.order:
            x = self.layers[name](x).relu()
            self.run += name
        self.run += "|head"
        return self.conv(x)


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", ["ab", "ba", "aa", "abab", "abcb"])
def test_later_losses_end_at_the_last_layer_and_are_the_same(order: str) -> None:
    network = Recorded(order)
    norms, losses = AlignedNorms(network), []
    for expected in (order + "|head", order[:-1], order[:-1]):
        images = IMAGES.clone().requires_grad_()
        loss = norms.loss(images)
        (gradient,) = torch.autograd.grad(loss.sum(), images)
        losses.append((loss.detach(), gradient))
        assert network.run == expected
    for loss, gradient in losses[1:]:
        assert torch.equal(loss, losses[0][0])
        torch.testing.assert_close(gradient, losses[0][1], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("other", ["ba", "abc", "b", "cab"])
def test_another_order_is_run_whole_and_then_known(other: str) -> None:
    network = Recorded("acb")
    norms = AlignedNorms(network)
    norms.loss(IMAGES)
    network.order = other
    expected = AlignedNorms(network).loss(IMAGES)
    for run in (other + "|head", other[:-1]):
        assert torch.equal(norms.loss(IMAGES), expected)
        assert network.run == run


def test_each_image_begins_with_a_whole_forward() -> None:
    network = Recorded()
    norms = AlignedNorms(network)
    for _ in range(2):
        norms.start(IMAGES[:1])
        norms.loss(IMAGES[:1])
        assert network.run == "ab|head"
        norms.loss(IMAGES[:1])
        assert network.run == "a"


def test_predictions_are_whole_and_do_not_disturb() -> None:
    network = Recorded()
    norms = AlignedNorms(network)
    expected = norms.predict(IMAGES, "calibrated")
    norms.loss(IMAGES)
    assert torch.equal(norms.predict(IMAGES, "calibrated"), expected)
    assert torch.equal(norms.predict_and_measure(IMAGES[:1])[0], norms.predict(IMAGES[:1]))
    assert network.run == "ab|head"
    norms.loss(IMAGES)
    assert network.run == "a"


def test_a_forward_that_failed_is_not_learnt_from() -> None:
    network = Recorded()
    norms = AlignedNorms(network)
    norms.loss(IMAGES)
    network.order = "a?"
    with pytest.raises(KeyError):
        norms.loss(IMAGES)
    network.order = "ab"
    norms.loss(IMAGES)
    assert network.run == "a"


def test_a_network_that_catches_errors_does_not_catch_the_end() -> None:
    class Cautious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Recorded()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.body(x)
            except Exception:
                return x

    network = Cautious().eval()
    norms = AlignedNorms(network)
    assert torch.equal(norms.loss(IMAGES), norms.loss(IMAGES))
    assert not any("forward" in layer.__dict__ for layer in network.modules())


def test_copies_know_what_the_original_knew() -> None:
    norms = AlignedNorms(Recorded())
    expected = norms.loss(IMAGES)
    for clone in (copy.deepcopy(norms), pickle.loads(pickle.dumps(norms))):
        assert torch.equal(clone.loss(IMAGES), expected)
        assert clone.network.run == "a"


def test_head_is_run_for_the_checks_the_predictions_and_once_for_the_loss() -> None:
    network, heads = tiny_network(), []
    network[-1].register_forward_hook(lambda *_: heads.append(1))
    mgipt = MGIPT(network, steps=3)
    for image in stream(2):
        heads.clear()
        mgipt(image)
        assert len(heads) == 1 + len(mgipt.last[0]["consistency"]) + 1
