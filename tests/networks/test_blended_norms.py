# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from mgipt_monai.networks import AlignedNorms, BlendedNorms
from tests.conftest import snapshot, stream, tiny_network


def reference(network: nn.Sequential, image: torch.Tensor, weight: float) -> torch.Tensor:
    """The loss against the blend, written out from the specification."""
    x, terms = image, []
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            mean, variance = x[0].flatten(1).mean(dim=1), x[0].flatten(1).var(dim=1)
            blend_mean = (weight * layer.running_mean + (1 - weight) * mean).detach()
            blend_variance = (weight * layer.running_var + (1 - weight) * variance).detach()
            terms.append((blend_mean - mean).abs().mean() + (blend_variance.sqrt() - variance.sqrt()).abs().mean())
            x = (x - blend_mean.view(-1, 1, 1)) / (blend_variance.view(-1, 1, 1) + layer.eps).sqrt()
            x = x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
        else:
            x = layer(x)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_against_a_blend_that_carries_no_gradient(weight: float) -> None:
    network = tiny_network().eval()
    image = stream(1)[0].requires_grad_()
    loss = BlendedNorms(network, source_weight=weight).loss(image, "calibrated")
    expected = reference(network, image, weight)
    torch.testing.assert_close(loss[0], expected, atol=1e-5, rtol=1e-5)
    if weight:  # without a share of the source the loss is zero, and its gradient's sign is rounding
        gradients = [torch.autograd.grad(value.sum(), image)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)


def test_all_but_the_calibrated_loss_is_as_with_the_plain_norms() -> None:
    network = tiny_network().eval()
    before = snapshot(network)
    blended, plain = BlendedNorms(network), AlignedNorms(network)
    image = stream(1)[0]
    for normalization in ("instance", "calibrated", "source"):
        assert torch.equal(blended.predict(image, normalization), plain.predict(image, normalization))
        same = torch.equal(blended.loss(image, normalization), plain.loss(image, normalization))
        assert same == (normalization != "calibrated")
    assert all(torch.equal(before[key], value) for key, value in snapshot(network).items())
    assert not any("forward" in layer.__dict__ for layer in network.modules())
