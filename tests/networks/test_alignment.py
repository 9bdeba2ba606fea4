# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mgipt_monai.networks import AlignedNorms, GlobalPrompts, alignment_loss

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NORMALIZATIONS = ["instance", "calibrated", "source"]


class SmallNet(nn.Sequential):
    """Two conv-norm blocks with stored statistics far from those of the test images, and a head."""

    def __init__(self, dims: int = 2, affine: bool = True) -> None:
        conv, norm = CONVS[dims], NORMS[dims]
        encoder = nn.Sequential(conv(3, 4, 3, padding=1), norm(4, affine=affine, eps=1e-3), nn.ReLU())
        decoder = nn.Sequential(conv(4, 5, 3, padding=1), norm(5, affine=affine), nn.ReLU())
        super().__init__(OrderedDict(encoder=encoder, decoder=decoder, head=conv(5, 2, 1)))
        for layer in (encoder[1], decoder[1]):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.3, 3.0)
            if affine:
                nn.init.uniform_(layer.weight, 0.5, 2.0)
                nn.init.normal_(layer.bias)
        self.eval()


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken layer")


def make(dims: int = 2, affine: bool = True) -> tuple[SmallNet, Tensor]:
    torch.manual_seed(3)
    side = {1: 20, 2: 12, 3: 6}[dims]
    return SmallNet(dims, affine), torch.rand(3, 3, *[side] * dims)


def reference(
    network: SmallNet, images: Tensor, normalization: str, weight: float = 0.8, aligned: str = ""
) -> tuple[Tensor, Tensor]:
    """Logits and losses, written out sample by sample and layer by layer from the specification."""
    logits, losses = [], []
    for sample in images:
        x, terms = sample[None], []
        for name, layer in network.named_modules():
            if isinstance(layer, tuple(NORMS.values())):
                mean, variance = layer.running_mean, layer.running_var
                if name.startswith(aligned):
                    mu = x[0].flatten(1).mean(dim=1)
                    sigma2 = x[0].flatten(1).var(dim=1, unbiased=True)
                    terms.append((mean - mu).abs().mean() + (variance.sqrt() - sigma2.sqrt()).abs().mean())
                    if normalization == "instance":
                        mean, variance = mu, sigma2
                    elif normalization == "calibrated":
                        mean, variance = weight * mean + (1 - weight) * mu, weight * variance + (1 - weight) * sigma2
                shape = (1, -1, *[1] * (x.ndim - 2))
                x = (x - mean.view(shape)) / (variance.view(shape) + layer.eps).sqrt()
                if layer.affine:
                    x = x * layer.weight.view(shape) + layer.bias.view(shape)
            elif not isinstance(layer, nn.Sequential):
                x = layer(x)
        logits.append(x)
        losses.append(sum(terms) / len(terms))
    return torch.cat(logits), torch.stack(losses)


def nothing_attached(network: nn.Module) -> bool:
    return all("forward" not in layer.__dict__ for layer in network.modules())


def snapshot(network: nn.Module) -> tuple[list, dict[str, Tensor]]:
    layers = [(name, type(m), m.training, sorted(m.__dict__)) for name, m in network.named_modules()]
    tensors = [(name, id(t), t.requires_grad) for name, t in (*network.named_parameters(), *network.named_buffers())]
    return [*layers, *tensors, list(network.state_dict())], copy.deepcopy(network.state_dict())


def test_loss_of_one_layer_worked_by_hand() -> None:
    loss = alignment_loss(
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        torch.tensor([[1.0, 5.0], [2.0, 3.0]]),
        torch.tensor([4.0, 0.0]),
        torch.tensor([2.0, 3.0]),
    )
    # sample 1: (3 + 2) / 2 + (1 + 2) / 2; sample 2: (4 + 0) / 2 + (0 + 0) / 2
    assert loss.tolist() == [4.0, 2.0]


