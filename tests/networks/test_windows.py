# SPDX-License-Identifier: Apache-2.0
"""Volumes larger than the network's window, and volumes taken slice by slice."""

from __future__ import annotations

import weakref

import pytest
import torch
from monai.engines import SupervisedEvaluator
from monai.inferers import PatchInferer, SimpleInferer, SliceInferer, SlidingWindowInferer
from torch import Tensor, nn

from mgipt_monai import MGIPT, VPTTA, AdaptiveInferer, BatchNormAdaptation, Source, Tent, TestTimeAdaptationHandler
from mgipt_monai.methods import InTEnt
from mgipt_monai.networks import FrequencyPrompt
from mgipt_monai.networks.alignment.windows import ForwardRoute, Windows, run_in_parts


def network(dims: int = 3, channels: int = 1) -> nn.Module:
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    torch.manual_seed(0)
    net = nn.Sequential(conv(channels, 4, 3, padding=1), norm(4), nn.ReLU(), conv(4, 2, 1))
    net[1].running_mean.uniform_(-0.5, 0.5)
    net[1].running_var.uniform_(0.5, 1.5)
    return net.eval()


def volume(*sides: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 1, *sides, generator=torch.Generator().manual_seed(seed))


def quick(net: nn.Module) -> MGIPT:
    return MGIPT(net, steps=2, instance_sizes=(1, 3), global_sizes=(3,))


METHODS = {
    "mgipt": quick,
    "vptta": lambda net: VPTTA(net, side=3),
    "bn": BatchNormAdaptation,
    "intent": InTEnt,
    "source": Source,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_window_that_covers_the_image_gives_the_whole_images_result(name: str) -> None:
    images = [volume(16, 20, 16, seed=seed) for seed in range(2)]
    whole, windowed = (METHODS[name](network()) for _ in range(2))
    inferer = AdaptiveInferer(windowed, SlidingWindowInferer(roi_size=(16, 20, 16)))
    for image in images:
        torch.testing.assert_close(inferer(image, windowed.network), whole(image), atol=1e-5, rtol=1e-5)
    assert windowed.last[0]["forwards"] == whole.last[0]["forwards"]


def test_source_is_the_pipelines_own_prediction() -> None:
    net, image, sliding = network(), volume(20, 24, 18), SlidingWindowInferer(roi_size=(8, 8, 8), overlap=0.5)
    source = Source(net)
    with torch.no_grad():
        expected = sliding(image, net)
    assert torch.equal(AdaptiveInferer(source, sliding)(image, net), expected)
    assert source.last[0]["forwards"] == 4 * 5 * 4


def test_a_smaller_image_is_padded_as_the_inferer_pads_it() -> None:
    net, image = network(), volume(6, 7, 9)
    sliding = SlidingWindowInferer(roi_size=(8, 8, 8), padding_mode="replicate")
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    windows = Windows(ForwardRoute(sliding), image)
    windows.loss(image, lambda x: net(x).mean((1, 2, 3, 4)))
    with torch.no_grad():
        sliding(image, net)
    # 9 is longer than 8: two windows, those of the inferer overlap as well
    assert {tuple(x.shape[2:]) for x in seen} == {(8, 8, 8)}
    assert torch.equal(seen[0][0], seen[2][0])
    method = quick(net)
    assert AdaptiveInferer(method, sliding)(image, net).shape == (1, 2, 6, 7, 9)


def test_windows_are_those_of_most_contrast_in_place_order() -> None:
    image = torch.zeros(1, 1, 8, 24)
    image[..., ::2, 8:16] = 1.0
    image[..., ::2, 16:24] = 2.0
    windows = Windows(ForwardRoute(SlidingWindowInferer(roi_size=8), windows=2), image)
    assert [place[-1].start for place in windows.slices] == [8, 16]
    assert windows.count == 2


def test_loss_and_gradient_are_those_of_the_windows_mean() -> None:
    image = volume(12, 8)
    windows = Windows(ForwardRoute(SlidingWindowInferer(roi_size=(4, 8)), windows=2), image)
    assert windows.count == 2
    prompt = FrequencyPrompt(spatial_dims=2, in_channels=1, side=3)
    weights = torch.linspace(1, 2, 8)

    def loss(x: Tensor) -> Tensor:
        return (x.square() * weights).mean((1, 2, 3))

    value = windows.loss(prompt(image), loss)
    (gradient,) = torch.autograd.grad(3 * value.sum(), prompt.amplitude)
    expected = torch.stack([loss(prompt(image)[place]) for place in windows.slices]).mean(0)
    (expected_gradient,) = torch.autograd.grad(3 * expected.sum(), prompt.amplitude)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_no_more_than_one_window_goes_through_the_network_at_once() -> None:
    net = network()
    shapes = []
    net.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[2:])))
    method = quick(net)
    logits = AdaptiveInferer(method, SlidingWindowInferer(roi_size=(8, 8, 8)), windows=3)(volume(24, 16, 24), net)
    assert logits.shape == (1, 2, 24, 16, 24)
    assert set(shapes) == {(8, 8, 8)}
    assert method.last[0]["backwards"] % 3 == 0


