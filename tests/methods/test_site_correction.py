# SPDX-License-Identifier: Apache-2.0
"""Calibration to the site: nothing where there is no shift, all where there is no doubt."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from mgipt_monai import SiteCorrection
from mgipt_monai.methods import SiteMemory
from mgipt_monai.networks import SiteStatistics, disagreement
from tests.conftest import same_state, stream, tiny_network


def alike(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Images of one mean and deviation, so that what they differ in is not the camera's."""
    images = stream(count, seed=seed)
    return [0.5 + 0.15 * (i - i.mean((2, 3), keepdim=True)) / i.std((2, 3), keepdim=True) for i in images]


@pytest.fixture
def source() -> nn.Module:
    """A network whose statistics are those of the stream's images."""
    network = tiny_network()
    for layer in (network[1], network[4]):
        layer.reset_running_stats()
        layer.momentum = None
    network.train()
    with torch.no_grad():
        for image in alike(60, seed=9):
            network(image)
    return network.eval()


def run(method: SiteCorrection, images: Iterable[torch.Tensor]) -> list[dict]:
    records = []
    for image in images:
        method(image)
        records += method.last
    return records


def test_a_site_like_the_source_is_left_to_the_source(source: nn.Module) -> None:
    method = SiteCorrection(source)
    records = run(method, alike(40))
    assert sum(record["adapted_weight"] for record in records[10:]) / 30 < 0.05
    image = alike(1, seed=5)[0]
    with torch.no_grad():
        plain = source(image)
    assert (method(image) - plain).abs().mean() < 0.05 * plain.std()


def test_another_site_is_calibrated_to(source: nn.Module) -> None:
    method = SiteCorrection(source, SiteStatistics(horizon=60, caution=0), image_share=0)
    records = run(method, [0.3 * image for image in alike(60)])
    assert records[-1]["adapted_weight"] > 0.9
    # a gain is what each channel's mean and deviation can tell
    plain_image = alike(1, seed=5)[0]
    with torch.no_grad():
        wanted, unadapted = source(plain_image), source(0.3 * plain_image)
    adapted = method(0.3 * plain_image)
    assert (adapted - wanted).abs().mean() < 0.5 * (unadapted - wanted).abs().mean()


@pytest.mark.parametrize("trust", [1.5, 2.5])
def test_the_weight_is_the_square_of_the_evidence_up_to_one(source: nn.Module, trust: float) -> None:
    method = SiteCorrection(source, trust=trust)
    records = run(method, [(1 - 0.015 * i) * image for i, image in enumerate(alike(30))])
    for record in records:
        assert record["adapted_weight"] == min(1.0, (trust * record["evidence"]) ** 2)
    weights = [record["adapted_weight"] for record in records]
    assert min(weights) < 0.3
    assert max(weights) > 0.5


def test_without_trust_it_is_the_source(images: list[torch.Tensor]) -> None:
    network = tiny_network()
    method = SiteCorrection(network, trust=1e-9)
    for image in images:
        with torch.no_grad():
            assert torch.allclose(method(image), network(image), atol=1e-5)


def test_a_window_that_covers_the_image_changes_nothing_but_the_cost(images: list[torch.Tensor]) -> None:
    whole, windowed = SiteCorrection(tiny_network()), SiteCorrection(tiny_network())
    windowed.predict_through(SlidingWindowInferer(roi_size=images[0].shape[2:]))
    for image in images:
        assert torch.allclose(whole(image), windowed(image), atol=1e-5)
    assert (whole.last[0]["forwards"], windowed.last[0]["forwards"]) == (3, 4)


def test_windows_share_the_sites_statistics(images: list[torch.Tensor]) -> None:
    method = SiteCorrection(tiny_network())
    method.predict_through(SlidingWindowInferer(roi_size=(16, 16)), windows=2)
    logits = method(images[0])
    assert logits.shape[2:] == images[0].shape[2:]
    assert method.last[0]["forwards"] == 3 * 4 + 2
    assert method.adaptation_state()["site"]["count"] == 1


