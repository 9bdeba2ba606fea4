# SPDX-License-Identifier: Apache-2.0
"""The order of the images of a stream, and their distribution over several processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np

from mgipt_monai.data.outputs import check_names

__all__ = ["ORDERS", "order_stream", "share_stream"]

ORDERS = ("sites", "shuffled", "alternating", "gradual")


def order_stream(
    items: Sequence[dict[str, Any]], order: str = "sites", rounds: int = 1, seed: int = 0, blend: float = 0.5
) -> list[dict[str, Any]]:
    """Order the images of a stream and repeat them, each image once per round.

    - ``sites``: as given; from :func:`mgipt_monai.find_stream` that is site after site.
    - ``shuffled``: all images in random order, different in each round.
    - ``alternating``: the first image of each site, then the second of each, and so on.
    - ``gradual``: each site blends into the next. The k-th site (k from 0, by first image) occupies positions k to
      k + 1 of the stream, with the i-th of its n images at k + (i + 0.5) / n. Each image is then shifted by a uniform
      random number in [-blend, blend), different in each round, and the images are sorted by position.

    Args:
        items: the images, with ``site`` and ``name``; they are not changed.
        order: one of ``sites``, ``shuffled``, ``alternating``, ``gradual``.
        rounds: number of times that the stream is repeated, at least 1.
        seed: non-negative integer; round r is drawn from (seed, r).
        blend: for ``gradual``, the largest shift of an image in units of a site's length, in (0, 1]. Around a border,
            the share of the next site rises from 0 at ``blend`` before it to 1 at ``blend`` after it, linearly for
            values up to 0.5. At 0.5 only the middle of a site is pure; above that, more than two sites mix.

    Returns:
        Copies of the items with ``round`` (from 1). From round 2 on, the name is ``round_2/<name>`` and so on, so that
        no output overwrites another.

    Raises:
        ValueError: if the order is unknown, ``rounds``, ``seed`` or ``blend`` is out of range, items that already have
            several rounds (the datalist of an ordered stream) would be ordered or repeated again, or two outputs would
            have the same name, such as ``eye`` in round 2 and ``round_2/eye``.

    Example:
        >>> items = [{"site": site, "name": f"{site}/{i}"} for site in "AB" for i in range(3)]
        >>> [item["name"] for item in order_stream(items, "gradual")]
        ['A/0', 'A/1', 'B/1', 'A/2', 'B/2', 'B/0']
        >>> order_stream(items, rounds=2)[-1]
        {'site': 'B', 'name': 'round_2/B/2', 'round': 2}
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}: choose one of {', '.join(ORDERS)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if not 0 < blend <= 1:
        raise ValueError(f"blend must be above 0 and at most 1 (the length of a site), got {blend}")
    if (order, rounds) != ("sites", 1) and any(item.get("round", 1) > 1 for item in items):
        raise ValueError("the images are in several rounds already: use order='sites' and rounds=1")
    sites = [item["site"] for item in items]
    stream = []
    for number in range(1, rounds + 1):
        positions = _positions(sites, order, blend, np.random.default_rng([seed, number]))
        stream += [_in_round(items[i], number) for i in np.argsort(positions, kind="stable")]
    check_names(stream)
    return stream


def _positions(sites: list[str], order: str, blend: float, generator: np.random.Generator) -> np.ndarray:
    """Return the position of each image in the stream, by which the images are sorted."""
    if order == "shuffled":
        return generator.permutation(len(sites))
    if order == "gradual":
        return _site_positions(sites) + generator.uniform(-blend, blend, len(sites))
    if order == "alternating":
        place = {site: count() for site in sites}
        return np.array([next(place[site]) for site in sites])
    return np.arange(len(sites))


def _site_positions(sites: list[str]) -> np.ndarray:
    """Return k + (i + 0.5) / n for the i-th of the n images of the k-th site."""
    counts = Counter(sites)
    seen: Counter[str] = Counter()
    number = {site: k for k, site in enumerate(counts)}
    positions = []
    for site in sites:
        positions.append(number[site] + (seen[site] + 0.5) / counts[site])
        seen[site] += 1
    return np.array(positions)


def _in_round(item: dict[str, Any], number: int) -> dict[str, Any]:
    if number == 1:
        return {**item, "round": item.get("round", 1)}
    return {**item, "name": f"round_{number}/{item['name']}", "round": number}


GROUP_KEYS = {"site": "site", "case": "image"}
"""Kind of group to the key of an item by which the group is formed."""


def share_stream(items: Sequence[dict[str, Any]], rank: int, processes: int, by: str = "site") -> list[dict[str, Any]]:
    """Distribute a stream over several processes and return the share of one, in stream order.

    Groups (see ``by``) are assigned in order of decreasing size, each to the process with the fewest items so far; ties
    go to the first. Groups of equal size are therefore assigned in turn.

    Args:
        items: items of :func:`mgipt_monai.find_stream` or :func:`order_stream`; they are not changed.
        rank: the process whose share is returned, from 0.
        processes: number of processes. Each image goes to exactly one.
        by: the groups that are not split: ``site``, or ``case``, an image in all its rounds.

    Returns:
        The items of the process, at least one.

    Raises:
        ValueError: if ``by`` is unknown, ``rank`` is out of range, or there are more processes than groups.

    Example:
        >>> items = [{"site": name[0], "image": name} for name in ("A0.png", "B0.png", "B1.png", "C0.png")]
        >>> [[item["image"] for item in share_stream(items, rank, 2)] for rank in (0, 1)]
        [['B0.png', 'B1.png'], ['A0.png', 'C0.png']]
        >>> [[item["image"] for item in share_stream(items, rank, 2, by="case")] for rank in (0, 1)]
        [['A0.png', 'B1.png'], ['B0.png', 'C0.png']]
    """
    if by not in GROUP_KEYS:
        raise ValueError(f"share by one of {', '.join(GROUP_KEYS)}; got {by!r}")
    if not 0 <= rank < processes:
        raise ValueError(f"rank must be from 0 to {processes - 1}, got {rank}")
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        # an image with several files is a list
        groups.setdefault(str(item[GROUP_KEYS[by]]), []).append(place)
    if len(groups) < processes:
        other = "use by='case', or " if by == "site" else ""
        raise ValueError(f"{processes} processes for {len(groups)} {by}s: {other}start fewer processes")
    shares: list[list[int]] = [[] for _ in range(processes)]
    for places in sorted(groups.values(), key=len, reverse=True):
        min(shares, key=len).extend(places)
    return [items[place] for place in sorted(shares[rank])]