def test_views_of_a_large_volume_are_not_held_twice() -> None:
    images, held = torch.rand(3, 1, 65, 64, 64), []

    def run(part: Tensor) -> Tensor:
        assert all(output() is None for output in held)
        output = 2 * part
        held.append(weakref.ref(output))
        return output

    assert torch.equal(run_in_parts(run, images), 2 * images)
    assert len(held) == 3
    held.clear()
    assert torch.equal(run_in_parts(run, images[..., :8]), 2 * images[..., :8])
    assert len(held) == 1


def test_windows_show_their_part_of_the_prompted_volume() -> None:
    net, image = network(), volume(16, 16, 16)
    method, seen = quick(net), []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    AdaptiveInferer(method, SlidingWindowInferer(roi_size=(8, 16, 16), overlap=0.0))(image, net)
    prompted = method.adapted_input(image)
    assert not torch.allclose(prompted, image)
    # the last four windows are the prediction's: two views (instance, one global prompt), two halves each
    predicted = torch.cat(seen)[-4:]
    for half in (prompted[0, :, :8], prompted[0, :, 8:]):
        assert sum(torch.allclose(window, half, atol=1e-6) for window in predicted) == 1


@pytest.mark.parametrize("axis", [0, 2])
def test_slices_share_the_volumes_prompt(axis: int) -> None:
    net, image = network(dims=2), volume(10, 10, 10)
    method = quick(net)
    logits = AdaptiveInferer(method, SliceInferer(roi_size=(10, 10), spatial_dim=axis), windows=4)(image, net)
    assert logits.shape == (1, 2, 10, 10, 10)
    assert method.instance_prompt.amplitude.ndim == 5
    assert method.last[0]["loss_after"] < method.last[0]["loss_before"]


def test_second_volume_goes_through_the_same_slice_inferer() -> None:
    net = network(dims=2)
    inferer = AdaptiveInferer(quick(net), SliceInferer(roi_size=(10, 10), spatial_dim=2))
    for sides in ((12, 12, 7), (14, 12, 9)):
        logits = inferer(volume(*sides), net)
        assert logits.shape == (1, 2, *sides)
        assert torch.isfinite(logits).all()


def test_slices_of_source_are_the_slices_one_by_one() -> None:
    net, image = network(dims=2), volume(6, 9, 7)
    logits = AdaptiveInferer(Source(net), SliceInferer(roi_size=(6, 9), spatial_dim=2))(image, net)
    torch.testing.assert_close(logits[..., 3], net(image[..., 3]))