def test_uncertainty_is_the_disagreement_of_the_three(images: list[torch.Tensor]) -> None:
    method = SiteCorrection(tiny_network())
    assert method.uncertainty is None
    method(torch.cat(images[:2]))
    assert method.uncertainty.shape == (2, 1, *images[0].shape[2:])
    assert method.last[1]["disagreement"] > 0
    with pytest.raises(ValueError, match="constant"):
        method(torch.ones_like(images[0]))
    assert method.uncertainty is None
    agreeing = torch.zeros(3, 2, 4, 4)
    assert disagreement(agreeing)[1] == 0


def test_settings_name_the_sites_too() -> None:
    settings = SiteCorrection(tiny_network(), SiteStatistics(horizon=7)).settings()
    assert settings["site"] == {"horizon": 7, "caution": 2.0}
    assert settings["trust"] == 2.5


def windowed(batch: int = 1, **settings: object) -> SiteCorrection:
    method = SiteCorrection(tiny_network(), **settings)
    method.predict_through(SlidingWindowInferer(roi_size=(16, 16), sw_batch_size=batch, overlap=0.5, mode="gaussian"))
    return method


def test_windows_fuse_what_three_passes_of_all_windows_give(images: list[torch.Tensor]) -> None:
    """An inferer of one's own gets a pass for each view, as it may not take more channels than the network has."""

    class Own(SlidingWindowInferer):
        def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
            return super().__call__(*args, **kwargs)

    together, apart = windowed(), windowed()
    apart.predict_through(Own(roi_size=(16, 16), overlap=0.5, mode="gaussian"))
    for image in images:
        assert torch.allclose(together(image), apart(image), atol=1e-5)
    one, other = together.last[0], apart.last[0]
    assert one["forwards"] == other["forwards"]
    assert one["evidence"] == other["evidence"]
    assert same_state(together.adaptation_state(), apart.adaptation_state())
    # the maps are of the windows' views, blended, and of the blended views
    assert (together.uncertainty - apart.uncertainty).abs().mean() < 0.05
    assert abs(one["disagreement"] - other["disagreement"]) < 0.05


def test_state_does_not_depend_on_how_many_windows_go_together(images: list[torch.Tensor]) -> None:
    single, several = windowed(batch=1), windowed(batch=5)
    for image in images:
        assert torch.allclose(single(image), several(image), atol=1e-5)
        assert torch.allclose(single.uncertainty, several.uncertainty, atol=1e-5)
    assert same_state(single.adaptation_state(), several.adaptation_state())


def test_windows_compare_with_the_source_at_no_cost_and_no_change(images: list[torch.Tensor]) -> None:
    plain, compared = windowed(), windowed()
    compared.compare()
    for image in images:
        assert torch.equal(plain(image), compared(image))
    assert torch.equal(plain.uncertainty, compared.uncertainty)
    assert plain.last == compared.last
    assert plain.unadapted is None
    with torch.no_grad():
        assert torch.allclose(compared.unadapted, compared.route.inferer(images[-1], compared.network), atol=1e-6)


def test_a_volume_in_windows_is_not_held_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    blended, run = [], SlidingWindowInferer.__call__

    def noted(*args: object) -> torch.Tensor:
        blended.append(run(*args))
        return blended[-1]

    monkeypatch.setattr(SlidingWindowInferer, "__call__", noted)
    method = SiteCorrection(tiny_network(3, 1))
    method.predict_through(SlidingWindowInferer(roi_size=(8, 8, 8)))
    logits = method(stream(1, size=16, channels=1, dims=3)[0])
    # one pass, with one channel more than the network has, and no copy of it
    assert [tuple(each.shape) for each in blended] == [(1, 3, 16, 16, 16)]
    assert logits.data_ptr() == blended[0].data_ptr()


def test_resuming_a_stream_of_windows_equals_not_stopping(images: list[torch.Tensor]) -> None:
    whole, first, second = windowed(), windowed(), windowed()
    expected = [whole(image) for image in images]
    for image in images[:2]:
        first(image)
    second.load_adaptation_state(first.adaptation_state())
    assert all(torch.equal(second(image), e) for image, e in zip(images[2:], expected[2:], strict=True))


# --- refresh: a settled site is learnt from in every n-th image


def settled(network: nn.Module, refresh: int | None = 3, **settings: object) -> SiteCorrection:
    """A method after the first four images of a darker site, which are all that its averages are over."""
    method = SiteCorrection(network, SiteStatistics(horizon=4), refresh=refresh, **settings)
    run(method, [0.3 * image for image in alike(4)])
    return method


