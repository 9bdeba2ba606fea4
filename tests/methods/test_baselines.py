# SPDX-License-Identifier: Apache-2.0
"""What every baseline must keep, and the defining property of each."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.networks.nets import UNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import mgipt_monai
from mgipt_monai import (
    MGIPT,
    SAR,
    AdaptationMethod,
    BatchNormAdaptation,
    CoTTA,
    GraTa,
    SiteCorrection,
    Source,
    Tent,
)
from mgipt_monai.methods import TTN, DyNo, InTEnt, InterpolationWeights
from mgipt_monai.methods.weight_updates import grata
from mgipt_monai.methods.weight_updates.base import WeightAdaptation, norm_affine_names
from mgipt_monai.methods.weight_updates.losses import confidence, entropy, logits_of, probabilities
from mgipt_monai.methods.weight_updates.sar import uphill
from mgipt_monai.methods.weight_updates.views import mean_probabilities, scales_and_flips, turns_and_flips
from mgipt_monai.networks import AlignedNorms
from mgipt_monai.utils.provenance import fingerprint
from tests.conftest import assert_batch_equals_one_by_one, identical, same_state, snapshot, stream, tiny_network

ROOT = Path(__file__).parents[2]
OVERLAYS = {"steady": ROOT / "configs/presets/steady.yaml"}
AFFINE = {"1.weight", "1.bias", "4.weight", "4.bias"}


def cotta(network: nn.Module, **settings: Any) -> CoTTA:
    """CoTTA that averages few views, and moves enough to be seen."""
    return CoTTA(network, **{"confidence_threshold": 1.1, "scales": (0.5, 1), "lr": 1e-3, "decay": 0.5, **settings})


def sar(network: nn.Module, **settings: Any) -> SAR:
    """SAR that never recovers, and moves enough to be seen."""
    return SAR(network, **{"recovery_threshold": 0, "lr": 0.05, "margin": 0.9, **settings})


def ttn(network: nn.Module, **settings: Any) -> TTN:
    """TTN with the same weight for all channels of all batch norms."""
    norms = {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}
    layers = {name: torch.full((layer.num_features,), 0.3) for name, layer in norms.items()} or {"": torch.ones(1)}
    return TTN(network, InterpolationWeights(layers, images=3, fingerprint=fingerprint(network)), **settings)


METHODS: dict[str, Callable[..., AdaptationMethod]] = {
    "bn": BatchNormAdaptation,
    "tent": Tent,
    "sar": sar,
    "cotta": cotta,
    "grata": GraTa,
    "steady": SiteCorrection,
    "dyno": DyNo,
    "intent": InTEnt,
    "ttn": ttn,
}
STATELESS = ("bn", "intent", "ttn")
HEADLESS = ("bn", "dyno", "ttn")
TRAINED = ["tent", "sar", "cotta", "grata"]
AFFINE_ONLY = ["tent", "sar", "grata"]

every = pytest.mark.parametrize("name", METHODS)
trained = pytest.mark.parametrize("name", TRAINED)


def build(name: str, network: nn.Module | None = None, **settings: Any) -> AdaptationMethod:
    return METHODS[name](tiny_network() if network is None else network, **settings)


def state_of(method: AdaptationMethod) -> dict[str, Any]:
    """The adaptation state after a way through a file."""
    file = io.BytesIO()
    torch.save(method.adaptation_state(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def moved(method: WeightAdaptation, network: nn.Module) -> set[str]:
    """Names of the parameters of the copy that are not the network's."""
    source = dict(network.named_parameters())
    return {name for name, p in method.adapted.network.named_parameters() if not torch.equal(p, source[name])}


# --- every method


@every
def test_callers_network_stays_bit_identical(name: str, images: list[torch.Tensor]) -> None:
    network = tiny_network()
    before, names = snapshot(network), list(network.state_dict())
    method = build(name, network.train())
    for image in images:
        method(image)
    method.reset()
    method(images[0])
    assert identical(before, snapshot(network))
    assert list(network.state_dict()) == names
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert not any(module.training or "forward" in module.__dict__ for module in network.modules())


@every
def test_reset_gives_the_first_prediction_again(name: str, images: list[torch.Tensor]) -> None:
    method = build(name)
    fresh = method.adaptation_state()
    first = method(images[0])
    again = method(images[0])
    # SAR, TENT and CoTTA predict before they learn, GraTa after; the second time all have learnt, but the mean of
    # DyNo's images is still that image
    assert torch.equal(first, again) == (name in (*STATELESS, "dyno"))
    method.reset()
    assert same_state(method.adaptation_state(), fresh)
    assert method.last == []
    assert torch.equal(method(images[0]), first)


