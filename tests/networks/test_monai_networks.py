# SPDX-License-Identifier: Apache-2.0
"""MONAI's segmentation networks, whatever norm layers they have, are aligned with source statistics of a file."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from monai.networks import nets
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from mgipt_monai import MGIPT, SourceStatistics, measure_source_statistics
from mgipt_monai.networks import AlignedNorms, FrequencyPrompt
from tests.conftest import identical, same_state, snapshot, stream

NORMALIZATIONS = ("instance", "calibrated", "source")


def convolutions(dims: int) -> nn.Module:
    conv, transposed = ((nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))[dims - 2]
    return nn.Sequential(conv(1, 4, 3, 2, 1), nn.ReLU(), transposed(4, 4, 2, 2), nn.ReLU(), conv(4, 2, 1))


def swin_unetr(dims: int) -> nn.Module:
    pytest.importorskip("einops")  # MONAI's SwinUNETR needs it
    return nets.SwinUNETR(1, 2, depths=(1, 1, 1, 1), window_size=4, feature_size=12, spatial_dims=dims)


def unet(norm: str) -> Callable[[int], nn.Module]:
    return lambda dims: nets.UNet(dims, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1, norm=norm)


def segresnet(dims: int) -> nn.Module:
    return nets.SegResNet(dims, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_up=(1,))


def dynunet(dims: int) -> nn.Module:
    return nets.DynUNet(dims, 1, 2, (3, 3, 3), (1, 2, 2), upsample_kernel_size=(2, 2), filters=(4, 4, 4))


def flexible_unet(_dims: int) -> nn.Module:
    return nets.FlexibleUNet(1, 2, "efficientnet-b0", pretrained=False, decoder_channels=(8, 8, 8, 8, 8))


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], dict[int, tuple[int, ...]], dict[str, int]]] = {
    # name: from the dimension to the network, from the dimension to the image's size, how many layers of which kind
    "UNet batch": (unet("batch"), {2: (16, 16), 3: (8, 8, 8)}, {"BatchNorm": 3}),
    "UNet instance": (unet("instance"), {2: (16, 16), 3: (8, 8, 8)}, {"InstanceNorm": 3}),
    "BasicUNet": (lambda d: nets.BasicUNet(d, 1, 2, (4,) * 6), {2: (32,) * 2, 3: (32,) * 3}, {"InstanceNorm": 18}),
    "SegResNet": (segresnet, {2: (16, 16), 3: (8, 8, 8)}, {"GroupNorm": 7}),
    "DynUNet": (dynunet, {2: (16, 16), 3: (8, 8, 8)}, {"InstanceNorm": 10}),
    "AttentionUnet": (
        lambda d: nets.AttentionUnet(d, 1, 2, (4, 8), (2,)),
        {2: (16, 16), 3: (8, 8, 8)},
        {"BatchNorm": 8, "InstanceNorm": 1},
    ),
    "VNet": (lambda d: nets.VNet(d, 1, 2), {3: (16, 16, 16)}, {"BatchNorm": 24}),
    "FlexibleUNet": (flexible_unet, {2: (64, 64)}, {"BatchNorm": 58}),
    "SwinUNETR": (swin_unetr, {2: (64, 32), 3: (64, 32, 32)}, {"LayerNorm": 12, "InstanceNorm": 26}),
    "convolutions alone": (convolutions, {2: (16, 16), 3: (8, 8, 8)}, {"Conv": 2, "ConvTranspose": 1}),
}


def other_camera(images: Tensor) -> Tensor:
    """Lower in contrast, and brighter."""
    return 0.6 * images + 0.4


@dataclass
class Case:
    network: nn.Module
    statistics: SourceStatistics
    source: Tensor
    layers: dict[str, int]
    images: Tensor
    """Two, of another camera than those measured."""

    def mgipt(self) -> MGIPT:
        sizes = {"instance_sizes": (1,), "global_sizes": (3,)}
        return MGIPT(copy.deepcopy(self.network), statistics=self.statistics, steps=2, **sizes)


@pytest.fixture(
    scope="module",
    params=[(name, dims) for name, (_, sizes, _) in NETWORKS.items() for dims in sizes],
    ids=lambda param: f"{param[0]} {param[1]}D",
)
def case(request: pytest.FixtureRequest) -> Case:
    build, sizes, layers = NETWORKS[request.param[0]]
    dims = request.param[1]
    torch.manual_seed(0)
    network = build(dims).eval()
    shown = stream(5, max(sizes[dims]), channels=1, dims=dims)
    shown = [image[(..., *map(slice, sizes[dims]))] for image in shown]
    source = torch.cat(shown[:3])
    update_bn([source], network)  # batch norms store what training would have left in them
    return Case(
        network, measure_source_statistics(network, [source]), source, layers, other_camera(torch.cat(shown[3:]))
    )


def test_every_norm_layer_is_measured_else_every_convolution(case: Case) -> None:
    kinds = Counter(type(case.network.get_submodule(name)).__name__ for name in case.statistics.layers)
    assert Counter({kind.rstrip("123d"): count for kind, count in kinds.items()}) == case.layers
    assert case.statistics.images == 3


def test_prompt_of_ones_with_source_statistics_is_the_plain_network_bit_for_bit(case: Case) -> None:
    image = case.images[:1]
    norms = AlignedNorms(case.network, statistics=case.statistics)
    prompted = FrequencyPrompt(image.ndim - 2, 1, 3)(image).detach()
    with torch.no_grad():
        plain = case.network(image)
        assert torch.equal(norms.predict(prompted, "source"), plain)
        if not any(kind == "BatchNorm" for kind in case.layers):
            assert all(torch.equal(norms.predict(image, each), plain) for each in NORMALIZATIONS)


def test_images_of_the_source_are_nearer_than_those_of_another_camera(case: Case) -> None:
    norms = AlignedNorms(case.network, statistics=case.statistics)
    with torch.no_grad():
        near, far = (norms.loss(images, "source") for images in (case.source, other_camera(case.source)))
    assert torch.all(near < far)


def test_mgipt_lowers_the_loss_and_goes_on_alike_when_copied_or_resumed(case: Case) -> None:
    mgipt = case.mgipt()
    before = snapshot(mgipt.network)
    first_image, second_image = case.images.split(1)
    mgipt(first_image)
    copied, resumed = copy.deepcopy(mgipt), case.mgipt()
    resumed.load_adaptation_state(mgipt.adaptation_state())
    first = mgipt.last[0]
    expected = mgipt(second_image)
    for record in (first, mgipt.last[0]):
        assert record["loss_after"] < record["loss_before"]
    for other in (copied, resumed):
        assert torch.equal(other(second_image), expected)
        assert same_state(other.adaptation_state(), mgipt.adaptation_state())
    assert identical(before, snapshot(mgipt.network))
    assert not any("forward" in layer.__dict__ for layer in mgipt.network.modules())