def test_loss_of_a_layer_with_the_sources_statistics_is_zero() -> None:
    image = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 2, 2)
    network = nn.BatchNorm2d(1).eval()
    network.running_mean.fill_(3.0)
    network.running_var.fill_(14 / 3)
    assert AlignedNorms(network).loss(image).item() == pytest.approx(0, abs=1e-6)
    network.running_mean.fill_(5.0)
    network.running_var.fill_(0.0)
    assert AlignedNorms(network).loss(image).item() == pytest.approx(2 + (14 / 3) ** 0.5)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_source_prediction_is_the_plain_networks_bit_for_bit(dims: int, affine: bool) -> None:
    network, images = make(dims, affine)
    assert torch.equal(AlignedNorms(network).predict(images), network(images))
    assert torch.equal(AlignedNorms(network).predict(images, "source"), network(images))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_predictions_are_those_of_the_written_out_network(normalization: str, dims: int, affine: bool) -> None:
    network, images = make(dims, affine)
    expected, _ = reference(network, images, normalization)
    predicted = AlignedNorms(network).predict(images, normalization)
    torch.testing.assert_close(predicted, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_losses_are_those_of_the_written_out_network(normalization: str, dims: int, affine: bool) -> None:
    network, images = make(dims, affine)
    _, expected = reference(network, images, normalization)
    losses = AlignedNorms(network).loss(images, normalization)
    assert losses.shape == (3,)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_the_three_normalisations_differ() -> None:
    network, images = make()
    norms = AlignedNorms(network)
    predictions = [norms.predict(images, normalization) for normalization in NORMALIZATIONS]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (predictions[one] - predictions[other]).abs().max() > 0.01


def test_tuning_is_with_instance_statistics_unless_told() -> None:
    network, images = make()
    norms = AlignedNorms(network)
    assert torch.equal(norms.loss(images), norms.loss(images, "instance"))
    assert not torch.equal(norms.loss(images), norms.loss(images, "source"))


def test_source_weight_is_four_fifths_unless_told() -> None:
    network, images = make()
    expected = AlignedNorms(network, source_weight=0.8).predict(images, "calibrated")
    assert torch.equal(AlignedNorms(network).predict(images, "calibrated"), expected)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_calibrated_prediction_follows_the_source_weight(weight: float) -> None:
    network, images = make()
    norms = AlignedNorms(network, source_weight=weight)
    predicted = norms.predict(images, "calibrated")
    torch.testing.assert_close(predicted, reference(network, images, "calibrated", weight)[0], atol=1e-4, rtol=1e-4)
    if weight == 1:
        torch.testing.assert_close(predicted, network(images), atol=1e-5, rtol=1e-5)
    if weight == 0:
        torch.testing.assert_close(predicted, norms.predict(images, "instance"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_batch_gives_what_its_images_give_one_by_one(normalization: str) -> None:
    network, images = make()
    images = images * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1)
    norms = AlignedNorms(network)
    predictions = [norms.predict(image[None], normalization) for image in images]
    losses = [norms.loss(image[None], normalization) for image in images]
    torch.testing.assert_close(norms.predict(images, normalization), torch.cat(predictions), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norms.loss(images, normalization), torch.cat(losses), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("call", ["predict", "loss"])
def test_network_is_as_it_was_after_a_call(call: str, normalization: str) -> None:
    network, images = make()
    network.head.train()  # a flag that differs from the others must survive too
    before, values = snapshot(network)
    getattr(AlignedNorms(network), call)(images, normalization)
    after, new_values = snapshot(network)
    assert after == before
    assert all(torch.equal(new_values[key], value) for key, value in values.items())
    assert nothing_attached(network)


def test_making_the_norms_does_not_touch_the_network() -> None:
    network, _ = make()
    before, _ = snapshot(network)
    AlignedNorms(network)
    assert snapshot(network)[0] == before


@pytest.mark.parametrize("call", ["predict", "loss"])
def test_nothing_stays_attached_after_an_error_inside_the_network(call: str) -> None:
    network, images = make()
    norms, plain = AlignedNorms(network), network(images)
    expected = norms.loss(images)
    conv, network.decoder[0] = network.decoder[0], Broken()
    with pytest.raises(RuntimeError, match="broken layer"):
        getattr(norms, call)(images, "instance")
    assert nothing_attached(network)
    network.decoder[0] = conv
    assert torch.equal(network(images), plain)
    assert torch.equal(norms.loss(images), expected)


def test_unknown_normalisation_is_refused_and_nothing_stays_attached() -> None:
    network, images = make()
    norms = AlignedNorms(network)
    for call in (norms.predict, norms.loss):
        with pytest.raises(ValueError, match=r"normalization must be one of .*; got 'released'"):
            call(images, "released")
    assert nothing_attached(network)


def test_attach_and_detach_leave_no_trace() -> None:
    network, images = make()
    plain = network(images)
    before, _ = snapshot(network)
    norms = AlignedNorms(network)
    norms.detach()
    assert snapshot(network)[0] == before
    norms.attach()
    norms.attach()
    assert [name for name, m in network.named_modules() if "forward" in m.__dict__] == ["encoder.1", "decoder.1"]
    assert list(network.state_dict()) == before[-1]
    assert torch.equal(network(images), plain)
    norms.detach()
    assert snapshot(network)[0] == before
    norms.detach()
    assert torch.equal(network(images), plain)


def through_pickle(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copy_of_the_network_has_its_own_statistics(duplicate: Callable, attached: bool) -> None:
    network, images = make()
    norms, plain = AlignedNorms(network), network(images)
    if attached:
        norms.attach()
    clone = duplicate(network)
    assert torch.equal(clone(images), plain)
    clone.encoder[1].running_mean.add_(5)
    changed = clone(images)
    assert (changed - plain).abs().max() > 0.1
    assert torch.equal(network(images), plain)
    network.decoder[1].running_mean.add_(5)
    assert torch.equal(clone(images), changed)
    # what the original does later reaches the copy no more
    norms.predict(images, "instance")
    assert torch.equal(clone(images), changed)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copy_of_the_norms_works_on_a_network_of_its_own(duplicate: Callable, attached: bool) -> None:
    network, images = make()
    norms = AlignedNorms(network, source_weight=0.4)
    expected = {n: (norms.predict(images, n), norms.loss(images, n)) for n in NORMALIZATIONS}
    if attached:
        norms.attach()
    clone = duplicate(norms)
    assert clone.network is not network
    assert all(clone.layers[name] is clone.network.get_submodule(name) for name in ("encoder.1", "decoder.1"))
    for normalization, (logits, losses) in expected.items():
        assert torch.equal(clone.predict(images, normalization), logits)
        assert torch.equal(clone.loss(images, normalization), losses)
    clone.network.encoder[1].running_mean.add_(5)
    assert (clone.loss(images) - expected["instance"][1]).abs().min() > 0.1
    assert (clone.predict(images, "calibrated") - expected["calibrated"][0]).abs().max() > 0.1
    assert torch.equal(norms.loss(images), expected["instance"][1])
    assert torch.equal(norms.predict(images, "calibrated"), expected["calibrated"][0])
    clone.detach()
    assert nothing_attached(clone.network)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (None, ["encoder.1", "decoder.1"]),
        ("encoder", ["encoder.1"]),
        ("^decoder", ["decoder.1"]),
        (r"\.1$", ["encoder.1", "decoder.1"]),
        ("coder", ["encoder.1", "decoder.1"]),
    ],
)
def test_pattern_selects_the_layers_by_name(pattern: str | None, names: list[str]) -> None:
    network, _ = make()
    norms = AlignedNorms(network, pattern)
    assert list(norms.layers) == names
    assert all(norms.layers[name] is network.get_submodule(name) for name in names)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_layers_left_out_normalise_plainly_and_add_no_loss(part: str, normalization: str) -> None:
    network, images = make()
    norms = AlignedNorms(network, part)
    logits, losses = reference(network, images, normalization, aligned=part)
    torch.testing.assert_close(norms.predict(images, normalization), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norms.loss(images, normalization), losses, atol=1e-5, rtol=1e-5)


def test_pattern_without_a_match_is_refused_with_the_names_there_are() -> None:
    network, _ = make()
    with pytest.raises(ValueError, match=r"'bottleneck' matches no batch norm.*encoder\.1, decoder\.1"):
        AlignedNorms(network, "bottleneck")


@pytest.mark.parametrize(
    ("norms", "found"),
    [
        ([nn.InstanceNorm2d(4), nn.InstanceNorm2d(4)], "2 x InstanceNorm2d"),
        ([nn.BatchNorm2d(4, track_running_stats=False)], "1 x BatchNorm2d"),
        ([nn.GroupNorm(2, 4)], "1 x GroupNorm"),
        ([nn.LayerNorm(4)], "1 x LayerNorm"),
        ([], "no norm layer at all"),
    ],
)
def test_network_without_stored_source_statistics_is_refused(norms: list[nn.Module], found: str) -> None:
    with pytest.raises(ValueError, match=rf"Sequential stores no source statistics.*found {found}.*source-statistics"):
        AlignedNorms(nn.Sequential(nn.Conv2d(3, 4, 3), *norms))


def test_batch_norm_without_stored_statistics_is_left_alone_beside_usable_ones() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)).eval()
    assert list(AlignedNorms(network).layers) == ["1"]


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_source_weight_outside_its_range_is_refused(weight: float) -> None:
    network, _ = make()
    with pytest.raises(ValueError, match=rf"source_weight must be in \[0, 1\], got {weight}"):
        AlignedNorms(network, source_weight=weight)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_loss_reaches_the_images_and_no_parameter(normalization: str) -> None:
    network, images = make()
    network.requires_grad_(False)
    images.requires_grad_()
    AlignedNorms(network).loss(images, normalization).sum().backward()
    (expected,) = torch.autograd.grad(reference(network, images, normalization)[1].sum(), images)
    assert expected.abs().max() > 0
    torch.testing.assert_close(images.grad, expected, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in network.parameters())