def test_slices_with_prompts_of_their_own_are_images_of_the_stream() -> None:
    net, image = network(dims=2), volume(10, 9, 4)
    image[..., 1] = 0.5
    inferer = AdaptiveInferer(quick(net), SliceInferer(roi_size=(10, 9), spatial_dim=2), slices="own")
    alone = quick(network(dims=2))
    logits = inferer(image, net)
    forwards = 0
    for i in (0, 2, 3):
        assert torch.equal(logits[..., i], alone(image[..., i]))
        forwards += alone.last[0]["forwards"]
    # a constant slice cannot be adapted to
    with torch.no_grad():
        assert torch.equal(logits[..., 1], net(image[..., 1]))
    assert inferer.method.images_seen == 3
    (record,) = inferer.method.last
    assert (record["index"], record["adapted_slices"], record["forwards"]) == (0, 3, forwards + 1)


def test_a_volume_that_fails_at_a_slice_leaves_the_state() -> None:
    net, image = network(dims=2), volume(10, 9, 4)
    inferer = AdaptiveInferer(quick(net), SliceInferer(roi_size=(10, 9), spatial_dim=2), slices="own")
    inferer(image, net)
    before = inferer.method.adaptation_state()
    image[0, 0, 2, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        inferer(image, net)
    after = inferer.method.adaptation_state()
    assert before["images_seen"] == after["images_seen"] == 4
    assert all(map(torch.equal, before["teachers"], after["teachers"]))


def test_slices_need_a_slice_inferer() -> None:
    net = network(dims=2)
    with pytest.raises(ValueError, match="slices='own' needs a SliceInferer, got SlidingWindowInferer"):
        AdaptiveInferer(quick(net), SlidingWindowInferer(roi_size=8), slices="own")
    with pytest.raises(ValueError, match="slices must be one of shared, own; got 'each'"):
        AdaptiveInferer(quick(net), slices="each")


def test_other_inferers_and_methods_that_need_the_whole_image_are_refused() -> None:
    net = network()
    with pytest.raises(TypeError, match="not through a PatchInferer"):
        AdaptiveInferer(quick(net), PatchInferer(splitter=None))
    with pytest.raises(TypeError, match=r"Tent adapts to whole images .* SlidingWindowInferer: use MGIPT"):
        AdaptiveInferer(Tent(net), SlidingWindowInferer(roi_size=8))
    with pytest.raises(ValueError, match="windows must be at least 1, got 0"):
        AdaptiveInferer(quick(net), SlidingWindowInferer(roi_size=8), windows=0)
    AdaptiveInferer(Tent(net), SimpleInferer())


def test_the_handler_predicts_through_the_pipelines_inferer_and_gives_it_back() -> None:
    net, image = network(), volume(16, 8, 16)
    sliding = SlidingWindowInferer(roi_size=(8, 8, 8))
    evaluator = SupervisedEvaluator("cpu", [{"image": image}], network=net, inferer=sliding, decollate=False)
    method, alone = quick(net), quick(network())
    TestTimeAdaptationHandler(method, windows=3).attach(evaluator)
    evaluator.run()
    expected = AdaptiveInferer(alone, sliding, windows=3)(image, alone.network)
    torch.testing.assert_close(evaluator.state.output["pred"], expected)
    assert evaluator.inferer is sliding


def test_network_is_untouched_and_resuming_equals_not_stopping() -> None:
    net, sliding = network(), SlidingWindowInferer(roi_size=(8, 8, 8))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    one, other = AdaptiveInferer(quick(net), sliding), AdaptiveInferer(quick(net), sliding)
    images = [volume(16, 8, 12, seed=seed) for seed in range(3)]
    expected = [one(image, net) for image in images]
    other(images[0], net)
    resumed = AdaptiveInferer(quick(net), sliding)
    resumed.method.load_adaptation_state(other.method.adaptation_state())
    assert all(torch.equal(resumed(image, net), e) for image, e in zip(images[1:], expected[1:], strict=True))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_windows_go_to_the_inferers_device_for_windows() -> None:
    image = volume(12, 8)
    route = ForwardRoute(SlidingWindowInferer(roi_size=(4, 8), sw_device="meta", device="cpu"))
    windows = Windows(route, image)
    assert [window.device.type for window in windows.cut(image)] == ["meta"] * 2
    assert Windows(ForwardRoute(SlidingWindowInferer(roi_size=(4, 8))), image).device == image.device
