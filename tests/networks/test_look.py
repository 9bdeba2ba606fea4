# SPDX-License-Identifier: Apache-2.0
"""The look of images: what it measures, and that a change of look can be undone."""

from __future__ import annotations

import pytest
import torch

from mgipt_monai.networks import LowFrequencies, SiteStatistics
from mgipt_monai.networks.look import (
    LookAverages,
    RunningLook,
    SiteLook,
    SourceLook,
    amplitudes,
    change_amplitudes,
    change_tone,
    tone,
)
from tests.conftest import stream


def look_of(images: list[torch.Tensor]) -> SourceLook:
    running = RunningLook()
    for image in images:
        running.add(image)
    look = running.look()
    assert look is not None
    return look


@pytest.mark.parametrize("dims", [2, 3])
def test_amplitudes_tell_a_gain_of_the_low_frequencies_and_can_be_changed_back(dims: int) -> None:
    image = stream(1, size=16, channels=2, dims=dims)[0]
    gained = LowFrequencies(image, 5).apply(torch.full((1, 2, *[5] * dims), 1.5))
    change = amplitudes(gained) - amplitudes(image)
    assert change.shape == (2, (5**dims + 1) // 2)
    torch.testing.assert_close(change, torch.full_like(change, 1.5).log(), atol=1e-3, rtol=0)
    torch.testing.assert_close(change_amplitudes(gained, -change), image, atol=1e-4, rtol=0)


def test_a_thin_volume_lacks_frequencies() -> None:
    thin = stream(1, size=16, channels=1, dims=3)[0][..., :3]
    found = amplitudes(thin)
    assert found.shape == (1, 63)
    assert found.isfinite().sum() == 13
    change = found.nan_to_num(0.0) * 0
    torch.testing.assert_close(change_amplitudes(thin, change), thin)


def test_the_darkest_value_is_no_tone() -> None:
    image = stream(1, channels=1)[0]
    padded = torch.nn.functional.pad(image, (8, 8, 8, 8), value=image.min().item())
    assert torch.equal(tone(padded), tone(image))
    assert tone(torch.zeros(1, 2, 8, 8)).unique().tolist() == [0.0]  # a channel of one value, such as guidance


def test_a_tone_curve_is_undone_where_it_is_known() -> None:
    image = stream(1)[0]
    darker = image**2
    places = tone(darker)
    assert (places[:, 1:] >= places[:, :-1]).all()
    restored = change_tone(darker, places, tone(image) - places)
    assert (restored - image).abs().mean() < 0.05 * (darker - image).abs().mean()
    same = change_tone(darker, places, torch.zeros_like(places))
    assert torch.equal(same, darker)
    # the order of values stays
    values, mapped = darker[0, 0].flatten(), restored[0, 0].flatten()
    assert (mapped[values.argsort()].diff() >= -1e-5).all()


def test_a_large_image_is_mapped_in_slabs_like_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    image = stream(1)[0]
    places = tone(image)
    whole = change_tone(image, places, 0.1 * places)
    monkeypatch.setattr("mgipt_monai.networks.look.SLAB", 100)
    assert torch.equal(change_tone(image, places, 0.1 * places), whole)


def test_images_like_the_source_s_open_no_gate() -> None:
    look, site = SiteLook(look_of(stream(30, seed=1))), SiteStatistics()
    for image in stream(10, seed=2):
        site.begin()
        corrected, beyond = look.correct(image, site)
        site.end()
    assert beyond == 0
    assert corrected is image


def test_what_does_not_fit_is_refused() -> None:
    look, site = SiteLook(look_of(stream(3))), SiteStatistics()
    site.begin()
    with pytest.raises(ValueError, match=r"amplitudes of shape \(1, 13\), the source's images of \(3, 13\)"):
        look.correct(stream(1, channels=1)[0], site)
    running = RunningLook()
    running.add(stream(1)[0])
    running.add(torch.rand(1, 3, 4, 4))
    assert running.look() is None
    good = LookAverages(torch.zeros(1, 17), torch.ones(1, 17))
    for bad in (
        LookAverages(torch.zeros(1, 17), -torch.ones(1, 17)),
        LookAverages(torch.full((1, 17), torch.nan), torch.ones(1, 17)),
        LookAverages(torch.zeros(1, 16), torch.ones(1, 17)),
        LookAverages(torch.zeros(1, 17).double(), torch.ones(1, 17).double()),
        LookAverages(torch.zeros(2, 17), torch.ones(2, 17)),
    ):
        with pytest.raises(ValueError, match=r"source"):
            SourceLook(good, bad)
