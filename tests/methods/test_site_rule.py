# SPDX-License-Identifier: Apache-2.0
"""The rule of site correction: other content is not another site, another look is, and it is its network's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer
from torch import nn

from mgipt_monai import AdaptiveInferer, SiteCorrection
from mgipt_monai.methods import learn_site_rule
from mgipt_monai.methods.site_rule import SimulatedSite
from mgipt_monai.networks import SiteRule
from tests.conftest import identical, snapshot, tiny_network

SIDE = 24


def disc(share: float, seed: int) -> dict[str, torch.Tensor]:
    """A bright disc, which takes this share of a noisy image; no two are lit alike."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[torch.linspace(-0.5, 0.5, SIDE)] * 2, indexing="ij")
    label = ((y.square() + x.square()) * torch.pi < share).float()[None, None]
    image = 0.3 + 0.4 * label.expand(1, 3, -1, -1) + 0.03 * torch.randn(1, 3, SIDE, SIDE, generator=generator)
    image = image * (1 + 0.15 * torch.randn(1, 3, 1, 1, generator=generator))
    return {"image": image, "label": label.expand(1, 2, -1, -1)}


def discs(count: int, least: float = 0.05, most: float = 0.4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    shares = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return [disc(least + (most - least) * share.item(), 1000 * seed + i) for i, share in enumerate(shares)]


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A network whose first channel shows the disc, with the statistics of the source's images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        network[0].weight[0], network[0].bias[0] = 1 / 27, 0.0
        network[2].weight[:] = torch.eye(1, 6).view(1, 6, 1, 1)
        network.train()
        network(torch.cat([item["image"] for item in discs(60, seed=9)]))
        network.eval()
        inner = network[:2]
        network[2].bias[:] = -inner(torch.full((1, 3, 8, 8), 0.4))[0, 0, 4, 4]
    return network


@pytest.fixture(scope="module")
def rule(source: nn.Module) -> SiteRule:
    return learn_site_rule(source, discs(60))


def weights(method: SiteCorrection, images: Iterable[torch.Tensor]) -> list[float]:
    found = []
    for image in images:
        method(image)
        found += [record["adapted_weight"] for record in method.last]
    return found


def dark(image: torch.Tensor) -> torch.Tensor:
    return 0.4 * image


def test_larger_structures_alone_are_no_other_site(source: nn.Module, rule: SiteRule) -> None:
    images = [item["image"] for item in discs(12, least=0.25, seed=1)]
    without = sum(weights(SiteCorrection(source), images)) / 12
    own = sum(weights(SiteCorrection(source, rule=replace(rule, trust=2.5)), images)) / 12
    assert own < 0.05
    assert without > 3 * own


def test_another_look_is_another_site(source: nn.Module, rule: SiteRule) -> None:
    method = SiteCorrection(source, rule=rule)
    items = discs(20, seed=2)
    assert weights(method, [dark(item["image"]) for item in items])[-1] > 0.9
    right = [((method(dark(item["image"])) > 0) == (item["label"] > 0)).float().mean() for item in items]
    plain = [((source(dark(item["image"])) > 0) == (item["label"] > 0)).float().mean() for item in items]
    assert torch.stack(right).mean() > torch.stack(plain).mean() + 0.05


def test_the_first_image_is_no_evidence_unless_it_lies_far_from_the_source(source: nn.Module, rule: SiteRule) -> None:
    near, far = disc(0.2, 5)["image"], dark(disc(0.2, 5)["image"])
    assert weights(SiteCorrection(source), [near])[0] > 0.6  # whatever it shows
    assert weights(SiteCorrection(source, rule=replace(rule, trust=2.5)), [near])[0] < 0.01
    assert weights(SiteCorrection(source, rule=replace(rule, trust=2.5)), [far])[0] > 0.3


def test_trust_is_the_rules_unless_it_is_given(source: nn.Module, rule: SiteRule) -> None:
    assert SiteCorrection(source, rule=rule).trust == rule.trust
    assert SiteCorrection(source, rule=rule, trust=1.5).trust == 1.5
    assert SiteCorrection(source).trust == 2.5


WINDOWS = SlidingWindowInferer(roi_size=(16, 16), sw_batch_size=2, overlap=0.25)


def test_a_rule_holds_for_what_its_network_was_shown(source: nn.Module, rule: SiteRule, tmp_path: Path) -> None:
    of_windows = learn_site_rule(source, discs(24), inferer=WINDOWS)
    assert (rule.window, of_windows.window) == (None, (16, 16))
    of_windows.save(tmp_path / "rule.pt")
    method = SiteCorrection(source, rule=tmp_path / "rule.pt")
    method.predict_through(WINDOWS)
    with pytest.raises(ValueError, match=r"learnt from windows of 16x16, and the SimpleInferer .* whole images: learn"):
        method.predict_through(SimpleInferer())
    with pytest.raises(ValueError, match="the network windows of 8x8"):
        method.predict_through(SlidingWindowInferer(roi_size=(8, 8)))
    method = SiteCorrection(source, rule=rule)
    method.predict_through(SimpleInferer())
    with pytest.raises(ValueError, match=r"from whole images, and .* leave it out \(in the bundle: rule_path\)"):
        method.predict_through(WINDOWS)


def test_in_windows_too_larger_structures_are_no_other_site_and_another_look_is(source: nn.Module) -> None:
    rule = learn_site_rule(source, discs(60), inferer=WINDOWS, windows=3)
    assert rule.digest == learn_site_rule(source, discs(60), inferer=WINDOWS, windows=3).digest

    def weight(rule: SiteRule | None, change: Callable[[torch.Tensor], torch.Tensor]) -> float:
        method = SiteCorrection(source, rule=rule, trust=2.0)
        method.predict_through(WINDOWS, windows=3)
        return sum(weights(method, [change(item["image"]) for item in discs(12, least=0.25, seed=1)])) / 12

    assert weight(rule, lambda image: image) < 0.1
    assert weight(None, lambda image: image) > 2 * weight(rule, lambda image: image)
    assert weight(rule, dark) > 0.7


def test_slices_stay_those_that_the_rule_was_learnt_from(source: nn.Module) -> None:
    volumes = [{key: torch.stack([value] * 2, dim=-1) for key, value in item.items()} for item in discs(12)]
    rule = learn_site_rule(source, volumes, inferer=SliceInferer(spatial_dim=2, roi_size=(24, 24)), sites=0)
    method = SiteCorrection(source, rule=rule)
    slices = SliceInferer(spatial_dim=2, roi_size=(24, 24))
    for volume in volumes[:2]:  # MONAI's inferer changes its own sides at its first volume
        assert AdaptiveInferer(method, slices)(volume["image"], source).shape == volume["label"].shape


def test_learning_leaves_the_network_and_is_the_same_each_time(source: nn.Module, rule: SiteRule) -> None:
    before = snapshot(source)
    source.train()
    again = learn_site_rule(source, discs(60))
    assert source.training
    source.eval()
    assert identical(before, snapshot(source))
    assert again.digest == rule.digest
    assert learn_site_rule(source, discs(60), harm=1.0).trust > learn_site_rule(source, discs(60), harm=0.0).trust


def test_the_file_keeps_every_number_and_holds_for_one_network(
    source: nn.Module, rule: SiteRule, tmp_path: Path
) -> None:
    path = tmp_path / "rule.pt"
    rule.save(path)
    rule.save(path)  # over its own
    image = discs(1)[0]["image"]
    loaded = SiteCorrection(source, rule=path)
    assert loaded.settings() == SiteCorrection(source, rule=rule).settings()
    assert torch.equal(loaded(image), SiteCorrection(source, rule=rule)(image))
    other = nn.Sequential(*[*source[:2], nn.Conv2d(6, 2, 1)])
    with pytest.raises(ValueError, match="made with other weights"):
        SiteCorrection(other, rule=path)(image)
    with pytest.raises(ValueError, match="0 channels for 4, which has"):
        SiteCorrection(tiny_network(), rule=replace(rule, layers={"1": rule.layers["1"]}))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"not a readable rule .*mgipt site-rule"):
        SiteCorrection(source, rule=path)


