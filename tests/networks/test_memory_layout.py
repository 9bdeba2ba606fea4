# SPDX-License-Identifier: Apache-2.0
"""The order of features in memory, and how many images are in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mgipt_monai.networks import AlignedNorms
from mgipt_monai.networks.alignment.windows import parts
from tests.conftest import identical, snapshot, stream, tiny_network


class Spy(nn.Module):
    """Hands features on and writes down whether channels are innermost."""

    def __init__(self) -> None:
        super().__init__()
        self.innermost: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.innermost.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return x


class Flattening(nn.Module):
    """Calls ``view`` on features, which needs channels outermost."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.view(len(x), -1).amax(dim=1)[:, None, None, None]


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_innermost_and_predictions_as_usual(channels: int) -> None:
    network = tiny_network(in_channels=channels).eval()
    network.insert(3, spy := Spy())
    image = stream(1, channels=channels)[0]
    norms, before = AlignedNorms(network), snapshot(network)
    logits = norms.predict(image, "calibrated")
    assert spy.innermost == [True]
    assert logits.is_contiguous()
    assert identical(before, snapshot(network))
    assert all(parameter.is_contiguous() for parameter in network.parameters())
    norms.predict(image)
    assert spy.innermost == [True, False]  # the unadapted prediction is the network's own


def test_a_network_that_flattens_its_features_is_run_as_it_is() -> None:
    network, image = tiny_network().eval(), stream(1)[0]
    network.insert(6, Flattening())
    network.insert(3, spy := Spy())
    norms = AlignedNorms(network)
    losses = [norms.loss(image, "calibrated") for _ in range(3)]
    assert spy.innermost == [True, False, False, False]
    # what the failed attempt had measured does not count
    assert torch.equal(losses[0], losses[1])
    # what flattens is behind the last norm, so the loss does not depend on it
    torch.testing.assert_close(losses[0], AlignedNorms(tiny_network().eval()).loss(image, "calibrated"))


def test_other_errors_are_not_repeated() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken layer")

    network = tiny_network().eval()
    network.insert(0, spy := Spy())
    network.insert(4, Broken())
    with pytest.raises(RuntimeError, match="broken layer"):
        AlignedNorms(network).predict(stream(1)[0], "instance")
    assert len(spy.innermost) == 1


@pytest.mark.parametrize(
    ("shape", "counts"),
    [((3, 1, 256, 256), [3]), ((3, 1, 256, 257), [1, 1, 1]), ((2, 1, 64, 64, 64), [2]), ((2, 1, 65, 64, 64), [1, 1])],
)
def test_small_images_go_together_and_large_ones_one_by_one(shape: tuple[int, ...], counts: list[int]) -> None:
    assert [len(part) for part in parts(torch.zeros(shape))] == counts


def test_large_images_have_the_losses_gradients_and_logits_of_each_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3, stride=8), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1)).eval()
    images, sizes = torch.rand(3, 1, 260, 260), []
    network[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    norms = AlignedNorms(network)

    def loss_and_gradient(images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.clone().requires_grad_()
        loss = norms.loss(images)
        return loss.detach(), torch.autograd.grad(loss.sum(), images)[0]

    together = loss_and_gradient(images)
    alone = [torch.cat(each) for each in zip(*map(loss_and_gradient, images.split(1)), strict=True)]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    logits = [norms.predict(image, "calibrated") for image in images.split(1)]
    assert torch.equal(norms.predict(images, "calibrated"), torch.cat(logits))
    assert set(sizes) == {1}
    assert norms.forwards == len(sizes)