@every
def test_same_stream_is_bit_identical_whatever_the_global_seed(name: str, images: list[torch.Tensor]) -> None:
    runs, states = [], []
    for seed in (0, 1):
        method = build(name)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        runs.append(torch.cat([method(image) for image in images]))
        assert torch.equal(torch.get_rng_state(), before)
        states.append(method.adaptation_state())
    assert torch.equal(*runs)
    assert same_state(*states)


@every
def test_saving_and_resuming_equals_not_stopping(name: str, images: list[torch.Tensor]) -> None:
    whole = build(name)
    expected = [whole(image) for image in images]
    first = build(name)
    outputs = [first(image) for image in images[:2]]
    second = build(name)
    second(images[3])  # what it did before is gone with the loading
    second.load_adaptation_state(state_of(first))
    outputs += [second(image) for image in images[2:]]
    assert torch.equal(torch.cat(expected), torch.cat(outputs))
    assert same_state(whole.adaptation_state(), second.adaptation_state())


@every
def test_batch_gives_what_its_images_give_one_by_one(name: str, images: list[torch.Tensor]) -> None:
    assert_batch_equals_one_by_one(lambda: build(name), images)


@every
def test_deepcopy_and_pickle_go_on_alike_and_apart(name: str, images: list[torch.Tensor]) -> None:
    method = build(name)
    method(images[0])
    copies = [copy.deepcopy(method), pickle.loads(pickle.dumps(method))]
    expected = torch.cat([method(image) for image in images[1:3]])
    for other in copies:
        assert torch.equal(torch.cat([other(image) for image in images[1:3]]), expected)


@every
def test_bind_keeps_the_adaptation_on_a_copied_network(name: str, images: list[torch.Tensor]) -> None:
    method, untouched = build(name), build(name)
    for each in (method, untouched):
        each(images[0])
    state = method.adaptation_state()
    other = copy.deepcopy(method.network).train().requires_grad_(True)
    with torch.inference_mode():  # as a server may call it
        method.bind(other)
    assert same_state(method.adaptation_state(), state)
    assert torch.equal(method(images[1]), untouched(images[1]))
    assert identical(snapshot(other), snapshot(tiny_network()))


