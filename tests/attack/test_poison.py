# SPDX-License-Identifier: Apache-2.0
"""Images that spoil what is learnt: after an attack, good images are predicted as if there had been none."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgipt_monai import MGIPT, AdaptationMethod, SiteCorrection, find_stream
from tests.conftest import load_benchmark, stream, tiny_network

poison = load_benchmark("poison")

FOLDER = Path(os.environ.get("MGIPT_TEST_DATA", "absent"))
SITES = FOLDER / "data" / "fundus_odoc"
WEIGHTS = FOLDER / "weights" / "unet_rimone_r3.pt"


def camera(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Images of one camera: about the same brightness and contrast."""
    images = stream(count, size=16, seed=seed)
    return [(0.5 + 0.15 * (i - i.mean((2, 3), True)) / i.std((2, 3), keepdim=True)).clamp(0, 1) for i in images]


GOOD = camera(25)
JUMPS = ("alternate", "dark", "noise")


def as_image(picture: np.ndarray) -> torch.Tensor:
    """A photograph as the bundle gives it to the network, (1, 3, H, W) in [0, 1]; without the scaling per image."""
    return torch.from_numpy(picture.astype("float32") / 255).movedim(-1, 0)[None]


def attack_of(kind: str, count: int) -> list[torch.Tensor]:
    images = []
    for number, image in enumerate(camera(count, seed=7)):
        picture = (255 * image[0].movedim(0, -1)).round().numpy()
        if kind == "noise":
            picture = np.random.default_rng(number).integers(0, 256, picture.shape).astype("uint8")
        else:
            picture = poison.attacking(kind, number, count, picture)
        if picture.min() < picture.max():
            images.append(as_image(picture))
    return images


def mgipt(**settings: Any) -> MGIPT:
    return MGIPT(tiny_network(), **{"steps": 1, "instance_sizes": (1,), "global_sizes": (3,), **settings})


def steady(**settings: Any) -> SiteCorrection:
    return SiteCorrection(tiny_network(), **settings)


def changes(make: Callable[..., AdaptationMethod], kind: str, count: int, **settings: Any) -> torch.Tensor:
    """How far an attack moves the logits of each good image after it, relative to their deviation."""
    method = make(**settings)
    for image in GOOD[:20]:
        method(image)
    undisturbed = make(**settings)
    undisturbed.load_adaptation_state(copy.deepcopy(method.adaptation_state()))
    for image in attack_of(kind, count):
        method(image)
    method.images_seen = undisturbed.images_seen  # it seeds the jitter
    pairs = [(method(image), undisturbed(image)) for image in GOOD[20:]]
    return torch.stack([(one - other).abs().mean() / other.std() for one, other in pairs])


@pytest.mark.parametrize("kind", JUMPS)
@pytest.mark.parametrize("make", [mgipt, steady])
def test_a_jump_away_and_back_changes_no_bit(make: Callable[..., AdaptationMethod], kind: str) -> None:
    assert changes(make, kind, 12).max() == 0
    assert changes(make, kind, 12, memory=None).max() > 0.01


@pytest.mark.parametrize("kind", ["creep", "creep_dark"])
@pytest.mark.parametrize("make", [mgipt, steady])
def test_what_creeps_does_less_harm(make: Callable[..., AdaptationMethod], kind: str) -> None:
    # at first it cannot be told from the site, and what was learnt from it stays
    assert changes(make, kind, 40).mean() < 0.9 * changes(make, kind, 40, memory=None).mean()


def test_the_benchmark_measures_good_images_after_an_attack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(poison, "ATTACKS", {"alternate": 3, "organ": 1})
    options = ["--after", "1", "--limit", "6", "--names", "cold_noisy", "--presets", "steady"]
    poison.main([*options, "--no_memory", "--attacks", "alternate,organ"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| steady")]
    assert [row[2].strip() for row in rows] == ["alternate", "organ"]
    for row in rows:
        assert 0 < float(row[3]) <= 100
        assert float(row[4]) == float(row[5]) == float(row[6])  # of a single image
    # in two random orders, each value has its interval
    poison.main([*options, "--orders", "2", "--attacks", "alternate"])
    (row,) = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| steady")]
    assert re.fullmatch(r"\S+ \[\S+, \S+\]", row[4].strip())
    # without an attack, with and without the memory: three images are one site, so that nothing changes
    poison.main([*options[2:], "--clean", "3"])
    (row,) = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| steady")]
    assert float(row[4]) == 0
    with pytest.raises(SystemExit):
        poison.main(["--after", "1", "--attacks", "other"])


def test_the_benchmark_may_leave_out_what_nothing_is_learnt_from() -> None:
    whole, learning = mgipt(), mgipt()
    poison.tune_once(whole)
    for image in GOOD[:3]:
        logits = whole(image)
        whole.images_seen -= 1
        whole.load_adaptation_state(learning.adaptation_state())
        torch.testing.assert_close(whole(image), logits)  # from the prompt that was tuned before
        with poison.only_learning(learning):
            learning(image)
        for name, teacher in enumerate(whole.adaptation_state()["teachers"]):
            torch.testing.assert_close(learning.adaptation_state()["teachers"][name], teacher)


@pytest.mark.slow
@pytest.mark.skipif(not (SITES.is_dir() and WEIGHTS.is_file()), reason="MGIPT_TEST_DATA names no real images")
@pytest.mark.parametrize(
    ("preset", "kinds"), [("steady", ("creep", "creep_dark", "alternate", "dark")), ("default", ("creep", "alternate"))]
)
def test_real_images_are_as_good_after_an_attack(preset: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    site = find_stream(SITES, sites=["rimone_r2"], labelled=True)
    configs = [*poison.CONFIGS, poison.ROOT / "configs" / "fundus_odoc.yaml", *poison.PRESETS[preset]]
    found = poison.after(site[::3][:40], site[1::3], kinds, tmp_path, [], configs, ckpt_path=str(WEIGHTS))
    for _, _, change in found:
        assert change.mean() > -0.2
        assert change[:5].mean() > -0.5