def test_it_overwrites_no_other_file(rule: SiteRule, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(tiny_network().state_dict(), path)
    with pytest.raises(FileExistsError, match=r"model.pt is not a rule of site correction"):
        rule.save(path)
    with pytest.raises(FileNotFoundError, match="mgipt site-rule"):
        SiteRule.load(tmp_path / "absent.pt")


def test_another_rule_is_another_setting(source: nn.Module, rule: SiteRule) -> None:
    moved = replace(rule, layers={name: replace(each, limits=2 * each.limits) for name, each in rule.layers.items()})
    plain, one, other = (SiteCorrection(source, rule=each).settings() for each in (None, rule, moved))
    assert "rule" not in plain
    assert one["rule"] != other["rule"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": -1}, "sites must be a whole number from 0"),
        ({"length": 1}, "length must be a whole number from 2"),
        ({"harm": 1.5}, "harm must be in"),
        ({"severities": [0]}, "severities must be above 0"),
        ({"head": "soft"}, "head"),
        ({"limit": 3}, "limit must be a whole number from 12"),
    ],
)
def test_wrong_settings_are_refused(source: nn.Module, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn_site_rule(source, discs(12), **change)


def test_images_that_do_not_do_are_refused(source: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least 12 labelled source images, got 3"):
        learn_site_rule(source, discs(3))
    small = [{**item, "label": item["label"][:, :, :8]} for item in discs(12)]
    with pytest.raises(ValueError, match="not of the same size"):
        learn_site_rule(source, small)
    one = [{**item, "label": item["label"].repeat(1, 2, 1, 1)} for item in discs(12)]
    with pytest.raises(ValueError, match="2 output channels do not fit labels of 4 structures"):
        learn_site_rule(source, one)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_simulated_site_is_the_same_for_all_its_images_and_keeps_their_range(dims: int) -> None:
    image = torch.rand(1, 2, *[12] * dims) * 4 - 2
    make: Callable[[float], SimulatedSite] = lambda severity: SimulatedSite(3, severity, 2, dims)  # noqa: E731
    assert torch.equal(make(1.0)(image), make(1.0)(image))
    changed = make(1.0)(image)
    assert torch.allclose(changed.min(), image.min(), atol=1e-4)
    assert torch.allclose(changed.max(), image.max(), atol=1e-4)
    assert (make(2.0)(image) - image).abs().mean() > (make(0.2)(image) - image).abs().mean()