@every
def test_works_under_no_grad_inference_mode_and_autocast(name: str, images: list[torch.Tensor]) -> None:
    plain = build(name)
    expected = torch.cat([plain(image) for image in images])
    method = build(name)
    with torch.no_grad():
        outputs = [method(images[0])]
    with torch.inference_mode():
        outputs.append(method(images[1].clone()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs.append(method(images[2]))
    outputs.append(method(images[3].double()))
    assert torch.equal(torch.cat(outputs), expected)
    assert not any(output.requires_grad for output in outputs)


@every
@pytest.mark.parametrize(
    ("dims", "channels", "classes", "head"),
    [(2, 3, 1, "sigmoid"), (2, 1, 2, "sigmoid"), (2, 3, 3, "softmax"), (3, 1, 2, "sigmoid"), (3, 2, 2, "softmax")],
)
def test_any_head_and_dimension(name: str, dims: int, channels: int, classes: int, head: str) -> None:
    method = build(name, tiny_network(dims, channels, classes), **({} if name in HEADLESS else {"head": head}))
    for image in stream(2, size=8, channels=channels, dims=dims):
        assert method(image).shape == (1, classes, *[8] * dims)
        assert all(isinstance(v, (bool, int, float, type(None))) for v in method.last[0].values())


@every
def test_odd_sizes_networks_that_shrink_and_meta_data(name: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    image = MetaTensor(torch.rand(1, 3, 18, 29), meta={"filename_or_obj": "eye.png"})
    logits = build(name, network)(image)
    assert logits.shape == (1, 2, 16, 27)
    assert logits.meta["filename_or_obj"] == "eye.png"


@every
def test_network_without_usable_norm_layer_is_refused(name: str) -> None:
    takes_statistics = name == "steady"  # to the others a statistics file would be no help
    advice = "source-statistics" if takes_statistics else "needs batch norm.*statistics file.*steady"
    with pytest.raises(ValueError, match=rf"found 2 x InstanceNorm2d.*{advice}") as caught:
        build(name, UNet(2, 1, 1, channels=(4, 8), strides=(2,), norm="instance"))
    assert ("source-statistics" in str(caught.value)) == takes_statistics
    with pytest.raises(ValueError, match="'decoder' matches no batch norm"):
        build(name, aligned_layers="decoder")
    with pytest.raises(TypeError, match="already adapts"):
        build(name, build(name))


@every
def test_forwards_are_counted_as_they_are(name: str, images: list[torch.Tensor]) -> None:
    network = tiny_network()
    calls: list[int] = []
    # the copies take the hook with them
    network.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    method = build(name, network)
    cost = {"bn": (1, 0), "tent": (1, 1), "sar": (2, 2), "cotta": (6, 1), "grata": (9, 2), "steady": (3, 0)}
    cost |= {"dyno": (1, 0), "intent": (6, 0), "ttn": (1, 0)}
    for image in images[:2]:
        calls.clear()
        method(image)
        record = method.last[0]
        assert (record["forwards"], record["backwards"]) == cost[name]
        assert sum(calls) == cost[name][0]


@every
def test_failed_image_leaves_the_state_as_it_was(name: str, images: list[torch.Tensor]) -> None:
    method, clean = build(name), build(name)
    for each in (method, clean):
        each(images[0])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="channels"):
        method(images[1][:, :2].clone())
    with pytest.raises(ValueError, match="constant"):
        method(torch.ones_like(images[1]))
    assert same_state(method.adaptation_state(), clean.adaptation_state())
    assert torch.equal(method(images[2]), clean(images[2]))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ttn"])  # its weights belong to one network
def test_checkpoint_of_the_plain_network_counts_from_the_next_stream(name: str, images: list[torch.Tensor]) -> None:
    method = build(name, tiny_network(seed=1))
    method(images[0])
    method.reset()
    assert set(method.state_dict()) == {f"network.{key}" for key in tiny_network().state_dict()}
    method.load_state_dict(tiny_network().state_dict(), strict=True)
    assert torch.equal(method(images[0]), build(name)(images[0]))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ttn"])  # it needs a file: test_ttn
def test_overlay_puts_the_method_into_the_bundle(name: str) -> None:
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundle/configs/inference.yaml"))
    for key, value in ConfigParser.load_config_file(
        str(OVERLAYS.get(name, ROOT / f"configs/methods/{name}.yaml"))
    ).items():
        parser[key] = value
    parser["head"], parser["seed"] = "softmax", 7
    method = parser.get_parsed_content("method")
    assert type(method) is type(build(name))
    expected = {"head": "softmax", "seed": 7} if name in ("cotta", "grata") else {"head": "softmax"}
    assert name in HEADLESS or {key: getattr(method, key) for key in expected} == expected
    # the numbers of the overlay are the defaults
    plain = type(method)(tiny_network())
    for key in set(parser["method"]) - {"_target_", "network", "head", "seed", "jitter", "site", "memory"}:
        value = getattr(method, key)
        assert (tuple(value) if isinstance(value, list) else value) == getattr(plain, key)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (BatchNormAdaptation, {"source_weight": 1.5}, "1.5"),
        (Tent, {"lr": -1}, "-1"),
        (Tent, {"betas": (0.9, 1)}, r"\(0.9, 1\)"),
        (Tent, {"head": "relu"}, "'relu'"),
        (SAR, {"lr": 0}, "got 0"),
        (SAR, {"momentum": 1}, "momentum .* got 1"),
        (SAR, {"rho": -0.1}, "rho .* -0.1"),
        (SAR, {"margin": 0}, "margin .* got 0"),
        (SAR, {"recovery_threshold": math.nan}, "recovery_threshold .* nan"),
        (CoTTA, {"decay": 1.1}, "decay .* 1.1"),
        (CoTTA, {"restore_probability": -1}, "restore_probability .* -1"),
        (CoTTA, {"confidence_threshold": -0.5}, "-0.5"),
        (CoTTA, {"scales": ()}, r"\(\)"),
        (CoTTA, {"scales": (1, 0)}, r"\(1, 0\)"),
        (CoTTA, {"seed": -3}, "-3"),
        (GraTa, {"lr": math.inf}, "inf"),
        (InTEnt, {"source_weights": ()}, r"\(\)"),
        (InTEnt, {"source_weights": (0, 1.5)}, r"\(0, 1.5\)"),
        (InTEnt, {"head": "relu"}, "'relu'"),
        (SiteCorrection, {"trust": 0}, "trust .* got 0"),
        (SiteCorrection, {"image_share": 1.5}, "image_share .* 1.5"),
        (SiteCorrection, {"head": "relu"}, "'relu'"),
    ],
)
def test_wrong_settings_fail_at_construction_with_the_value(method: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(tiny_network(), **settings)


def test_everything_is_exported() -> None:
    assert {"SAR", "BatchNormAdaptation", "CoTTA", "GraTa", "SiteCorrection", "Tent"} <= set(mgipt_monai.__all__)


# --- methods that change weights


@trained
def test_stored_statistics_of_the_copy_never_move(name: str, images: list[torch.Tensor]) -> None:
    network = tiny_network()
    method = build(name, network)
    for image in images:
        method(image)
    copies = [method.adapted.network] + ([method.adapted.teacher.network] if name == "cotta" else [])
    for each in copies:
        assert identical(dict(each.named_buffers()), dict(network.named_buffers()))
        assert not any(module.training for module in each.modules())
        assert all(p.grad is None for p in each.parameters())


@pytest.mark.parametrize("name", AFFINE_ONLY)
def test_affine_weights_alone_move(name: str, images: list[torch.Tensor]) -> None:
    network = tiny_network()
    method = build(name, network)
    for image in images:
        method(image)
    assert moved(method, network) == AFFINE
    assert set(method.adaptation_state()["weights"]) == AFFINE
    few = build(name, network, aligned_layers="^4$")
    few(images[0])
    assert moved(few, network) == {"4.weight", "4.bias"}


@pytest.mark.parametrize("name", AFFINE_ONLY)
def test_batch_norm_without_weights_is_refused(name: str) -> None:
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="use BatchNormAdaptation"):
        build(name, bare)
    cotta(bare)(torch.rand(1, 3, 16, 16))


