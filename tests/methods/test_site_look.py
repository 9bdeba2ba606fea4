# SPDX-License-Identifier: Apache-2.0
"""Site correction without batch norm: it corrects the image's look, and leaves the source alone where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from mgipt_monai import MGIPT, SiteCorrection, SourceStatistics, measure_source_statistics
from mgipt_monai.networks import LowFrequencies, SiteRule
from tests.conftest import (
    MixedNet,
    assert_batch_equals_one_by_one,
    identical,
    same_state,
    snapshot,
    stream,
    tiny_network,
)

SHIFTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contrast": lambda image: 0.2 + 0.5 * image**1.8,
    "low-frequency gain": lambda image: LowFrequencies(image, 5).apply(torch.full((1, 3, 5, 5), 3.0)),
}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return MixedNet().eval()


@pytest.fixture(scope="module")
def statistics(network: nn.Module) -> SourceStatistics:
    return measure_source_statistics(network, stream(30, seed=1))


def run(method: SiteCorrection, images: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [method(image) for image in images]


def test_the_source_s_images_are_predicted_as_without_adaptation_bit_for_bit(
    network: nn.Module, statistics: SourceStatistics
) -> None:
    method = SiteCorrection(network, statistics=statistics)
    for image in stream(12, seed=2):
        with torch.no_grad():
            assert torch.equal(method(image), network(image))
        assert method.last[0]["adapted_weight"] == method.last[0]["evidence"] == 0
        assert method.last[0]["forwards"] == 1


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_of_the_look_is_undone(shift: str, network: nn.Module, statistics: SourceStatistics) -> None:
    method, change = SiteCorrection(network, statistics=statistics), SHIFTS[shift]
    run(method, map(change, stream(20, seed=2)))
    left, lost = [], []
    for image in stream(5, seed=3):
        with torch.no_grad():
            wanted, unadapted = network(image), network(change(image))
        left.append((method(change(image)) - wanted).abs().mean())
        lost.append((unadapted - wanted).abs().mean())
        assert method.last[0]["forwards"] == 2
    assert method.last[0]["adapted_weight"] > 0.25
    assert sum(left) < 0.7 * sum(lost)


def test_the_network_is_untouched_and_the_state_has_constant_size_and_no_image(statistics: SourceStatistics) -> None:
    network = MixedNet().eval()
    before = snapshot(network)
    method = SiteCorrection(network, statistics=statistics, memory=None)
    sizes = set()
    for image in map(SHIFTS["contrast"], stream(4, seed=2)):
        method(image)
        averages = method.adaptation_state()["site"]["averages"]
        sizes.add(tuple((name, tuple(each.shape)) for name, each in averages.items()))
    assert sizes == {(("amplitudes", (4, 3 * 13)), ("tone", (4, 3 * 17)))}
    assert identical(snapshot(network), before)


def test_a_batch_gives_what_its_images_give_one_by_one(network: nn.Module, statistics: SourceStatistics) -> None:
    images = list(map(SHIFTS["contrast"], stream(4, seed=2)))
    assert_batch_equals_one_by_one(lambda: SiteCorrection(network, statistics=statistics), images)


def test_a_resumed_stream_equals_an_uninterrupted_one(network: nn.Module, statistics: SourceStatistics) -> None:
    images = [*stream(12, seed=2), *map(SHIFTS["contrast"], stream(4, seed=3))]
    whole, first, second = (SiteCorrection(network, statistics=statistics) for _ in range(3))
    expected = run(whole, images)
    run(first, images[:13])
    second.load_adaptation_state(first.adaptation_state())
    assert all(map(torch.equal, run(second, images[13:]), expected[13:]))
    assert same_state(second.adaptation_state(), whole.adaptation_state())
    foreign = first.adaptation_state()
    foreign["site"]["averages"]["tone"] = foreign["site"]["averages"]["tone"][:, :5]
    with pytest.raises(ValueError, match="averages of tone have the shape"):
        second.load_adaptation_state(foreign)


def test_a_bad_image_leaves_the_state_as_it_was(network: nn.Module, statistics: SourceStatistics) -> None:
    method = SiteCorrection(network, statistics=statistics)
    run(method, map(SHIFTS["contrast"], stream(2)))
    before = method.adaptation_state()
    for bad in (torch.full((1, 3, 24, 24), torch.nan), torch.rand(1, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"NaN|smaller than"):
            method(bad)
        assert same_state(method.adaptation_state(), before)


def test_a_window_that_covers_the_image_changes_nothing(network: nn.Module, statistics: SourceStatistics) -> None:
    whole, windowed = (SiteCorrection(network, statistics=statistics) for _ in range(2))
    windowed.predict_through(SlidingWindowInferer(roi_size=(24, 24)))
    for image in map(SHIFTS["contrast"], stream(3, seed=2)):
        assert torch.allclose(whole(image), windowed(image), atol=1e-5)
        assert whole.uncertainty.shape == windowed.uncertainty.shape


def test_volumes_in_windows() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, 1)).eval()
    inferer = SlidingWindowInferer(roi_size=(8, 8, 8), overlap=0)
    volumes = stream(12, size=16, channels=1, dims=3)
    statistics = measure_source_statistics(network, volumes, inferer=inferer)
    method = SiteCorrection(network, statistics=statistics, head="softmax")
    method.predict_through(inferer)
    logits = run(method, [volume**3 for volume in volumes[:3]])
    assert logits[-1].shape == (1, 3, 16, 16, 16)
    assert (method.last[0]["forwards"], method.last[0]["adapted_weight"] > 0.25) == (2 * 8, True)


def test_what_it_needs_is_checked_when_it_is_built(
    network: nn.Module, statistics: SourceStatistics, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"found .*InstanceNorm2d.*source-statistics.*statistics_path"):
        SiteCorrection(network)
    old = replace(statistics, look=None)
    old.save(tmp_path / "old.pt")
    MGIPT(network, steps=1, statistics=tmp_path / "old.pt")(stream(1)[0])  # needs no look
    with pytest.raises(ValueError, match=r"old.pt lacks the look .* measure them again with `mgipt source-statistics"):
        SiteCorrection(network, statistics=tmp_path / "old.pt")
    few = measure_source_statistics(network, stream(9))
    with pytest.raises(ValueError, match=r"of 9 source images, too few .* at least 10"):
        SiteCorrection(network, statistics=few)
    rule = SiteRule.__new__(SiteRule)
    object.__setattr__(rule, "trust", 2.0)
    with pytest.raises(ValueError, match=r"rule of site correction needs batch norm, which MixedNet .* rule_path"):
        SiteCorrection(network, statistics=statistics, rule=rule)
    other = MixedNet(seed=1).eval()
    with pytest.raises(ValueError, match="made with other weights"):
        SiteCorrection(other, statistics=statistics)(stream(1)[0])


def test_with_batch_norm_the_statistics_are_not_used(statistics: SourceStatistics) -> None:
    image = stream(1)[0]
    with_file = SiteCorrection(tiny_network(), statistics=statistics)
    assert torch.equal(with_file(image), SiteCorrection(tiny_network())(image))
    assert with_file.last[0]["forwards"] == 3
