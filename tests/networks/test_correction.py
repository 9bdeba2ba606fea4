# SPDX-License-Identifier: Apache-2.0
"""A correction: nothing changes nothing, each part does what it says, and the network stays as it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from mgipt_monai.networks.correction import Correction, NormShift, input_statistics
from mgipt_monai.networks.prompts.frequency import LowFrequencies
from tests.conftest import identical, same_state, snapshot, stream, tiny_network

NORMS = {
    "batch": lambda channels: nn.BatchNorm2d(channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "group": lambda channels: nn.GroupNorm(2, channels),
    "plain instance": lambda channels: nn.InstanceNorm2d(channels),
}


def normed(kind: str) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), NORMS[kind](4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    if kind == "batch":
        network[1].running_mean.normal_()
        network[1].running_var.uniform_(0.5, 2)
    for parameter in network[1].parameters():
        nn.init.normal_(parameter)
    return network.requires_grad_(False)


def shift(network: nn.Module, image: torch.Tensor, share: float) -> Correction:
    """Towards the statistics of one image."""
    mean, std = input_statistics(network[1], network[0](image))
    return Correction(norms={"1": NormShift(torch.full((2,), share), mean[0], std[0])})


@pytest.mark.parametrize("kind", NORMS)
def test_nothing_changes_no_bit_and_copies_nothing(kind: str) -> None:
    network, image = normed(kind), stream(1)[0]
    nothing = shift(network, stream(2)[1], share=0.0)
    assert nothing.to_network(network) is network
    assert nothing.to_image(image) is image
    assert nothing.to_logits(image) is image
    ones = Correction(torch.zeros(2), prompts=tuple(torch.ones(1, 3, side, side) for side in (1, 3, 5)))
    assert torch.equal(ones.to_image(image), image)
    assert torch.equal(ones.to_logits(network(image)), network(image))


@pytest.mark.parametrize("kind", NORMS)
def test_whole_share_normalises_with_the_sites_statistics(kind: str) -> None:
    network, (image, site) = normed(kind), stream(2)
    before = snapshot(network)
    corrected = shift(network, site, share=1.0).to_network(network)
    mean, std = input_statistics(network[1], network[0](site))
    features = network[0](image)
    if kind == "group":
        mean, std = mean.repeat_interleave(2, 1), std.repeat_interleave(2, 1)
    expected = (features - mean[..., None, None]) / std[..., None, None]
    if network[1].weight is not None:
        expected = expected * network[1].weight[:, None, None] + network[1].bias[:, None, None]
    assert torch.allclose(corrected[1](features), expected, atol=1e-5)
    assert not torch.allclose(corrected(image), network(image), atol=1e-3)
    assert identical(before, snapshot(network))
    assert corrected[0].weight is network[0].weight


@pytest.mark.parametrize("kind", NORMS)
def test_site_that_is_the_layers_own_changes_little(kind: str) -> None:
    network, image = normed(kind), stream(1)[0]
    if kind == "batch":
        layer = network[1]
        own = NormShift(torch.ones(2), layer.running_mean.clone(), (layer.running_var + layer.eps).sqrt())
        correction = Correction(norms={"1": own})
    else:
        correction = shift(network, image, share=0.5)  # half way from the image to itself
    assert torch.allclose(correction.to_network(network)(image), network(image), atol=1e-5)


def test_corrected_copy_can_be_copied_and_pickled() -> None:
    network, (image, site) = normed("instance"), stream(2)
    corrected = shift(network, site, share=0.7).to_network(network)
    for copied in (copy.deepcopy(corrected), pickle.loads(pickle.dumps(corrected))):
        assert torch.equal(copied(image), corrected(image))


def test_prompts_act_together_and_offsets_shift_each_class() -> None:
    image = stream(1)[0]
    prompts = tuple(1 + 0.1 * torch.randn(1, 3, side, side) for side in (1, 3))
    changes = [LowFrequencies(image, prompt.shape[-1]).apply(prompt) - image for prompt in prompts]
    assert torch.allclose(Correction(prompts=prompts).to_image(image), image + sum(changes), atol=1e-6)
    logits = torch.randn(1, 2, 4, 4)
    expected = (logits + torch.tensor([1.0, -2.0])[:, None, None]) / 2
    assert torch.equal(Correction(torch.tensor([1.0, -2.0]), temperature=2.0).to_logits(logits), expected)


def test_state_gives_the_same_correction_and_its_digest_tells_it_from_others() -> None:
    network, site = normed("batch"), stream(1)[0]
    whole = Correction(torch.randn(2), 1.5, (torch.rand(1, 3, 3, 3),), shift(network, site, 0.3).norms)
    again = Correction.from_state(pickle.loads(pickle.dumps(whole.state())))
    assert same_state(again.state(), whole.state())
    assert again.digest == whole.digest
    assert Correction(whole.offset, 1.5, whole.prompts).digest != whole.digest
    assert whole.numbers == {"offset": 2, "prompts": 27, "norms": 2, "statistics": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": torch.tensor([float("nan")])}, "offset are not finite"),
        ({"offset": torch.zeros(2, 2)}, "one number per output channel"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"prompts": [torch.ones(3, 3)]}, "prompt of the correction has the shape"),
        ({"prompts": torch.ones(1)}, "prompts must be a list"),
        ({"norms": {"1": {"share": torch.ones(3), "mean": torch.ones(4), "std": torch.ones(4)}}}, "another shape"),
        ({"norms": {"1": {"share": torch.ones(2), "mean": torch.ones(4), "std": torch.zeros(4)}}}, "above 0"),
    ],
)
def test_damaged_states_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Correction.from_state({**Correction().state(), **change})


def test_network_that_lacks_the_layer_is_refused() -> None:
    norms = {"nowhere": NormShift(torch.ones(2), torch.zeros(4), torch.ones(4))}
    with pytest.raises(ValueError, match="no norm layer nowhere with 4 channels"):
        Correction(norms=norms).to_network(tiny_network())