def test_affine_names_leave_other_weights_out() -> None:
    assert norm_affine_names(tiny_network()) == AFFINE


@trained
def test_state_is_a_copy_of_constant_size(name: str, images: list[torch.Tensor]) -> None:
    method = build(name)
    sizes = set()
    for image in images:
        method(image)
        state = method.adaptation_state()
        sizes.add(sum(w.numel() for key in ("weights", "teacher") for w in state.get(key, {}).values()))
    count = {"cotta": 2 * sum(p.numel() for p in method.network.parameters())}
    assert sizes == {count.get(name, 24)}
    kept = copy.deepcopy(state)
    other = build(name)
    other.load_adaptation_state(state)
    other(images[0])
    assert same_state(state, kept)  # neither written into by the one that loaded it ...
    for weight in state["weights"].values():
        weight.zero_()
    assert same_state(method.adaptation_state(), kept)  # ... nor the writer's own


@trained
def test_wrong_states_are_refused_and_change_nothing(name: str, images: list[torch.Tensor]) -> None:
    method = build(name)
    method(images[0])
    good = method.adaptation_state()

    def spoilt(change: Callable[[dict], object]) -> dict:
        state = copy.deepcopy(good)
        change(state)
        return state

    cases = [
        (spoilt(lambda s: s["weights"].pop("1.bias")), "have different weights: 1.bias"),
        (spoilt(lambda s: s["weights"].update({"1.bias": torch.zeros(3)})), r"1.bias has shape \(3,\)"),
        (spoilt(lambda s: s["weights"]["4.weight"].fill_(math.nan)), "numbers of 4.weight are not finite"),
        (spoilt(lambda s: s["optimizer"].update({99: {}})), r"optimizer has moments of \d+ weights"),
        (spoilt(lambda s: s["optimizer"][1].update(exp_avg=torch.zeros(2))), "number 1"),
        (
            spoilt(lambda s: s["optimizer"][0].update(exp_avg=torch.tensor(math.inf))),
            r"number 0 does not fit: exp_avg of shape \(\)",
        ),
        (spoilt(lambda s: s.pop("optimizer")), "lacks optimizer"),
        (spoilt(lambda s: s.update(method="MGIPT")), "method 'MGIPT'"),
    ]
    if name == "sar":
        cases.append((spoilt(lambda s: s.update(loss_average=math.nan)), "loss_average must be a number"))
    if name == "cotta":
        cases.append((spoilt(lambda s: s["teacher"].pop("0.bias")), "have different weights: 0.bias"))
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            method.load_adaptation_state(state)
        assert same_state(method.adaptation_state(), good)


