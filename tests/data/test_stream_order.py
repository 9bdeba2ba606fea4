# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import numpy as np
import pytest

from mgipt_monai.data import order_stream

ORDERS = ("sites", "shuffled", "alternating", "gradual")


def items(*counts: int) -> list[dict]:
    """Return sites A, B, C... with these numbers of images."""
    return [{"site": s, "name": f"{s}/{i}"} for s, n in zip("ABCDE", counts, strict=False) for i in range(n)]


def names(stream: list[dict]) -> list[str]:
    return [item["name"] for item in stream]


def test_sites_is_the_order_as_given() -> None:
    given = items(3, 2)[::-1]
    assert order_stream(given) == [{**item, "round": 1} for item in given]


@pytest.mark.parametrize("order", ORDERS)
def test_every_round_has_each_image_once_under_names_of_its_own(order: str) -> None:
    given = items(3, 1, 5)
    stream = order_stream(given, order, rounds=3)
    assert [item["round"] for item in stream] == [1] * 9 + [2] * 9 + [3] * 9
    assert len(set(names(stream))) == 27
    for number, prefix in ((1, ""), (2, "round_2/"), (3, "round_3/")):
        of_round = [item for item in stream if item["round"] == number]
        expected = [{**item, "name": prefix + item["name"], "round": number} for item in given]
        assert sorted(of_round, key=lambda item: item["name"]) == expected


@pytest.mark.parametrize("order", ORDERS)
def test_given_items_are_not_changed(order: str) -> None:
    given = items(2, 2)
    before = copy.deepcopy(given)
    order_stream(given, order, rounds=2)[0]["name"] = "other"
    assert given == before


@pytest.mark.parametrize("order", ["shuffled", "gradual"])
def test_seed_and_round_choose_the_mix(order: str) -> None:
    given = items(30, 30)
    stream = order_stream(given, order, rounds=2, seed=7)
    assert stream == order_stream(given, order, rounds=2, seed=7)
    assert names(stream[:60]) != names(order_stream(given, order, seed=8))
    first, second = stream[:60], stream[60:]
    assert [name.removeprefix("round_2/") for name in names(second)] != names(first)
    # a round does not depend on the number of rounds
    assert first == order_stream(given, order, seed=7)


def test_shuffled_mixes_the_sites_evenly() -> None:
    stream = order_stream(items(2000, 2000), "shuffled")
    shares = np.array([item["site"] == "B" for item in stream]).reshape(10, -1).mean(axis=1)
    np.testing.assert_allclose(shares, 0.5, atol=0.08)


def test_alternating_takes_sites_in_turn_until_each_is_at_its_end() -> None:
    stream = order_stream(items(3, 1, 2), "alternating", rounds=2)
    assert names(stream)[:6] == ["A/0", "B/0", "C/0", "A/1", "C/1", "A/2"]
    assert [name.removeprefix("round_2/") for name in names(stream)[6:]] == names(stream)[:6]


def test_gradual_with_hardly_any_blend_is_site_after_site() -> None:
    given = items(4, 7, 1)
    assert order_stream(given, "gradual", blend=1e-6) == order_stream(given)
    # also if the list alternates between sites: sites are ordered by their first image
    mixed = [given[i] for i in (4, 0, 5, 1)]
    assert names(order_stream(mixed, "gradual", blend=1e-6)) == ["B/0", "B/1", "A/0", "A/1"]


@pytest.mark.parametrize("blend", [0.1, 0.25, 0.5])
def test_share_of_the_next_site_rises_linearly_around_the_border(blend: float) -> None:
    reach = 2500
    count = int(reach / blend)
    stream = order_stream(items(count, count), "gradual", blend=blend)
    of_b = np.array([item["site"] == "B" for item in stream])
    shares = of_b[count - reach : count + reach].reshape(10, -1).mean(axis=1)
    np.testing.assert_allclose(shares, (np.arange(10) + 0.5) / 10, atol=0.05)
    assert (np.diff(shares) > 0).all()
    # before and after it the stream is pure, up to the rounding of random draws
    assert of_b[: int(count - 1.1 * reach)].sum() == 0
    assert of_b[int(count + 1.1 * reach) :].all()


def test_gradual_mixes_neighbours_alone_up_to_half_a_site() -> None:
    def last_of_a_and_first_of_c(blend: float) -> tuple[int, int]:
        sites = [item["site"] for item in order_stream(items(100, 100, 100), "gradual", blend=blend)]
        return max(i for i, site in enumerate(sites) if site == "A"), sites.index("C")

    last, first = last_of_a_and_first_of_c(0.5)
    assert last < first
    last, first = last_of_a_and_first_of_c(1.0)
    assert last > first


def test_image_stands_in_the_middle_of_its_stretch() -> None:
    # so that a site with one image, which spans a whole unit, can come after the first images of the next site
    firsts = [order_stream(items(1, 100), "gradual", seed=seed)[0]["site"] for seed in range(20)]
    assert set(firsts) == {"A", "B"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "random"}, "order is 'random': choose one of sites, shuffled, alternating, gradual"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"blend": 0}, r"blend must be above 0 and at most 1 .*, got 0"),
        ({"blend": 1.5}, "got 1.5"),
        ({"blend": float("nan")}, "got nan"),
    ],
)
def test_wrong_settings_fail_at_once(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order_stream([], **settings)


def test_stream_that_has_rounds_is_taken_as_it_is_and_not_ordered_again() -> None:
    stream = order_stream(items(2, 2), "shuffled", rounds=2)
    assert order_stream(stream) == stream
    for settings in ({"order": "shuffled"}, {"rounds": 2}):
        with pytest.raises(ValueError, match="in several rounds already"):
            order_stream(stream, **settings)
    assert len(order_stream(order_stream(items(2, 2)), "shuffled", rounds=2)) == 8
