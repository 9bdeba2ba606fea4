# SPDX-License-Identifier: Apache-2.0
"""An image's signature: its distance from the source at the first norm layer, taken in a forward that runs anyway."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from mgipt_monai.networks import AlignedNorms, BlendedNorms, measure_source_statistics
from mgipt_monai.networks.alignment.norms import EPS, FARTHEST
from mgipt_monai.networks.alignment.windows import ForwardRoute
from tests.conftest import MixedNet, stream, tiny_network

(IMAGE,) = stream(1)


def expected(image: Tensor, network: nn.Sequential) -> Tensor:
    """The signature by hand."""
    with torch.no_grad():
        features = network[0](image)
    mean, variance = features.mean((0, 2, 3)), features.var((0, 2, 3))
    layer = network[1]
    source = (layer.running_var + EPS).sqrt()
    return torch.stack([(mean - layer.running_mean) / source, ((variance + EPS).sqrt() / source).log()])


@pytest.mark.parametrize("normalization", ["instance", "calibrated", "source"])
@pytest.mark.parametrize("kind", [AlignedNorms, BlendedNorms])
def test_the_first_loss_takes_it(kind: type[AlignedNorms], normalization: str) -> None:
    network = tiny_network().eval()
    norms = kind(network)
    norms.start(IMAGE)
    assert norms.signature is None
    prompted = IMAGE.clone().requires_grad_()
    norms.loss(prompted, normalization)
    torch.testing.assert_close(norms.signature, expected(IMAGE, network), atol=1e-4, rtol=1e-4)
    assert not norms.signature.requires_grad
    first = norms.signature
    norms.loss(3 * IMAGE, normalization)
    assert norms.signature is first
    norms.start(3 * IMAGE)
    assert norms.signature is None


def test_a_prediction_takes_it_where_asked_and_keeps_its_bits() -> None:
    network = tiny_network().eval()
    norms = AlignedNorms(network)
    norms.start(IMAGE)
    with torch.no_grad():
        plain = norms.predict(IMAGE)
        assert norms.signature is None
        with norms.signing():
            assert torch.equal(norms.predict(IMAGE), plain)
    torch.testing.assert_close(norms.signature, expected(IMAGE, network), atol=1e-4, rtol=1e-4)
    assert norms.forwards == 2


@pytest.mark.parametrize("inferer", [None, SlidingWindowInferer(roi_size=(16, 16))])
def test_alone_it_ends_at_the_first_layer(inferer: SlidingWindowInferer | None) -> None:
    route, network = ForwardRoute(), tiny_network().eval()
    if inferer is not None:
        route.change(inferer, 2)
    norms, later = AlignedNorms(network, route=route), []
    norms.start(IMAGE)
    norms.loss(IMAGE)
    wanted = norms.signature
    norms.start(IMAGE)
    with torch.no_grad():
        network[3].register_forward_pre_hook(lambda *_: later.append(1))
        norms.sign(IMAGE)
    assert not later
    assert norms.forwards == 0
    torch.testing.assert_close(norms.signature, wanted)
    with torch.no_grad():
        assert torch.equal(AlignedNorms(network).predict(IMAGE), network(IMAGE))  # no trace is left


def test_it_is_relative_to_measured_statistics_where_the_network_stores_none() -> None:
    network = MixedNet().eval()
    statistics = measure_source_statistics(network, stream(6, seed=3))
    norms = AlignedNorms(network, statistics=statistics)
    norms.start(IMAGE)
    norms.loss(IMAGE)
    with torch.no_grad():
        features = network.norm_inputs(IMAGE)["instance"]
    layer = statistics.layers["instance"]
    z = (features.mean((0, 2, 3)) - layer.mean) / (layer.std.square() + EPS).sqrt()
    torch.testing.assert_close(norms.signature[0], z, atol=1e-4, rtol=1e-4)


def test_it_is_bounded() -> None:
    network = tiny_network().eval()
    network[1].running_var.zero_()
    norms = AlignedNorms(network)
    norms.start(IMAGE)
    norms.loss(1e6 * IMAGE)
    assert norms.signature.abs().max() == FARTHEST


def test_without_a_layer_that_takes_part_there_is_none() -> None:
    network = nn.ModuleDict({"used": nn.Conv2d(3, 2, 1), "unused": nn.BatchNorm2d(2)}).eval()
    network.forward = lambda x: network["used"](x)
    norms = AlignedNorms(network)
    norms.start(IMAGE)
    norms.sign(IMAGE)
    assert norms.signature is None
