# SPDX-License-Identifier: Apache-2.0
"""Weights in the images' memory format, kept for the length of an image."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from mgipt_monai.networks import AlignedNorms
from mgipt_monai.networks.alignment.shortcuts import ChannelsLast, FrozenConv
from tests.conftest import identical, snapshot, stream, tiny_network


def convolution(**settings: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, 3, **settings).requires_grad_(False)


@pytest.mark.parametrize("settings", [{}, {"padding": 1, "padding_mode": "reflect", "stride": 2}, {"groups": 2}])
def test_values_and_gradients_are_those_of_the_layer_bit_for_bit(settings: dict) -> None:
    layer, layout = convolution(**settings), ChannelsLast()
    layout.start()
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    made = [forward(x) for forward in (FrozenConv(layer, layout).forward, layer)]
    assert torch.equal(*made)
    assert torch.equal(*(torch.autograd.grad(each.sin().sum(), x)[0] for each in made))
    assert list(layout.weights) == [layer]
    assert layer.weight.is_contiguous()


def loss_and_gradient(norms: AlignedNorms, image: Tensor) -> tuple[Tensor, Tensor]:
    image = image.clone().requires_grad_()
    loss = norms.loss(image)
    return loss.detach(), torch.autograd.grad(loss.sum(), image)[0]


def test_an_image_keeps_copies_and_the_next_one_sees_changed_weights() -> None:
    network, image = tiny_network().eval().requires_grad_(False), stream(1)[0]
    norms, before = AlignedNorms(network), snapshot(network)
    outside = loss_and_gradient(norms, image)
    assert norms._layout.weights is None
    norms.start(image)
    assert all(torch.equal(*each) for each in zip(outside, loss_and_gradient(norms, image), strict=True))
    assert norms._layout.weights
    assert identical(before, snapshot(network))
    assert not any("forward" in layer.__dict__ for layer in network.modules())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = 2 * layer.weight.data
    norms.start(image)
    changed = AlignedNorms(copy.deepcopy(network))
    assert torch.equal(loss_and_gradient(norms, image)[0], loss_and_gradient(changed, image)[0])


def test_copies_are_in_no_pickle_and_no_deep_copy() -> None:
    network, image = tiny_network().eval().requires_grad_(False), stream(1)[0]
    norms = AlignedNorms(network)
    norms.start(image)
    norms.loss(image)
    for other in copy.deepcopy(norms), pickle.loads(pickle.dumps(norms)):
        assert other._layout.weights is None
        torch.testing.assert_close(other.loss(image), norms.loss(image))


def test_trained_weights_get_their_gradients() -> None:
    network, image = tiny_network().eval(), stream(1)[0]
    network.requires_grad_(False)
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    first.weight.requires_grad_(True)
    norms = AlignedNorms(network)
    norms.start(image)
    (gradient,) = torch.autograd.grad(norms.loss(image).sum(), first.weight)
    assert gradient.abs().sum() > 0
    assert first not in norms._layout.weights