def test_a_settled_site_costs_one_pass_between_refreshes(source: nn.Module) -> None:
    method, always = settled(source), settled(source, refresh=None)
    assert same_state(method.adaptation_state(), always.adaptation_state())
    before = method.adaptation_state()
    records = run(method, [0.3 * image for image in alike(6, seed=1)])
    assert [record["refreshed"] for record in records] == [False, False, True] * 2
    assert [record["forwards"] for record in records] == [1, 1, 3] * 2
    assert before["site"]["count"] == 4
    assert method.adaptation_state()["site"]["count"] == 6
    assert records[0]["evidence"] == records[1]["evidence"] != records[3]["evidence"]
    assert method.uncertainty is None
    assert not method.has_uncertainty


def test_between_refreshes_nothing_is_learnt_and_the_weight_moves_the_statistics(source: nn.Module) -> None:
    image = 0.3 * alike(1, seed=2)[0]
    full = settled(source, trust=100.0, image_share=0)
    before = full.adaptation_state()
    with torch.no_grad(), full.norms.corrected_to(full.site):
        full.site.begin()
        expected = full.norms.predict(image, "calibrated")
    assert torch.equal(full(image), expected)
    assert full.last[0]["adapted_weight"] == 1
    assert same_state(full.adaptation_state()["site"], before["site"])

    none, part = settled(source, trust=1e-9), settled(source, trust=1.0, image_share=0)
    with torch.no_grad():
        assert torch.allclose(none(image), source(image), atol=1e-6)
    logits, weight = part(image), part.last[0]["adapted_weight"]
    assert 0.1 < weight < 0.9
    moved = copy.deepcopy(source)
    for name in ("1", "4"):
        layer = moved.get_submodule(name)
        std = (layer.running_var + layer.eps).sqrt()
        site_mean, site_std = part.site.correct(name, layer.running_mean, std)
        layer.running_mean.lerp_(site_mean, weight)
        layer.running_var.copy_((std.log().lerp(site_std.log(), weight)).exp().square() - layer.eps)
    with torch.no_grad():
        assert torch.allclose(logits, moved(image), atol=1e-5)


def test_refreshing_resumes_and_takes_batches_and_windows(source: nn.Module) -> None:
    images = [0.3 * image for image in alike(5, seed=3)]
    one_by_one, batch, resumed, looking = (settled(source) for _ in range(4))
    expected = [one_by_one(image) for image in images]
    assert torch.equal(batch(torch.cat(images)), torch.cat(expected))
    resumed.load_adaptation_state(one_by_one.twin().adaptation_state())
    assert torch.equal(resumed(images[0]), one_by_one(images[0]))
    looking.predict_through(SlidingWindowInferer(roi_size=images[0].shape[2:], overlap=0))
    assert torch.allclose(looking(images[0]), expected[0], atol=1e-5)
    assert looking.last[0]["forwards"] == 1
    looking.compare()
    looking(images[1])
    assert looking.last[0]["forwards"] == 2
    assert looking.unadapted is not None


def test_another_site_is_learnt_from_at_once_when_it_is_noticed(source: nn.Module) -> None:
    method = SiteCorrection(source, SiteStatistics(horizon=4), memory=SiteMemory(warm_up=3), refresh=2)
    here = run(method, [0.3 * image for image in alike(6)])
    there = run(method, [3.0 * image for image in alike(6, seed=1)])
    back = run(method, [0.3 * image for image in alike(2, seed=2)])
    assert [record["refreshed"] for record in here] == [True] * 5 + [False]
    assert [record["elsewhere"] for record in there] == [True] * 2 + [False] * 4
    assert [record["refreshed"] for record in there] == [True] * 3 + [False, True, False]
    assert [record["refreshed"] for record in back] == [True, False]


@pytest.mark.parametrize("refresh", [0, 1, 2.5, "5", -3])
def test_refresh_must_be_some_images(refresh: object) -> None:
    with pytest.raises(ValueError, match=f"refresh must be a whole number of images from 2, or None, got {refresh}"):
        SiteCorrection(tiny_network(), refresh=refresh)