@trained
def test_gradient_that_is_not_finite_is_an_error_before_the_step(name: str, images: list[torch.Tensor]) -> None:
    method = build(name)
    method(images[0])
    before = method.adaptation_state()
    with pytest.raises(FloatingPointError, match="not finite"):
        method.adapted.gradients(next(iter(method.adapted.weights.values())).sum() * math.nan)
    assert same_state(method.adaptation_state(), before)


def test_softmax_head_needs_two_channels(images: list[torch.Tensor]) -> None:
    for name in TRAINED:
        with pytest.raises(ValueError, match="at least two channels"):
            build(name, tiny_network(out_channels=1), head="softmax")(images[0])


# --- batch-norm adaptation


def test_bn_with_the_source_alone_is_close_to_the_plain_network(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    torch.testing.assert_close(BatchNormAdaptation(network, 1.0)(images[0]), Source(network)(images[0]))


def test_bn_without_the_source_takes_the_images_statistics(images: list[torch.Tensor]) -> None:
    network = tiny_network().eval()
    logits = BatchNormAdaptation(network)(images[0])
    with torch.no_grad():
        assert torch.equal(logits, AlignedNorms(network).predict(images[0], "instance"))
        # torch's own, which divides by n instead of n - 1
        reference = copy.deepcopy(network)
        for layer in (reference[1], reference[4]):
            layer.train()
        torch.testing.assert_close(logits, reference(images[0]), rtol=2e-3, atol=2e-3)


def test_bn_normalises_as_mgipt_does_without_prompts(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    mgipt = MGIPT(network, source_weight=0.3)
    with torch.no_grad():
        expected = mgipt.norms.predict(images[0], "calibrated")
    assert torch.equal(BatchNormAdaptation(network, 0.3)(images[0]), expected)


def test_bn_keeps_nothing(images: list[torch.Tensor]) -> None:
    method = BatchNormAdaptation(tiny_network())
    first = method(images[0])
    method(images[1])
    assert torch.equal(method(images[0]), first)
    assert set(method.adaptation_state()) == {"version", "method", "images_seen"}


# --- losses and views


def test_entropy_is_that_of_the_probabilities() -> None:
    logits = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double() * 3
    p = logits.sigmoid()
    binary = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(entropy(logits, "sigmoid"), binary)
    p = logits.softmax(dim=1)
    torch.testing.assert_close(entropy(logits, "softmax"), -(p * p.log()).sum(dim=1, keepdim=True))
    far = torch.tensor([[[-500.0, 0, 500]]], requires_grad=True)
    entropy(far, "sigmoid").sum().backward()
    assert torch.isfinite(far.grad).all()
    assert confidence(torch.zeros(1, 4, 2, 2), "softmax") == pytest.approx(0.25)
    assert confidence(torch.tensor([[[-20.0, 20.0]]]), "sigmoid") == pytest.approx(1)


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_logits_of_probabilities_are_finite_and_mean_the_same(head: str) -> None:
    logits = torch.tensor([[[-200.0, 0.3, 2.0], [200.0, 0.1, -1.0]]])
    p = probabilities(logits, head)
    assert torch.isfinite(logits_of(p, head)).all()
    torch.testing.assert_close(probabilities(logits_of(p, head), head), p, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_views_are_laid_back_over_the_image(dims: int) -> None:
    # a network that sees one pixel at a time predicts every turned or flipped view alike
    image = torch.rand(1, 2, *(6, 9, 4)[:dims], generator=torch.Generator().manual_seed(0))
    pixelwise = tiny_network(dims, 2, 2).eval()[-1]
    pixelwise.weight.data = pixelwise.weight.data[:, :2]
    expected = probabilities(pixelwise(image), "sigmoid")
    for views in (turns_and_flips(), scales_and_flips(image.shape[2:], image.shape[2:], (1,))):
        assert len({view.apply(image).flatten()[:20].sum().item() for view in views}) == len(views)
        torch.testing.assert_close(mean_probabilities(pixelwise, image, views, "sigmoid"), expected)


def test_scaled_views_are_close_on_a_smooth_image_and_keep_powers_of_two() -> None:
    ramp = torch.linspace(0, 1, 64)[None, None, :, None].expand(1, 1, 64, 48)
    views = scales_and_flips((64, 48), (64, 48), CoTTA(tiny_network()).scales)
    assert len(views) == 14
    sizes = [tuple(view.apply(ramp).shape[2:]) for view in views[::2]]
    assert sizes == [(32, 32), (64, 32), (64, 48), (64, 64), (96, 64), (128, 80), (128, 96)]
    for view in views:
        torch.testing.assert_close(view.undo(view.apply(ramp)), ramp, rtol=0, atol=0.03)


# --- TENT


def test_tent_lowers_the_entropy_of_an_image_it_sees_again(images: list[torch.Tensor]) -> None:
    tent = Tent(tiny_network(), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(entropy(tent(images[0]), "sigmoid").mean().item())
        assert tent.last[0]["loss_before"] == pytest.approx(losses[-1])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3


def test_tent_predicts_before_its_step(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    assert torch.equal(Tent(network)(images[0]), BatchNormAdaptation(network)(images[0]))


def test_tents_first_step_is_adams(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    tent = Tent(network)
    tent(images[0])
    for name, weight in tent.adaptation_state()["weights"].items():
        step = (weight - network.get_parameter(name)).abs()
        torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=0.02, atol=1e-6)


# --- SAR


def masked_gradients(
    network: nn.Module, image: torch.Tensor, margin: float, within: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradient of the mean entropy of the reliable pixels, and which they are."""
    network = copy.deepcopy(network).eval()
    weights = {name: network.get_parameter(name).requires_grad_() for name in sorted(AFFINE)}
    values = entropy(AlignedNorms(network).predict(image, "instance"), "sigmoid")
    reliable = values < margin * math.log(2)
    if within is not None:
        reliable &= within
    gradients = torch.autograd.grad(values[reliable].mean(), list(weights.values()))
    return dict(zip(weights, gradients, strict=True)), reliable


def test_sar_follows_the_reliable_pixels_alone_at_the_weights_uphill(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    gradients, reliable = masked_gradients(network, images[0], 0.8)
    above = copy.deepcopy(network)
    for name, offset in zip(gradients, uphill(list(gradients.values()), 0.05), strict=True):
        above.get_parameter(name).data += offset
    expected, at_both = masked_gradients(above, images[0], 0.8, reliable)
    assert 0.05 < at_both.float().mean() < reliable.float().mean() < 0.95
    method = SAR(network, lr=0.1, momentum=0, margin=0.8, recovery_threshold=0)
    method(images[0])
    assert method.last[0]["reliable_share"] == pytest.approx(reliable.float().mean().item())
    for name, gradient in expected.items():
        weight = method.adaptation_state()["weights"][name]
        torch.testing.assert_close(weight, network.get_parameter(name) - 0.1 * gradient)


def test_uphill_is_along_the_gradient_of_all_weights_together() -> None:
    step = uphill([torch.tensor([3.0, 0.0]), torch.tensor([4.0])], rho=0.05)
    assert torch.cat(step).tolist() == pytest.approx([0.03, 0, 0.04])
    assert torch.cat(uphill([torch.zeros(3)], rho=0.05)).tolist() == [0, 0, 0]


def test_sar_learns_nothing_where_no_pixel_is_reliable(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    nn.init.zeros_(network[-1].weight)  # every entropy is ln 2
    method = SAR(network)
    for image in images:
        assert torch.equal(method(image), torch.zeros(1, 2, 24, 24))
        record = method.last[0]
        assert (record["forwards"], record["backwards"], record["reliable_share"]) == (1, 0, 0)
        assert (record["loss_before"], record["loss_average"], record["recovered"]) == (None, None, False)
    assert moved(method, network) == set()
    assert method.adaptation_state()["optimizer"] == {}


def test_sar_learns_nothing_where_uphill_no_pixel_stays_reliable(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    least = entropy(BatchNormAdaptation(network)(images[0]), "sigmoid").min().item()
    method = SAR(network, margin=1.001 * least / math.log(2))
    method(images[0])
    assert method.last[0]["reliable_share"] > 0
    assert (method.last[0]["forwards"], method.last[0]["backwards"]) == (2, 1)
    assert moved(method, network) == set()


def test_sar_recovers_when_the_average_falls_below_the_threshold() -> None:
    images = stream(6)
    network = tiny_network()
    never = sar(network, lr=0.5)
    averages = []
    for image in images:
        never(image)
        averages.append(never.last[0]["loss_average"])
        assert never.last[0]["recovered"] is False
    falls = next(i for i, average in enumerate(averages) if average < averages[0] - 1e-3)
    threshold = (averages[falls] + 1e-6) / math.log(2)
    method = sar(network, lr=0.5, recovery_threshold=threshold)
    first = sar(network)(images[0])
    for index, image in enumerate(images[: falls + 1]):
        method(image)
        assert method.last[0]["recovered"] == (index == falls)
    state = method.adaptation_state()
    assert (state["weights"], state["optimizer"], state["loss_average"]) == ({}, {}, None)
    assert torch.equal(method(images[0]), first)
    assert method.images_seen == falls + 2


def test_sars_average_is_exponential(images: list[torch.Tensor]) -> None:
    method = sar(tiny_network(), rho=0, lr=1e-9)
    expected = None
    for image in images:
        method(image)
        loss = method.last[0]["loss_before"]
        expected = loss if expected is None else 0.9 * expected + 0.1 * loss
        assert method.last[0]["loss_average"] == pytest.approx(expected, rel=1e-4)
    assert method.adaptation_state()["loss_average"] == method.last[0]["loss_average"]


# --- CoTTA


def test_cottas_teacher_follows_by_the_decay(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    for decay in (0.999, 0.5, 0.0, 1.0):
        method = cotta(network, decay=decay, restore_probability=0, lr=0.1)
        expected = {name: p.clone() for name, p in network.named_parameters()}
        for image in images[:2]:
            method(image)
            state = method.adaptation_state()
            for name, student in state["weights"].items():
                expected[name] = torch.lerp(expected[name], student, 1 - decay)
            assert identical(state["teacher"], expected)
    assert all(torch.equal(state["teacher"][name], p) for name, p in network.named_parameters())  # decay 1


def test_cotta_moves_every_weight(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    method = cotta(network, restore_probability=0)
    method(images[0])
    names = {name for name, _ in network.named_parameters()}
    # a bias before a norm that takes the image's mean has no effect
    assert names - moved(method, network) <= {"0.bias", "3.bias"}
    assert set(method.adaptation_state()["weights"]) == names


def test_cotta_restores_all_some_or_none(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    shares, changed = {}, {}
    for probability in (0.0, 0.3, 1.0):
        method = cotta(network, restore_probability=probability, lr=0.1)
        method(images[0])
        shares[probability] = method.last[0]["restored_share"]
        students = method.adaptation_state()["weights"]
        moves = torch.cat([(students[n] != p).flatten() for n, p in network.named_parameters()])
        changed[probability] = moves.float().mean().item()
    assert (shares[0.0], shares[1.0], changed[1.0]) == (0, 1, 0)
    assert 0.2 < shares[0.3] < 0.4
    assert changed[0.3] == pytest.approx(changed[0.0] * (1 - shares[0.3]), abs=0.03)
    assert identical(students, dict(network.named_parameters()))


def test_cottas_restore_depends_on_the_seed_and_the_image_index_alone(images: list[torch.Tensor]) -> None:
    def restored(seed: int, index: int) -> dict[str, torch.Tensor]:
        network = tiny_network()
        method = cotta(network, seed=seed, restore_probability=0.5, lr=0.1)
        method.images_seen = index
        method(images[0])
        return {n: w == network.get_parameter(n) for n, w in method.adaptation_state()["weights"].items()}

    assert identical(restored(0, 0), restored(0, 0))
    assert not identical(restored(0, 0), restored(1, 0))
    assert not identical(restored(0, 0), restored(0, 1))


def test_cotta_averages_views_only_where_the_anchor_is_not_sure(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    plain = BatchNormAdaptation(network)(images[0])
    sure = confidence(plain, "sigmoid")
    above = cotta(network, confidence_threshold=sure - 1e-4)
    assert torch.equal(above(images[0]), plain)
    assert (above.last[0]["views"], above.last[0]["forwards"]) == (1, 3)
    assert above.last[0]["anchor_confidence"] == pytest.approx(sure)
    below = cotta(network, confidence_threshold=sure + 1e-4)
    assert not torch.equal(below(images[0]), plain)
    assert (below.last[0]["views"], below.last[0]["forwards"]) == (4, 6)


def test_cotta_predicts_the_teachers_mean_over_the_views(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    method = cotta(network)
    views = scales_and_flips((24, 24), (24, 24), method.scales)
    norms = AlignedNorms(network.eval())
    with torch.no_grad():
        mean = mean_probabilities(lambda view: norms.predict(view, "instance"), images[0], views, "sigmoid")
    torch.testing.assert_close(method(images[0]).sigmoid(), mean, rtol=0, atol=2e-6)
    # the anchor's confidence is that of the source, whatever has been learnt since
    confident = method.last[0]["anchor_confidence"]
    method(images[0])
    assert method.last[0]["anchor_confidence"] == confident


# --- GraTa


def test_agreement_is_none_for_opposite_and_full_for_equal_gradients() -> None:
    assert [grata.agreement(cosine) for cosine in (-1, 0, 1)] == [0, 0.25, 1]
    gradient = [torch.tensor([1.0, -2.0]), torch.tensor([[3.0]])]
    assert grata.cosine_of(gradient, [5 * part for part in gradient]) == pytest.approx(1)
    assert grata.cosine_of(gradient, [-part for part in gradient]) == pytest.approx(-1)
    assert grata.cosine_of(gradient, [torch.zeros_like(part) for part in gradient]) == 0


@pytest.mark.parametrize("cosine", [-1.0, 0.0, 1.0])
def test_grata_steps_as_far_as_the_gradients_agree(
    cosine: float, images: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grata, "cosine_of", lambda *_gradients: cosine)
    network = tiny_network()
    method = GraTa(network, lr=1e-2)
    logits = method(images[0])
    assert method.last[0]["lr"] == 1e-2 * (cosine + 1) ** 2 / 4
    largest = max((w - network.get_parameter(n)).abs().max() for n, w in method.adaptation_state()["weights"].items())
    assert largest.item() == pytest.approx(method.last[0]["lr"], rel=1e-2, abs=1e-9)
    assert torch.equal(logits, BatchNormAdaptation(network)(images[0])) == (cosine == -1)


@pytest.mark.parametrize("hard", [False, True])
def test_grata_compares_the_jittered_view_with_the_mean_of_six_views(hard: bool, images: list[torch.Tensor]) -> None:
    network = tiny_network().eval()
    predict = BatchNormAdaptation(network)
    target = mean_probabilities(predict, images[0], turns_and_flips(), "sigmoid")
    target = (target > 0.5).float() if hard else target
    trained = copy.deepcopy(network)
    weights = [trained.get_parameter(name).requires_grad_() for name in sorted(AFFINE)]
    loss = entropy(AlignedNorms(trained).predict(images[0], "instance"), "sigmoid").mean()
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.data -= gradient
    logits = AlignedNorms(trained).predict(images[0], "instance")
    expected = nn.functional.binary_cross_entropy_with_logits(logits, target)
    method = GraTa(network, jitter=lambda image: image, hard_labels=hard)
    method(images[0])
    assert method.last[0]["loss_before"] == pytest.approx(expected.item(), rel=1e-5)
    if not hard:  # the soft target pulls straight back: the gradients are nearly opposite, the step is too short to see
        assert method.last[0]["cosine"] < -0.9
        return
    assert method.last[0]["entropy_before"] == pytest.approx(loss.item(), rel=1e-5)
    # Adam's first step is against the sign of the gradient there, from where the weights were before
    for name, gradient in zip(sorted(AFFINE), torch.autograd.grad(expected, weights), strict=True):
        step = method.adaptation_state()["weights"][name] - network.get_parameter(name)
        clear = gradient.abs() > 1e-4
        assert clear.any()
        assert torch.equal(step[clear].sign(), -gradient[clear].sign())


def test_gratas_hard_labels_of_a_softmax_head_are_one_per_pixel(images: list[torch.Tensor]) -> None:
    method = GraTa(tiny_network(out_channels=3), head="softmax")
    method(images[0])
    decided = grata._binarised(torch.rand(1, 3, 4, 4), "softmax")
    assert torch.equal(decided.sum(dim=1), torch.ones(1, 4, 4))


def test_grata_jitters_by_the_seed_and_the_image_index_alone(images: list[torch.Tensor]) -> None:
    def loss(seed: int, index: int) -> float:
        method = GraTa(tiny_network(), seed=seed)
        method.images_seen = index
        method(images[0])
        return method.last[0]["loss_before"]

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3


def test_grata_refuses_what_it_cannot_turn() -> None:
    with pytest.raises(ValueError, match="two spatial dimensions or more; got 1"):
        GraTa(tiny_network(1, 1, 1))(stream(1, channels=1, dims=1)[0])
