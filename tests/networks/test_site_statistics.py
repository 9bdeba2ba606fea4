# SPDX-License-Identifier: Apache-2.0
"""A site's shift, separated from the variation of its images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mgipt_monai.networks import SiteNorms, SiteStatistics
from mgipt_monai.networks.alignment import site as site_module
from tests.conftest import same_state, stream, tiny_network

MEAN, STD = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.5, 1.0, 2.0, 0.1])
CHANNELS = {"norm": 4}


def see(site: SiteStatistics, z: Tensor, r: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """One image whose mean is z source deviations off and whose deviation has the logarithm r to the source's."""
    site.begin()
    site.observe("norm", (MEAN + z * STD)[None], (STD * torch.as_tensor(r).exp()).expand(4)[None], MEAN, STD)
    corrected = site.correct("norm", MEAN, STD)
    site.end()
    return corrected


def noise(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, generator=generator) for _ in range(count)]


def test_images_of_the_source_correct_nothing() -> None:
    site = SiteStatistics()
    mean, std = see(site, torch.zeros(4))
    assert torch.equal(mean, MEAN)
    assert torch.allclose(std, STD)
    assert site.evidence == 0


def test_a_shift_that_all_images_share_is_corrected_but_for_the_caution() -> None:
    site = SiteStatistics(caution=4)
    for n in range(1, 50):
        mean, std = see(site, torch.full((4,), 2.0), r=-1.0)
        share = n / (n + 4)
        assert site.evidence == pytest.approx(share, abs=1e-4)
        assert torch.allclose(mean, MEAN + 2 * share * STD, atol=1e-3)
        assert torch.allclose(std, STD * math.exp(-share), atol=1e-3)


def test_scatter_around_the_source_is_hardly_corrected() -> None:
    site = SiteStatistics()
    evidences = []
    for z in noise(200):
        see(site, z)
        evidences.append(site.evidence)
    assert sum(evidences[20:]) / 180 < 0.03


def test_the_share_is_that_of_the_shift_in_all_that_images_differ() -> None:
    shares = {}
    for shift in (0.5, 1.0, 3.0):
        site, evidences = SiteStatistics(caution=0), []
        for z in noise(400):
            see(site, shift + z)
            evidences.append(site.evidence)
        shares[shift] = sum(evidences[50:]) / 350
    # both squares are averaged over z and r, and no r varies here
    assert shares == pytest.approx({shift: shift**2 / (shift**2 + 1) for shift in shares}, abs=0.06)


def test_it_follows_the_stream_to_another_site() -> None:
    site = SiteStatistics(horizon=10, caution=0)
    for _ in range(30):
        see(site, torch.full((4,), 2.0))
    for _ in range(100):
        mean, _ = see(site, torch.full((4,), -3.0))
    assert torch.allclose(mean, MEAN - 3 * STD, atol=0.05)


def test_an_image_that_did_not_end_leaves_nothing() -> None:
    site, clean = SiteStatistics(), SiteStatistics()
    for each in (site, clean):
        see(each, torch.ones(4))
    site.begin()
    site.observe("norm", MEAN[None] + 9, STD[None], MEAN, STD)
    assert same_state(site.adaptation_state(), clean.adaptation_state())
    assert torch.equal(see(site, -torch.ones(4))[0], see(clean, -torch.ones(4))[0])


def test_windows_of_an_image_count_as_one_image() -> None:
    windows, whole = SiteStatistics(), SiteStatistics()
    values = [torch.full((4,), v) for v in (1.0, 2.0, 6.0)]
    windows.begin()
    for z in values:
        windows.observe("norm", (MEAN + z * STD)[None], STD[None], MEAN, STD)
    windows.end()
    whole.begin()
    whole.observe("norm", torch.stack([MEAN + z * STD for z in values]), STD.expand(3, 4), MEAN, STD)
    whole.end()
    one, other = (each.adaptation_state() for each in (windows, whole))
    assert one["count"] == other["count"] == 1
    assert torch.allclose(one["averages"]["norm"], other["averages"]["norm"], atol=1e-5)
    assert torch.allclose(one["averages"]["norm"][0], torch.full((4,), 3.0), atol=1e-5)


def test_size_of_the_state_does_not_depend_on_the_stream_and_a_silent_channel_is_finite() -> None:
    site = SiteStatistics()
    for z in noise(40):
        mean, std = see(site, z, r=-math.inf)
        assert site.adaptation_state()["averages"]["norm"].shape == (4, 4)
        assert torch.isfinite(mean).all()
        assert torch.isfinite(std).all()


def test_state_goes_on_as_if_it_had_not_stopped() -> None:
    whole, first = SiteStatistics(), SiteStatistics()
    for z in noise(5):
        see(whole, z)
        see(first, z)
    second = SiteStatistics()
    see(second, torch.full((4,), 7.0))
    second.load_adaptation_state(first.adaptation_state(), CHANNELS)
    for z in noise(5, seed=1):
        assert all(map(torch.equal, see(whole, z), see(second, z)))
    first.reset()
    assert first.adaptation_state() == {"count": 0, "averages": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "count .* -1"),
        ({"count": 0}, "0 images but averages of 1 layers"),
        ({"averages": {"other": torch.zeros(4, 4)}}, "'other' that is not aligned"),
        ({"averages": {"norm": torch.zeros(4, 3)}}, r"shape \(4, 3\), not \(4, 4\)"),
        ({"averages": {"norm": torch.full((4, 4), math.nan)}}, "not finite"),
        ({"averages": {"norm": [0.0]}}, "must be a tensor"),
        ({"averages": None}, "must be a dict"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: dict, message: str) -> None:
    site = SiteStatistics()
    see(site, torch.ones(4))
    before = site.adaptation_state()
    with pytest.raises(ValueError, match=message):
        site.load_adaptation_state({**before, **change}, CHANNELS)
    assert same_state(site.adaptation_state(), before)


@pytest.mark.parametrize(
    ("setting", "value"), [("horizon", 1), ("horizon", 2.5), ("caution", -1), ("caution", math.inf)]
)
def test_wrong_settings_fail_with_the_value(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting} .* {value}"):
        SiteStatistics(**{setting: value})


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("shares", [0.0, 0.2, (0.0, 0.2)])
def test_features_are_measured_only_where_their_own_statistics_count(
    dims: int, shares: float | tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    own = site_module.instance_statistics
    monkeypatch.setattr(site_module, "instance_statistics", lambda x: measured.append(len(x)) or own(x))
    network, (first, second) = tiny_network(dims).eval().requires_grad_(False), stream(2, dims=dims)
    norms, site = SiteNorms(network), SiteStatistics(caution=0)
    norms.start(first)
    site.begin()
    with norms.corrected_to(site, observe=True), torch.no_grad():
        norms.run(first, "calibrated")
    assert not measured
    each = shares if isinstance(shares, tuple) else (shares,)
    with norms.corrected_to(site, image_share=shares), torch.no_grad():
        made = norms.run(torch.cat([second] * len(each)), "calibrated")
    assert len(measured) == (len(norms.layers) if 0.2 in each else 0)
    assert set(measured) <= {1}
    for share, logits in zip(each, made.split(1), strict=True):
        with norms.corrected_to(site, image_share=share):  # with gradients, all are measured
            expected = norms.run(second.clone().requires_grad_(), "calibrated")
        torch.testing.assert_close(logits, expected.detach(), atol=1e-5, rtol=1e-5)
