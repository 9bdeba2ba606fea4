# SPDX-License-Identifier: Apache-2.0
"""Suggested images are a random sample of the site that is spread over its kinds of images."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer

from mgipt_monai import find_stream
from mgipt_monai.commissioning import suggest, write_suggestions
from mgipt_monai.commissioning.suggestion import describe, distances_between, spread_sample
from mgipt_monai.utils.machine import MachineFailureError
from tests.conftest import MixedNet, identical, snapshot, stream, tiny_network

GAINS = (0.3, 0.6, 1.0)


def site(per_kind: int = 4) -> list[dict]:
    """Variations of images of three kinds, by their brightness."""
    base, *noise = stream(1 + per_kind * len(GAINS))
    return [
        {"image": MetaTensor(gain * (0.95 * base + 0.05 * image)[0]), "name": f"{gain}/{i}"}
        for i, (image, gain) in enumerate(zip(noise, itertools.cycle(GAINS)))
    ]


@pytest.mark.parametrize("network", [tiny_network(), torch.nn.Conv2d(3, 2, 1)], ids=["norms", "no norms"])
def test_each_kind_of_image_is_suggested(network: torch.nn.Module) -> None:
    for seed in range(5):
        chosen = suggest(network, site(), k=3, seed=seed)
        assert {one.name.split("/")[0] for one in chosen} == set(map(str, GAINS))


def test_suggestions_say_which_images_they_are_and_leave_the_network_as_it_is() -> None:
    network, items = MixedNet().train(), site()
    before = snapshot(network)
    chosen = suggest(network, items, k=5)
    assert [one.index for one in chosen] == sorted({one.index for one in chosen})
    assert all(items[one.index]["name"] == one.name for one in chosen)
    assert sum(one.stands_for for one in chosen) == chosen[0].images == len(items)
    assert identical(before, snapshot(network))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_same_seed_gives_the_same_and_seeds_differ() -> None:
    network, items = tiny_network(), site()
    assert suggest(network, items, 3) == suggest(network, items, 3)
    assert len({tuple(suggest(network, items, 3, seed=seed)) for seed in range(10)}) > 3


def test_every_image_has_the_same_chance_and_neighbours_are_not_drawn_together() -> None:
    places = torch.rand(20, 1, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(places, places)
    drawn = np.array([spread_sample(distances, 5, range(20), seed) for seed in range(2000)])
    assert np.bincount(drawn.ravel()) / 2000 == pytest.approx(np.full(20, 0.25), abs=0.05)
    errors = places[drawn].mean(1).numpy() - places.mean().item()
    plain = [np.random.default_rng(seed).choice(20, 5, replace=False) for seed in range(2000)]
    assert errors.std() < 0.7 * (places[np.array(plain)].mean(1).numpy() - places.mean().item()).std()
    assert abs(errors.mean()) < 0.01


@pytest.mark.parametrize("k", [1, 4, 6, 11, 12])
def test_as_many_are_drawn_as_asked_for(k: int) -> None:
    distances = torch.cdist(points := torch.rand(12, 2), points)
    for seed in range(50):
        assert len(set(spread_sample(distances, k, range(12), seed))) == k


def test_a_group_gives_one_image_until_groups_run_out() -> None:
    items = [item | {"group": f"patient {i // 3}"} for i, item in enumerate(site())]  # four patients
    for k, seed in itertools.product((3, 4, 6), range(5)):
        groups = [items[one.index]["group"] for one in suggest(tiny_network(), items, k, seed=seed)]
        assert len(groups) == k
        assert len(set(groups)) == min(k, 4)
    assert len(suggest(tiny_network(), items, 50)) == 12


def test_duplicates_are_not_suggested_together() -> None:
    first, *others = [{"image": image[0]} for image in stream(7)]
    items = [first, *others, *[first] * 5]
    distances = distances_between(describe(tiny_network(), items))
    assert distances[0, -1] == 0
    for seed in range(20):
        # six of twelve, and one has to be among two of twelve
        assert sum(place in (0, *range(7, 12)) for place in spread_sample(distances, 2, range(12), seed)) == 1


def test_windows_of_an_inferer_and_a_softmax_head_are_understood() -> None:
    network = tiny_network(out_channels=3)
    whole = describe(network, site(1), "softmax")
    windows = describe(network, site(1), "softmax", inferer=SlidingWindowInferer(24, sw_batch_size=2))
    for one, other in zip(whole, windows, strict=True):
        assert [len(areas) for areas in one.prediction] == [2, 1]
        for a, b in zip([*one.layers, *one.prediction], [*other.layers, *other.prediction], strict=True):
            torch.testing.assert_close(a, b)


def test_images_that_cannot_be_used_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    good = site(1)
    flat = {"image": torch.zeros(3, 24, 24), "name": "flat"}
    with caplog.at_level(logging.WARNING):
        chosen = suggest(tiny_network(), [{"name": "gone", "failure": "it is gone"}, flat, *good], k=9)
    assert [one.index for one in chosen] == [2, 3, 4]
    assert [record.message.split(":")[0] for record in caplog.records] == ["gone is left out", "flat is left out"]
    with pytest.raises(ValueError, match="no image can be used"):
        suggest(tiny_network(), [flat])
    with pytest.raises(MachineFailureError, match="the disk is gone"):
        suggest(tiny_network(), [{"failure": "", "machine": "the disk is gone", "memory": False}])


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        suggest(tiny_network(), site(1), 0)
    with pytest.raises(ValueError, match="head must be"):
        suggest(tiny_network(), site(1), head="linear")


def test_file_is_a_datalist_in_which_masks_can_be_added(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    items = [item | {"image": str(tmp_path / f"{i}.png"), "site": "A"} for i, item in enumerate(site(1))]
    for item in items:
        Path(item["image"]).touch()
    suggestions = suggest(tiny_network(), site(1), 2)
    write_suggestions(suggestions, items, tmp_path / "to_label.json")
    assert len(capsys.readouterr().out.splitlines()) == 2
    read = find_stream(tmp_path / "to_label.json")
    assert [item["name"] for item in read] == [one.name for one in suggestions]
    assert [item["suggested"] for item in read] == [one.reason for one in suggestions]
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(FileExistsError, match="not written by a run"):
        write_suggestions(suggestions, items, tmp_path / "mine.json")
