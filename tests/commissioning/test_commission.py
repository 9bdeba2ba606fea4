# SPDX-License-Identifier: Apache-2.0
"""Commissioning on sites whose best correction is known."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from mgipt_monai import MGIPT, SiteCorrection, Source, commission
from mgipt_monai.commissioning import Commissioning, audit, commission_site
from mgipt_monai.commissioning.correctors import (
    OFFSETS,
    dice_at_offsets,
    fit_norms,
    fit_offset,
    fit_prompts,
    fit_temperature,
)
from mgipt_monai.commissioning.trial import TRAINED
from mgipt_monai.methods import Commissioned, Guarded, SiteSetting
from mgipt_monai.networks.correction import Correction
from mgipt_monai.networks.prompts.early_stop import binarize
from mgipt_monai.utils.provenance import fingerprint
from tests.conftest import identical, same_state, snapshot

QUICK = ("none + offset", "steady + offset")


def segmenter(norm: bool = True, classes: int = 2) -> nn.Module:
    """A network that finds bright and very bright pixels."""
    torch.manual_seed(0)
    first = nn.Conv2d(1, 4, 3, padding=1)
    with torch.no_grad():
        first.weight.mul_(0.01)
        first.weight[:, :, 1, 1] += 1
        first.bias.zero_()
    last = nn.Conv2d(4, classes, 1)
    with torch.no_grad():
        last.weight.fill_(4)
        last.bias.copy_(-16 * torch.tensor([0.5, 0.8, 0.9])[:classes])
    middle = nn.BatchNorm2d(4, eps=0.0) if norm else nn.Identity()
    return nn.Sequential(first, middle, last).eval().requires_grad_(False)


def site(
    count: int, seed: int = 0, shift: float = 0.0, thresholds: tuple[float, ...] = (0.5, 0.8), groups: int | None = None
) -> list[dict[str, Any]]:
    """Smooth images whose annotators draw borders at thresholds, photographed brighter by ``shift``."""
    generator = torch.Generator().manual_seed(seed)
    labelled = []
    for index in range(count):
        rough = torch.rand(1, 1, 6, 6, generator=generator)
        image = nn.functional.interpolate(rough, size=(32, 32), mode="bicubic")[0].clamp(0, 1)
        case = {"image": image + shift, "label": torch.cat([(image > t).float() for t in thresholds])}
        labelled.append({**case, "name": f"eye_{index}", **({"group": f"p{index % groups}"} if groups else {})})
    return labelled


def dice(method: Any, cases: list[dict[str, Any]]) -> float:
    values = []
    for case in cases:
        mask, label = (method(case["image"][None])[0] > 0).float(), case["label"]
        values.append((2 * (mask * label).sum((1, 2)) / (mask + label).sum((1, 2)).clamp(min=1)).mean().item())
    return float(np.mean(values))


@pytest.fixture(scope="module")
def found() -> Commissioning:
    """A site whose annotators draw wider than the network."""
    return commission(segmenter(), site(10, thresholds=(0.4, 0.65)), candidates=QUICK)


def test_other_annotators_are_met_by_an_offset_that_gains_on_new_images(found: Commissioning) -> None:
    assert (found.certified, found.chosen) == (True, "none + offset")
    new = site(20, seed=1, thresholds=(0.4, 0.65))
    gain = dice(found.method, new) - dice(Source(segmenter()), new)
    assert 0 < found.lower_bound < gain
    assert gain == pytest.approx(found.gain, abs=0.05)
    assert found.harm == 0
    assert "90% confidence" in found.statement
    assert found.setting.correction.offset.tolist() == pytest.approx([1.6, 2.4], abs=0.5)
    assert [row.name for row in found.table][-1] != "none + offset"


def test_site_like_the_source_leaves_the_network_alone() -> None:
    network = segmenter()
    result = commission(network, site(10, thresholds=(0.5, 0.8)), candidates=QUICK)
    assert (result.certified, result.chosen, result.setting) == (False, "none", None)
    assert isinstance(result.method, Source)
    image = site(1, seed=3)[0]["image"][None]
    assert torch.equal(result.method(image), network(image))
    assert "Keep the network as it is" in result.statement


def test_other_camera_is_met_by_the_norm_layers() -> None:
    dark = site(8, shift=-0.4)
    result = commission(segmenter(), dark, candidates=["none + norms", "none + prompts"])
    assert result.certified
    new = site(10, seed=1, shift=-0.4)
    assert dice(result.method, new) > dice(Source(segmenter()), new) + 0.2
    assert result.method.last[0]["corrected"] in (["norms", "offset"], ["prompts", "offset"])


def test_network_stays_bit_identical_and_the_same_seed_gives_the_same(found: Commissioning) -> None:
    network = segmenter()
    before = snapshot(network)
    cases = site(6, thresholds=(0.4, 0.65))
    one, other = (commission(network, cases, candidates=["none + norms", "fast + offset"]) for _ in range(2))
    assert identical(before, snapshot(network))
    assert one.table == other.table
    assert one.statement == other.statement
    image = site(1, seed=5)[0]["image"][None]
    assert torch.equal(one.method(image), other.method(image))


def test_setting_is_small_and_holds_no_image(found: Commissioning) -> None:
    big = [{"image": torch.rand(1, 256, 256), "label": (torch.rand(1, 256, 256) > 0.5).float()} for _ in range(5)]
    result = commission(
        segmenter(classes=1), big, candidates=["steady + offset", "none + norms"], fallback="steady", check_labels=False
    )
    file = io.BytesIO()
    torch.save({**vars(result.setting), "correction": result.setting.correction.state()}, file)
    assert file.tell() < 50_000  # an image has 262,144 bytes
    assert sum(found.setting.correction.numbers.values()) < 300


def test_commissioned_is_prompts_then_method_then_offset(found: Commissioning) -> None:
    network, image = segmenter(), site(1, seed=4)[0]["image"][None]
    correction = Correction(torch.tensor([0.5, -0.5]), 2.0, (torch.full((1, 1, 3, 3), 1.1),))
    plain = SiteCorrection(network)
    setting = SiteSetting(fingerprint(network), plain.settings(), correction)
    method = Commissioned(SiteCorrection(network), setting)
    expected = correction.to_logits(plain(correction.to_image(image)))
    assert torch.equal(method(image), expected)
    assert method.last[0]["corrected"] == ["prompts", "offset"]
    assert method.network is network


@pytest.mark.parametrize("base", ["steady", "fast", "none"])
def test_stream_starts_from_what_was_learnt_and_resumes_alike(base: str) -> None:
    cases = site(6, thresholds=(0.3, 0.6))
    result = commission(segmenter(), cases, candidates=[f"{base} + norms"], max_harm=1.0)
    setting = result.setting
    assert setting is not None

    def build() -> Commissioned:
        kinds = {
            "steady": SiteCorrection,
            "none": Source,
            "fast": lambda network: MGIPT(network, instance_sizes=[1], steps=2, global_sizes=[5]),
        }
        return Commissioned(kinds[base](segmenter()), setting)

    images = [case["image"][None] for case in site(4, seed=2, thresholds=(0.3, 0.6))]
    whole, first, second = build(), build(), build()
    expected = [whole(image) for image in images]
    for image in images[:2]:
        first(image)
    second.load_adaptation_state(copy.deepcopy(first.adaptation_state()))
    assert all(torch.equal(second(image), logits) for image, logits in zip(images[2:], expected[2:], strict=True))
    assert same_state(second.adaptation_state(), whole.adaptation_state())
    whole.reset()
    assert torch.equal(whole(images[0]), expected[0])
    twin = whole.twin()
    assert torch.equal(twin(images[1]), whole(images[1]))
    assert "monitor" in whole.last[0]


def test_weights_and_settings_other_than_commissioned_are_refused(found: Commissioning) -> None:
    other = segmenter()
    other[2].bias += 1
    method = Commissioned(Source(other), found.setting)
    with pytest.raises(ValueError, match="other weights than this Sequential has"):
        method(site(1)[0]["image"][None])
    with pytest.raises(ValueError, match="was commissioned with the method"):
        Commissioned(SiteCorrection(segmenter(), trust=1.0), found.setting)
    with pytest.raises(TypeError, match="already commissioned"):
        Commissioned(found.method, found.setting)
    with pytest.raises(TypeError, match="without a guard"):
        Guarded(found.method)


def test_file_gives_the_same_setting_and_damage_is_refused(found: Commissioning, tmp_path: Any) -> None:
    path = tmp_path / "site.pt"
    found.setting.save(path)
    image = site(1, seed=4)[0]["image"][None]
    assert torch.equal(Commissioned(Source(segmenter()), path)(image), found.method(image))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable site's setting"):
        SiteSetting.load(path)


def test_groups_count_once_and_are_never_split() -> None:
    cases = site(12, thresholds=(0.4, 0.65), groups=6)
    result = commission(segmenter(), cases, candidates=QUICK)
    assert "; 6 labelled images" in result.statement or "with 6 labelled images" in result.statement
    assert {case["group"] for case in result.cases} == {f"p{n}" for n in range(6)}
    with pytest.raises(ValueError, match=r"2 labelled groups \(in 12 images\) can certify nothing"):
        commission(segmenter(), site(12, groups=2), candidates=QUICK)


def test_fallback_is_deployed_where_nothing_is_proven() -> None:
    result = commission(segmenter(), site(5, shift=0.2), candidates=["none"], fallback="steady")
    assert (result.certified, result.chosen) == (False, "steady")
    assert isinstance(result.method, Commissioned)
    assert result.method.method.name == "SiteCorrection"
    assert "'steady' is deployed, unproven" in result.statement


def test_fallback_that_loses_on_the_labelled_images_is_not_deployed() -> None:
    network, cases = segmenter(), site(6, shift=0.2)
    for case in cases:  # drawn as the source network does
        case["label"] = (network(case["image"][None])[0] > 0).float()
    result = commission(network, cases, candidates=["none + offset"], fallback="steady", check_labels=False)
    assert (result.certified, result.chosen, result.setting) == (False, "none", None)
    assert isinstance(result.method, Source)
    assert "Keep the network as it is" in result.statement
    assert "and 'steady' loses" in result.statement


def test_too_much_harm_is_no_certificate(found: Commissioning) -> None:
    cases = site(10, thresholds=(0.4, 0.65))
    cases[0]["label"] = site(10)[0]["label"]  # one annotator who draws like the source
    strict = commission(segmenter(), cases, candidates=["none + offset"], max_harm=0.05)
    assert not strict.certified
    assert "lose more than 1 points" in strict.statement


def change(key: str, value: Any, place: int = 1) -> list[dict[str, Any]]:
    cases = site(5)
    cases[place][key] = value
    return cases


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        (site(4), "4 labelled images can certify nothing: give at least 5"),
        (change("label", torch.zeros(2, 32, 32)), "eye_1: the label is empty"),
        (change("label", torch.ones(2, 16, 16)), "eye_1: the image is 32x32 and the label 16x16"),
        (change("label", torch.full((2, 32, 32), 2.0)), "eye_1: the label has values other than 0 and 1"),
        (change("label", torch.ones(3, 32, 32)), "eye_1: 3 classes, but eye_0 has 2"),
        (change("image", torch.full((1, 32, 32), float("nan"))), "eye_1: the image has 1024 NaN"),
        (change("image", site(1)[0]["image"]), "eye_1 is the same image as eye_0"),
        (change("name", "eye_0"), "two images have the name eye_0"),
        ([{"image": torch.rand(1, 8, 8)}], "image 0 has no label"),
        (
            [{**case, "label": case["label"] * torch.tensor([1.0, 0.0])[:, None, None]} for case in site(5)],
            "class 1 is",
        ),
        ([{**case, "label": case["label"].flip(0)} for case in site(5)], "seem to be swapped"),
        ([{**case, "label": case["label"][:1]} for case in site(5)], "the network predicts 2 classes"),
    ],
)
def test_labels_and_images_that_cannot_be_right_are_named(cases: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        commission(segmenter(), cases, candidates=["none + offset"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence": 1.5}, "confidence must be between 0 and 1, got 1.5"),
        ({"candidates": ["none + luck"]}, "there is no candidate 'none \\+ luck'"),
        ({"candidates": ["other"]}, "there is no candidate 'other'"),
        ({"fallback": "hope"}, "fallback must be one of none, steady; got 'hope'"),
        ({"metric": "iou"}, "metric must be one of dice, surface_dice; got 'iou'"),
        ({"max_harm": 2}, "max_harm must be in"),
        ({"tolerated_loss": -1}, "tolerated_loss must be in"),
        ({"head": "tanh"}, "head must be one of"),
        ({"bound": "hope"}, "bound must be one of student, betting; got 'hope'"),
        ({"boundary": -1}, "boundary must not be negative, got -1"),
        ({"class_names": ["disc"]}, "class_names are"),
    ],
)
def test_wrong_settings_fail_before_any_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        commission(segmenter(), site(5), **settings)


@pytest.mark.parametrize("settings", [{"confidence": 1.5}, {"candidates": ["other"]}, {"bound": "hope"}], ids=str)
def test_wrong_settings_of_a_site_fail_before_an_image_is_read(settings: dict[str, Any], tmp_path: Path) -> None:
    def dataset() -> Iterator[dict]:
        raise AssertionError("an image was read")
        yield {}

    with pytest.raises(ValueError, match=next(iter(settings)).removesuffix("s")):
        commission_site(segmenter(), dataset(), [{"name": "eye"}], tmp_path, **settings)


def test_bases_that_do_not_fit_the_network_are_left_out_with_the_reason() -> None:
    result = commission(segmenter(norm=False), site(6, thresholds=(0.4, 0.65)), check_labels=False)
    assert set(result.skipped) == {"steady", "fast"}
    assert "source-statistics" in result.skipped["steady"]
    assert result.certified


def test_corrector_whose_fit_overflows_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(*_: Any) -> Correction:
        return Correction(prompts=(torch.full((1, 1, 1, 1), 1e38),))  # no image survives it

    monkeypatch.setitem(TRAINED, "prompts", overflowing)
    cases = site(6, thresholds=(0.4, 0.65))
    result = commission(segmenter(), cases, candidates=["none + offset", "none + prompts"])
    assert result.chosen == "none + offset"
    assert "the image is constant" in result.skipped["none + prompts"]


def test_setting_that_cannot_be_fitted_to_all_images_is_not_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = site(8, shift=0.3)

    def overflowing(network: nn.Module, images: list, *rest: Any) -> Correction:
        if len(images) == len(labelled):
            raise ValueError("the network's activations overflow")
        return fit_norms(network, images, *rest)

    monkeypatch.setitem(TRAINED, "norms", overflowing)
    found = commission(segmenter(), labelled, candidates=["none + norms"])
    assert not found.certified
    assert found.chosen == "none"
    assert isinstance(found.method, Source)
    assert "cannot be fitted to all images (the network's activations overflow)" in found.statement


def test_images_without_a_finite_gradient_move_no_share() -> None:
    class Overflowing(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return network(image) * (torch.inf if image.mean() > 1 else 1)

    network, overflowing, cases = segmenter(), Overflowing(), site(4, shift=-0.4)
    overflowing.inner = network
    images, labels = ([case[key][None] for case in cases] for key in ("image", "label"))
    images[1] = images[1] + 3
    correction = fit_norms(overflowing, images, labels)
    assert all(torch.isfinite(shift.share).all() and shift.share.any() for shift in correction.norms.values())


def test_further_bases_windows_and_borders() -> None:
    cases = site(6, thresholds=(0.4, 0.65))
    bases = {"bn": {"_target_": "mgipt_monai.BatchNormAdaptation"}}
    result = commission(
        segmenter(),
        cases,
        candidates=["none + offset", "bn", "bn + offset", "none + norms"],
        bases=bases,
        metric="surface_dice",
        boundary=1.0,
        inferer=SlidingWindowInferer((24, 24), overlap=0.5),
    )
    assert {row.name for row in result.table} == {"none", "none + offset", "bn", "bn + offset"}
    assert "not through windows" in result.skipped["norms"]
    assert "surface Dice" in result.statement


def test_softmax_head_and_volumes() -> None:
    torch.manual_seed(0)
    network = nn.Conv3d(1, 3, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([0.0, 20.0, 40.0]).view(3, 1, 1, 1, 1))
        network.bias.copy_(torch.tensor([0.0, -10.0, -26.0]))
    cases = []
    for _ in range(5):
        image = nn.functional.interpolate(torch.rand(1, 1, 4, 4, 4), size=(12, 12, 12), mode="trilinear")[0]
        cases.append({"image": image, "label": torch.cat([((image > 0.3) & (image <= 0.7)), image > 0.7]).float()})
    result = commission(network, cases, head="softmax", candidates=["none + offset"])
    assert result.certified
    assert result.setting.correction.offset[0] == 0  # the background's
    logits = result.method(cases[0]["image"][None])
    assert logits.shape == (1, 3, 12, 12, 12)


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_dice_at_offsets_is_that_of_the_masks(head: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 3, 16, 16, generator=generator)
    label = nn.functional.one_hot(torch.randint(0, 4, (1, 16, 16), generator=generator), 4).movedim(-1, 1).float()
    label = label[:, :3] if head == "sigmoid" else label[:, :2]
    offset = torch.tensor([0.0, 1.0, -0.5])
    curve = dice_at_offsets(logits, label, head, offset, 1)
    for place in (0, 40, 64, 90, 128):
        moved = torch.tensor([0.0, float(OFFSETS[place]), -0.5])
        masks = binarize(Correction(offset=moved).to_logits(logits), head)
        scores = 2 * (masks * label).sum((0, 2, 3)) / (masks + label).sum((0, 2, 3))
        assert curve[place] == pytest.approx(float(scores[1] if head == "sigmoid" else scores.mean()), abs=1e-6)


def test_offset_stays_at_nothing_where_none_is_better() -> None:
    sure = [torch.full((1, 2, 4, 4), 30.0)]
    assert fit_offset(sure, [torch.ones(1, 2, 4, 4)]).offset.tolist() == [0, 0]
    assert fit_offset(sure, [torch.zeros(1, 2, 4, 4)]).offset.tolist() == [0, 0]


def test_trained_correctors_raise_the_soft_dice_and_begin_at_nothing() -> None:
    dark = site(4, shift=-0.4)
    network, images = segmenter(), [case["image"][None] for case in dark]
    labels = [case["label"][None] for case in dark]
    for fit in (fit_norms, fit_prompts):
        correction = fit(network, images, labels)
        corrected = correction.to_network(network)
        after = dice(lambda image, c=correction, n=corrected: n(c.to_image(image)), dark)
        assert after > dice(network, dark) + 0.1
        nothing = fit(network, images, labels, steps=0)
        assert torch.equal(nothing.to_network(network)(nothing.to_image(images[0])), network(images[0]))
    assert fit_norms(segmenter(norm=False), images, labels) == Correction()


def test_temperature_calibrates_and_changes_no_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 64, 64, generator=generator)
    label = (torch.rand(1, 1, 64, 64, generator=generator) < torch.sigmoid(logits)).float()
    assert fit_temperature([3 * logits], [label]) == pytest.approx(3, rel=0.15)
    sure = Correction(temperature=3.0).to_logits(3 * logits)
    assert torch.equal(sure > 0, logits > 0)


def test_audit_proves_again_on_new_images_and_refuses_old_ones(found: Commissioning) -> None:
    base = {"_target_": "mgipt_monai.Source"}
    new = site(10, seed=1, thresholds=(0.4, 0.65))
    result = audit(segmenter(), new, found.setting, base)
    assert result.holds
    assert result.gain == pytest.approx(dice(found.method, new) - dice(Source(segmenter()), new), abs=1e-6)
    worse = audit(segmenter(), site(10, seed=1), found.setting, base)
    assert not worse.holds
    assert "It harms" in worse.statement
    with pytest.raises(ValueError, match="was commissioned on this image"):
        audit(
            segmenter(), site(5, thresholds=(0.4, 0.65)), found.setting, base, known=[c["sha256"] for c in found.cases]
        )
