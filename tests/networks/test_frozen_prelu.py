# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mgipt_monai.networks import AlignedNorms
from mgipt_monai.networks.alignment.shortcuts import FrozenPReLU


def network(slope: float, parameters: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.PReLU(parameters, slope), nn.BatchNorm2d(3))
    return layers.eval().requires_grad_(False)


@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5, 1.0])
def test_values_and_gradients_are_those_of_the_layer_bit_for_bit(slope: float) -> None:
    layer = nn.PReLU(init=slope).requires_grad_(False)
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    for forward in (frozen := FrozenPReLU(layer)).forward, layer:
        made = forward(x)
        assert torch.equal(made, layer(x))
        assert torch.equal(*(torch.autograd.grad(each.sin().sum(), x)[0] for each in (frozen.forward(x), layer(x))))


def forward_names(layers: nn.Module, images: Tensor) -> set[str]:
    """The names of the operations in the graph of the loss."""
    (loss,) = AlignedNorms(layers).loss(images.requires_grad_())
    names, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [other for other, _ in node.next_functions if other is not None]
    return names


def test_it_stands_in_for_a_frozen_layer_with_one_slope_alone() -> None:
    images = torch.rand(1, 2, 12, 12)
    assert "LeakyReluBackward0" in forward_names(network(0.3), images)
    assert "PreluKernelBackward0" in forward_names(network(0.3, parameters=3), images)
    trained = network(0.3)
    trained[2].requires_grad_(True)
    assert "PreluKernelBackward0" in forward_names(trained, images)


def test_the_network_has_its_own_layer_back() -> None:
    layers = network(0.3)
    AlignedNorms(layers).loss(torch.rand(1, 2, 12, 12))
    assert "forward" not in layers[2].__dict__
