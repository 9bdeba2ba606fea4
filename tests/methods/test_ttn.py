# SPDX-License-Identifier: Apache-2.0
"""TTN: the blend of its weights, their file, and how they are learnt from labelled source images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import UNet
from torch import nn

from mgipt_monai import BatchNormAdaptation, Source
from mgipt_monai.methods import TTN, InterpolationWeights, learn_interpolation_weights, select_channels
from mgipt_monai.utils.provenance import fingerprint
from tests.conftest import identical, snapshot, stream, tiny_network

ROOT = Path(__file__).parents[2]


def weights_of(network: nn.Module, value: float) -> InterpolationWeights:
    return InterpolationWeights({name: torch.full((6,), value) for name in ("1", "4")}, 2, fingerprint(network))


def darker(image: torch.Tensor) -> torch.Tensor:
    return image * 0.5


def labelled(count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [{"image": image, "label": (image[:, :2] > 0.5).float()} for image in stream(count)]


def learn(network: nn.Module, **settings: Any) -> InterpolationWeights:
    return learn_interpolation_weights(network, labelled(), settings.pop("augment", darker), **settings)


# --- the blend


def test_weight_of_zero_is_the_source_and_of_one_the_image() -> None:
    image = stream(1)[0]
    for value, expected in ((0.0, Source(tiny_network())), (1.0, BatchNormAdaptation(tiny_network()))):
        method = TTN(tiny_network(), weights_of(tiny_network(), value))
        settings = method.settings()
        assert settings == {"class": "TTN", "weights": weights_of(tiny_network(), value).digest}
        assert torch.allclose(method(image), expected(image), atol=1e-5)
        assert method.settings() == settings


def test_mean_and_variance_are_those_of_the_mixture_channel_by_channel() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3)).eval()
    network[0].running_mean.fill_(2)
    network[0].running_var.fill_(0.5)
    weights, image = torch.tensor([0.1, 0.5, 0.8]), stream(1)[0]
    mean = weights * image.mean((0, 2, 3)) + (1 - weights) * 2
    second = weights * (image.var((0, 2, 3)) + image.mean((0, 2, 3)).square()) + (1 - weights) * (0.5 + 4)
    variance = second - mean.square()
    expected = (image - mean.view(1, 3, 1, 1)) / (variance.view(1, 3, 1, 1) + 1e-5).sqrt()
    method = TTN(network, InterpolationWeights({"0": weights}, 1, fingerprint(network)))
    assert torch.allclose(method(image), expected, atol=1e-5)


def test_weights_of_another_network_are_refused() -> None:
    method = TTN(tiny_network(seed=1), weights_of(tiny_network(), 0.5))
    with pytest.raises(ValueError, match=r"made with other weights than this Sequential has.*interpolation-weights"):
        method(stream(1)[0])
    assert method.images_seen == 0
    few = InterpolationWeights({"1": torch.zeros(6)}, 1, "")
    with pytest.raises(ValueError, match="0 numbers for 4, which has 6 channels"):
        TTN(tiny_network(), few)
    assert TTN(tiny_network(), few, aligned_layers="^1$").settings()["weights"] == few.digest
    with pytest.raises(ValueError, match=r"needs interpolation weights.*interpolation_path"):
        TTN(tiny_network(), None)


def test_digest_tells_weights_of_the_same_mean_apart() -> None:
    one, other = (InterpolationWeights({"1": torch.tensor(w)}, 1, "") for w in ([0.0, 1.0], [1.0, 0.0]))
    assert one.digest != other.digest


# --- the file


def test_file_gives_the_weights_back_and_nothing_else_is_overwritten(tmp_path: Path) -> None:
    path, image = tmp_path / "ttn.pt", stream(1)[0]
    weights = weights_of(tiny_network(), 0.3)
    weights.save(path)
    assert torch.equal(TTN(tiny_network(), path)(image), TTN(tiny_network(), weights)(image))
    weights_of(tiny_network(), 0.4).save(path)  # its own may be replaced
    assert InterpolationWeights.load(path).layers["1"][0] == pytest.approx(0.4)

    other = tmp_path / "network.pt"
    torch.save(tiny_network().state_dict(), other)
    before = other.read_bytes()
    with pytest.raises(FileExistsError, match="not overwritten"):
        weights.save(other)
    assert other.read_bytes() == before
    with pytest.raises(ValueError, match=r"network.pt is not a readable file of interpolation weights"):
        TTN(tiny_network(), other)
    with pytest.raises(FileNotFoundError, match="mgipt interpolation-weights"):
        TTN(tiny_network(), tmp_path / "absent.pt")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="not a readable file of interpolation weights"):
        InterpolationWeights.load(path)


@pytest.mark.parametrize(
    ("layers", "images", "message"),
    [
        ({}, 1, "no layers"),
        ({"1": torch.tensor([0.5, 1.5])}, 1, r"weights of 1 are not numbers in \[0, 1\]"),
        ({"1": torch.tensor([0.5, torch.nan])}, 1, "weights of 1"),
        ({"1": [0.5]}, 1, "weights of 1"),
        ({"1": torch.zeros(2)}, 0, "number of source images"),
    ],
)
def test_wrong_content_fails_at_construction(layers: dict, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InterpolationWeights(layers, images, "")


# --- learning


def test_without_a_change_of_look_nothing_is_to_be_normalised_away() -> None:
    weights = learn(tiny_network(), augment=lambda image: image, epochs=0)
    assert all(each.max() < 1e-12 for each in weights.layers.values())
    image = stream(1)[0]
    assert torch.allclose(TTN(tiny_network(), weights)(image), Source(tiny_network())(image), atol=1e-6)


def test_prior_is_one_minus_the_cosine_of_the_gradients_scaled_and_squared() -> None:
    network, distances = tiny_network().eval(), []
    for item in labelled():
        gradients = []
        for image in (item["image"], darker(item["image"])):
            network.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(network(image), item["label"]).backward()
            scale, shift = (
                torch.cat([getattr(network[i], key).grad.double() for i in (1, 4)]) for key in ("weight", "bias")
            )
            gradients.append((scale, shift))
        (a, b), (c, d) = gradients
        lengths = (a.square() + b.square()).sqrt(), (c.square() + d.square()).sqrt()
        silent = (lengths[0] == 0) & (lengths[1] == 0)
        cosine = (a * c + b * d) / (lengths[0] * lengths[1]).clamp(min=1e-300)
        distances.append((1 - cosine).masked_fill(silent, 0))
    distance = torch.stack(distances).mean(dim=0)
    expected = ((distance - distance.min()) / (distance.max() - distance.min())).square()
    found = learn(tiny_network(), epochs=0)
    assert silent.any()  # or nothing shows what becomes of such channels
    assert torch.allclose(torch.cat([found.layers["1"], found.layers["4"]]).double(), expected, atol=1e-4)
    assert (found.images, found.fingerprint) == (3, fingerprint(tiny_network()))


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_tuning_lowers_the_loss_within_the_range_and_leaves_the_network_alone(head: str) -> None:
    network = tiny_network(out_channels=2 + (head == "softmax")).train()
    before, settings = snapshot(network), {"head": head, "prior_strength": 0.0}

    def loss(weights: InterpolationWeights) -> float:
        method, total = TTN(network, weights), 0.0
        for item in labelled():
            logits = method(darker(item["image"]))
            label = item["label"]
            if head == "softmax":
                label = torch.cat([1 - label.sum(dim=1, keepdim=True).clamp(max=1), label], dim=1)
                total += nn.functional.cross_entropy(logits, label).item()
            else:
                total += nn.functional.binary_cross_entropy_with_logits(logits, label).item()
        return total

    prior = learn(network, epochs=0, **settings)
    tuned = learn(network, epochs=10, lr=0.05, **settings)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert identical(before, snapshot(network))
    assert loss(tuned) < loss(prior)
    assert all(((each >= 0) & (each <= 1)).all() for each in tuned.layers.values())
    near = learn(network, epochs=10, lr=0.05, head=head, prior_strength=1000.0)

    def moved(weights: InterpolationWeights) -> float:
        return sum((weights.layers[name] - prior.layers[name]).abs().sum().item() for name in prior.layers)

    assert moved(near) < moved(tuned)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs .* -1"),
        ({"lr": 0}, "lr must be above 0, got 0"),
        ({"prior_strength": -1}, "prior_strength must be at least 0, got -1"),
        ({"head": "relu"}, "'relu'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn(tiny_network(), **settings)


def test_networks_and_images_that_teach_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no source images"):
        learn_interpolation_weights(tiny_network(), [], darker)
    with pytest.raises(ValueError, match="without scale and shift"):
        learn(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, affine=False)))
    with pytest.raises(ValueError, match="needs batch norm"):
        learn(UNet(2, 3, 2, channels=(4, 8), strides=(2,), norm="instance"))


# --- whole channels by the size of the structures (Hybrid-TTN)


class Telling(nn.Module):
    """A network of three norm layers, of which every other channel carries the label's size and the rest noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x)))[:, :1]


