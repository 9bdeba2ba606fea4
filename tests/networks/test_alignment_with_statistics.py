# SPDX-License-Identifier: Apache-2.0
"""Alignment with measured source statistics instead of stored ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mgipt_monai import SourceStatistics, measure_source_statistics
from mgipt_monai.networks import AlignedNorms, BlendedNorms, alignment_loss, calibrate, instance_statistics
from tests.conftest import MixedNet, stream, tiny_network

NORMALIZATIONS = ["instance", "calibrated", "source"]


def mixed() -> tuple[MixedNet, SourceStatistics]:
    network = MixedNet().eval()
    return network, measure_source_statistics(network, stream(3))


def reference(network: MixedNet, images: Tensor, statistics: SourceStatistics, weight: float = 1) -> Tensor:
    """The loss against the blend of the file's and the image's statistics, written out."""
    terms = []
    for name, taken in network.norm_inputs(images).items():
        mean, std = instance_statistics(taken)
        layer = statistics.layers[name]
        target_mean, target_variance = calibrate(mean.detach(), std.detach(), layer.mean, layer.std, weight)
        terms.append(alignment_loss(mean, std, target_mean, target_variance.sqrt()))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", [AlignedNorms, BlendedNorms])
def test_layers_that_store_nothing_always_normalise_as_they_do(kind: type, normalization: str) -> None:
    network, statistics = mixed()
    images = torch.cat(stream(2, seed=1))
    norms = kind(network, source_weight=0.3, statistics=statistics)
    assert torch.equal(norms.predict(images, normalization), network(images))
    weight = 0.3 if kind is BlendedNorms and normalization == "calibrated" else 1
    expected = reference(network, images, statistics, weight)
    torch.testing.assert_close(norms.loss(images, normalization), expected, atol=1e-6, rtol=1e-4)


def test_blend_carries_no_gradient_at_layers_that_store_nothing() -> None:
    network, statistics = mixed()
    image = stream(1, seed=1)[0].requires_grad_()
    norms = BlendedNorms(network, source_weight=0.3, statistics=statistics)
    losses = norms.loss(image, "calibrated"), reference(network, image, statistics, 0.3)
    gradients = [torch.autograd.grad(loss.sum(), image)[0] for loss in losses]
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-3)


def test_source_images_own_statistics_are_at_distance_zero() -> None:
    network, image = MixedNet().eval(), stream(1)[0]
    norms = AlignedNorms(network, statistics=measure_source_statistics(network, [image]))
    assert norms.loss(image).item() == pytest.approx(0, abs=1e-6)
    assert norms.loss(image * 0.5).item() > 0.01


def test_convolutions_are_compared_by_what_they_give() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    statistics = measure_source_statistics(network, stream(3))
    images = torch.cat(stream(2, seed=1))
    first = network[0](images)
    terms = [
        alignment_loss(*instance_statistics(given), statistics.layers[name].mean, statistics.layers[name].std)
        for name, given in (("0", first), ("2", network(images)))
    ]
    norms = AlignedNorms(network, statistics=statistics)
    torch.testing.assert_close(norms.loss(images), sum(terms) / 2)
    assert torch.equal(norms.predict(images, "instance"), network(images))


def test_batch_norm_aligns_with_the_file_and_normalises_with_what_it_stores() -> None:
    network, images = tiny_network().eval(), torch.cat(stream(2, seed=1))
    statistics = measure_source_statistics(network, stream(3))
    for kind in (AlignedNorms, BlendedNorms):
        plain, other = kind(network), kind(network, statistics=statistics)
        for normalization in NORMALIZATIONS:
            assert torch.equal(plain.predict(images, normalization), other.predict(images, normalization))
            assert not torch.equal(plain.loss(images, normalization), other.loss(images, normalization))
    whole = AlignedNorms(network, source_weight=1, statistics=statistics)
    torch.testing.assert_close(whole.predict(images, "calibrated"), network(images), atol=1e-5, rtol=1e-4)
    # under the network's own normalisation the first layer's term can be written out
    first = statistics.layers["1"]
    expected = alignment_loss(*instance_statistics(network[0](images)), first.mean, first.std)
    torch.testing.assert_close(AlignedNorms(network, "^1$", statistics=statistics).loss(images), expected)


def test_instance_norm_that_tracks_statistics_is_aligned_like_batch_norm() -> None:
    batch = tiny_network().eval()
    tracking = copy.deepcopy(batch)
    for i in (1, 4):
        tracking[i] = nn.InstanceNorm2d(6, affine=True, track_running_stats=True).eval()
        tracking[i].load_state_dict(batch[i].state_dict())
    images = torch.cat(stream(2))
    for normalization in NORMALIZATIONS:
        for call in ("predict", "loss"):
            made, expected = (getattr(AlignedNorms(n), call)(images, normalization) for n in (tracking, batch))
            torch.testing.assert_close(made, expected)


def test_network_with_both_kinds_takes_the_stored_ones_alone_or_all_of_a_file() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.BatchNorm2d(4)).eval()
    assert list(AlignedNorms(network).layers) == ["2"]
    statistics = measure_source_statistics(network, stream(2))
    assert list(AlignedNorms(network, statistics=statistics).layers) == ["1", "2"]
    assert list(AlignedNorms(network, "1", statistics=statistics).layers) == ["1"]
    few = measure_source_statistics(network, stream(2), layers="1")
    assert list(AlignedNorms(network, statistics=few).layers) == ["1"]


def test_batch_gives_what_its_images_give_one_by_one() -> None:
    network, statistics = mixed()
    images = torch.cat(stream(3, seed=1)) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1)
    norms = AlignedNorms(network, statistics=statistics)
    apart = torch.cat([norms.loss(image) for image in images.split(1)])
    torch.testing.assert_close(norms.loss(images), apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda norms: pickle.loads(pickle.dumps(norms))])
def test_copies_go_on_alike(duplicate: Callable) -> None:
    network, statistics = mixed()
    norms, image = AlignedNorms(network, statistics=statistics), stream(1, seed=1)[0]
    fresh = duplicate(norms)
    expected = norms.loss(image)
    for clone in (fresh, duplicate(norms)):
        assert clone.network is not network
        assert torch.equal(clone.loss(image), expected)
    assert not any("forward" in layer.__dict__ for layer in network.modules())


def test_file_of_other_weights_is_refused_at_the_first_forward() -> None:
    network, statistics = mixed()
    other = MixedNet(seed=1).eval()
    norms, image = AlignedNorms(other, statistics=statistics), stream(1)[0]
    for call in (norms.predict, norms.loss):
        with pytest.raises(ValueError, match=r"made with other weights.*source-statistics"):
            call(image)
    assert not any("forward" in layer.__dict__ for layer in other.modules())
    other.load_state_dict(network.state_dict())
    assert torch.equal(norms.loss(image), AlignedNorms(network, statistics=statistics).loss(image))


def test_file_of_another_network_is_refused_at_once() -> None:
    _, statistics = mixed()
    with pytest.raises(ValueError, match=r"Sequential has no layer instance, group.*source-statistics"):
        AlignedNorms(tiny_network(), statistics=statistics)


def test_pattern_without_a_match_is_refused_with_the_files_names() -> None:
    network, statistics = mixed()
    with pytest.raises(ValueError, match="'decoder' matches no layer of the statistics file; there are: instance, gr"):
        AlignedNorms(network, "decoder", statistics=statistics)