def test_gradient_of_one_samples_loss_stays_in_that_sample() -> None:
    network, images = make()
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(AlignedNorms(network).loss(images)[1], images)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2]].abs().max() == 0


def test_tuning_a_prompt_leaves_no_gradient_on_a_trainable_network() -> None:
    network, images = make()
    GlobalPrompts(sizes=(3,)).step(images[:1], AlignedNorms(network).loss)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_loss_and_gradient_are_finite_where_a_feature_is_constant() -> None:
    network, images = make()
    images = torch.zeros_like(images, requires_grad=True)
    losses = AlignedNorms(network).loss(images)
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()


def test_forwards_are_counted_per_image() -> None:
    network, images = make()
    norms = AlignedNorms(network)
    norms.predict(images, "calibrated")
    norms.loss(images[:2])
    assert norms.forwards == 5


def test_prediction_works_in_inference_mode() -> None:
    network, images = make()
    norms = AlignedNorms(network)
    expected = norms.predict(images, "calibrated").detach()
    with torch.inference_mode():
        assert torch.equal(norms.predict(images, "calibrated"), expected)
    assert torch.equal(functional.relu(norms.predict(images, "calibrated")), functional.relu(expected))


@pytest.mark.parametrize("normalization", ["source", "calibrated"])
def test_features_of_16_bits_are_measured_with_32(normalization: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    norms = AlignedNorms(network)
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 200  # sums of squares above 65504
    _, expected = norms.predict_and_measure(image, normalization)
    with torch.autocast("cpu", torch.half):
        logits, loss = norms.predict_and_measure(image, normalization)
    assert torch.isfinite(logits).all()
    assert loss == pytest.approx(expected, rel=0.01)
