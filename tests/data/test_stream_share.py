# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mgipt_monai.data import order_stream, share_stream


def items(*counts: int) -> list[dict]:
    """Return sites A, B, C... with these numbers of images."""
    return [
        {"site": site, "name": f"{site}/{i}", "image": f"{site}/{i}.png"}
        for site, count in zip("ABCDEFGH", counts, strict=False)
        for i in range(count)
    ]


def shares(stream: list[dict], processes: int, by: str) -> list[list[dict]]:
    return [share_stream(stream, rank, processes, by) for rank in range(processes)]


@pytest.mark.parametrize("by", ["site", "case"])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("order", ["sites", "shuffled", "gradual"])
def test_each_item_goes_to_one_process_and_keeps_its_place_in_the_order(by: str, processes: int, order: str) -> None:
    counts = np.random.default_rng(processes).integers(1, 9, 6)
    stream = order_stream(items(*counts), order, rounds=2)
    dealt = shares(stream, processes, by)
    assert sorted(item["name"] for share in dealt for item in share) == sorted(item["name"] for item in stream)
    for share in dealt:
        assert share
        assert share == [item for item in stream if item in share]


@pytest.mark.parametrize(("by", "key"), [("site", "site"), ("case", "image")])
def test_what_stays_together_is_in_one_share(by: str, key: str) -> None:
    dealt = shares(order_stream(items(5, 2, 4, 3), "shuffled", rounds=3), 3, by)
    assert max(Counter(value for share in dealt for value in {item[key] for item in share}).values()) == 1


def test_one_process_gets_the_stream_as_it_is() -> None:
    stream = order_stream(items(2, 3), "shuffled")
    assert share_stream(stream, 0, 1) == stream


def test_largest_site_goes_to_the_least_loaded_process() -> None:
    dealt = shares(items(2, 7, 3, 4, 2), 2, "site")
    # 7 | 4, 3 | then 2 to the smaller share: 7 and 7 are equal, so first the first, then the second
    assert [dict(Counter(item["site"] for item in share)) for share in dealt] == [
        {"A": 2, "B": 7},
        {"C": 3, "D": 4, "E": 2},
    ]


def test_no_load_is_above_an_even_one_by_more_than_the_last_site_given_to_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(1, 30, 8)
        dealt = shares(items(*counts), 3, "site")
        fewest = min(len(share) for share in dealt)
        for share in dealt:
            smallest = min(Counter(item["site"] for item in share).values())
            assert len(share) - smallest <= fewest


def test_cases_are_dealt_out_in_turn() -> None:
    stream = order_stream(items(4, 3), rounds=2)
    expected = [[item["name"] for item in stream[:7][rank::3]] for rank in range(3)]
    for share, names in zip(shares(stream, 3, "case"), expected, strict=True):
        assert [item["name"] for item in share] == [*names, *(f"round_2/{name}" for name in names)]


def test_image_of_several_files_is_one_case() -> None:
    stream = [{"site": "A", "name": str(i), "image": [f"{i}_t1.nii", f"{i}_t2.nii"]} for i in range(3)]
    assert [len(share) for share in shares(stream, 2, "case")] == [2, 1]


@pytest.mark.parametrize(
    ("rank", "processes", "by", "message"),
    [
        (0, 3, "site", "3 processes for 2 sites: use by='case', or start fewer processes"),
        (0, 6, "case", "6 processes for 5 cases: start fewer processes"),
        (0, 2, "patient", "share by one of site, case; got 'patient'"),
        (2, 2, "site", "rank must be from 0 to 1, got 2"),
        (-1, 2, "site", "got -1"),
    ],
)
def test_wrong_shares_are_refused(rank: int, processes: int, by: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        share_stream(items(2, 3), rank, processes, by)
