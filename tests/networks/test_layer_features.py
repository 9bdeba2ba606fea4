# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mgipt_monai import measure_source_statistics
from mgipt_monai.networks import AlignedNorms
from mgipt_monai.networks.alignment.layers import layer_features
from tests.conftest import tiny_network


class Windowed(nn.Module):
    """Runs a network of convolutions of one voxel on the four quarters of each image, folded into the batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        quarters = torch.stack([half for part in x.chunk(2, dim=-1) for half in part.chunk(2, dim=-2)], dim=1)
        made = self.inner(quarters.flatten(0, 1)).unflatten(0, (len(x), 4))
        left, right = (torch.cat([made[:, i], made[:, i + 1]], dim=-2) for i in (0, 2))
        return torch.cat([left, right], dim=-1)


def pointwise(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    if norm is nn.BatchNorm2d:
        network[1].running_mean.normal_()
    return network


def test_norm_layers_are_measured_before_and_convolutions_behind() -> None:
    taken, given = torch.rand(2, 4, 3), torch.rand(2, 5, 3)
    assert layer_features(nn.GroupNorm(2, 4), taken, given, 2) is taken
    for conv in (nn.Conv1d(4, 5, 1), nn.ConvTranspose1d(4, 5, 1)):
        assert layer_features(conv, taken, given, 2) is given


def test_channels_of_a_layer_norm_are_its_last_axis() -> None:
    taken = torch.rand(2, 6, 7, 4)
    features = layer_features(nn.LayerNorm(4), taken, taken, 2)
    assert torch.equal(features, taken.permute(0, 3, 1, 2))


def test_windows_of_an_image_are_put_together() -> None:
    taken = torch.rand(6, 4, 5)
    features = layer_features(nn.InstanceNorm1d(4), taken, taken, 2)
    assert features.shape == (2, 4, 3, 5)
    assert torch.equal(features[1, :, 0], taken[3])
    tokens = torch.rand(6, 5, 4)
    assert torch.equal(layer_features(nn.LayerNorm(4), tokens, tokens, 2)[1, :, 2], tokens[5].t())


def test_without_spatial_axes_or_images_there_is_nothing_to_measure() -> None:
    assert layer_features(nn.LayerNorm(4), torch.rand(2, 4), torch.rand(2, 4), 2) is None
    assert layer_features(nn.BatchNorm1d(4), torch.rand(8, 4), torch.rand(8, 4), 2) is None
    assert layer_features(nn.BatchNorm1d(4), torch.rand(3, 4, 5), torch.rand(3, 4, 5), 2) is None


@pytest.mark.parametrize("normalization", ["instance", "calibrated", "source"])
def test_windows_in_the_batch_are_aligned_as_the_whole_image(normalization: str) -> None:
    whole, windowed, images = AlignedNorms(pointwise()), AlignedNorms(Windowed(pointwise())), torch.rand(3, 3, 8, 8)
    for call in ("predict", "loss"):
        made, expected = (getattr(norms, call)(images, normalization) for norms in (windowed, whole))
        torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-5)


def test_windows_in_the_batch_are_measured_as_the_whole_image() -> None:
    images = torch.rand(3, 3, 8, 8)
    # one instance norm per window is another network, so only its input is the same
    for norm in (nn.BatchNorm2d, nn.InstanceNorm2d):
        whole = measure_source_statistics(pointwise(norm), [images]).layers["1"]
        windowed = measure_source_statistics(Windowed(pointwise(norm)), [images]).layers["inner.1"]
        for key, value in vars(whole).items():
            torch.testing.assert_close(getattr(windowed, key), value, atol=1e-6, rtol=1e-4)


def test_norm_layer_on_vectors_is_left_alone_beside_others() -> None:
    class WithVector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.vector = tiny_network(), nn.LayerNorm(2)

        def forward(self, x: Tensor) -> Tensor:
            made = self.body(x)
            return made + self.vector(made.mean(dim=(2, 3)))[..., None, None]

    network, images = WithVector().eval(), torch.rand(2, 3, 8, 8)
    statistics = measure_source_statistics(network, [images])
    assert list(statistics.layers) == ["body.1", "body.4"]
    assert torch.equal(AlignedNorms(network, statistics=statistics).predict(images), network(images))