def sized(count: int = 8) -> list[dict[str, torch.Tensor]]:
    noise = torch.Generator().manual_seed(0)
    items = []
    for index in range(count):
        image, label = torch.randn(1, 4, 16, 16, generator=noise), torch.zeros(1, 1, 16, 16)
        label[..., : index + 1, :] = 1
        image[:, 1::2] += 3 * label
        items.append({"image": image, "label": label})
    return items


def test_channels_that_tell_the_size_keep_the_source_and_deeper_layers_keep_more() -> None:
    network = Telling().train()
    before = snapshot(network)
    selected = select_channels(network, sized())
    assert torch.equal(selected.layers["first"], torch.ones(4))
    assert torch.equal(selected.layers["second"], torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert torch.equal(selected.layers["third"], torch.zeros(4))
    assert network.training
    assert identical(before, snapshot(network))
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(layer._forward_pre_hooks for layer in network.modules())
    assert (selected.images, selected.fingerprint) == (8, fingerprint(network))
    batched = [{key: torch.cat([item[key] for item in sized()]) for key in ("image", "label")}]
    assert select_channels(network, batched).digest == selected.digest
    assert TTN(network.eval(), selected)(sized()[0]["image"]).shape == (1, 1, 16, 16)


def test_sizes_that_do_not_differ_select_nothing() -> None:
    for items, count in ((sized(1), 1), ([], 0), ([sized(2)[0], sized(2)[0]], 2)):
        with pytest.raises(ValueError, match=f"{count} images with structures of one size"):
            select_channels(Telling(), items)
    with pytest.raises(ValueError, match="needs batch norm"):
        select_channels(UNet(2, 3, 2, channels=(4, 8), strides=(2,), norm="instance"), labelled())


def test_overlay_puts_the_method_into_the_bundle(tmp_path: Path) -> None:
    parser = ConfigParser()
    parser.read_config([str(ROOT / "bundle/configs/inference.yaml"), str(ROOT / "configs/methods/ttn.yaml")])
    network = parser.get_parsed_content("network")
    norms = {name: each for name, each in network.named_modules() if isinstance(each, nn.BatchNorm2d)}
    layers = {name: torch.rand(norm.num_features) for name, norm in norms.items()}
    InterpolationWeights(layers, 5, fingerprint(network)).save(tmp_path / "ttn.pt")
    parser["interpolation_path"] = str(tmp_path / "ttn.pt")
    method = parser.get_parsed_content("method")
    assert isinstance(method, TTN)
    assert method.weights.images == 5
