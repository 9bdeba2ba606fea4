# SPDX-License-Identifier: Apache-2.0
"""The order in which a stream's images come, and which of them each of several processes gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["ORDERS", "order_stream", "share_stream"]

ORDERS = ("sites", "shuffled", "gradual")


def order_stream(
    items: Sequence[dict[str, Any]], order: str = "sites", rounds: int = 1, seed: int = 0, blend: float = 0.5
) -> list[dict[str, Any]]:
    """Order a stream's images and repeat them, each image once in every round.

    - ``sites``: as given, which from :func:`mgipt_monai.find_stream` is site after site.
    - ``shuffled``: all images mixed, another mix in each round.
    - ``gradual``: each site blends into the next. The k-th site (k from 0, by first image) fills the places k to k + 1
      of the stream, its i-th of n images stands at k + (i + 0.5) / n; each image then moves by a uniform random number
      of [-blend, blend), drawn anew in each round, and the images are sorted by where they are.

    Args:
        items: the images, with ``site`` and ``name``; they are not changed.
        order: one of ``sites``, ``shuffled``, ``gradual``.
        rounds: how often the stream is run through, at least 1.
        seed: non-negative integer; the r-th round is drawn from (seed, r).
        blend: for ``gradual``, the farthest that an image moves, in lengths of a site, in (0, 1]. Around a border the
            share of the next site rises from none at ``blend`` before it to all at ``blend`` after it, linearly up to
            0.5; there only the middle of a site is pure, and beyond it more than two sites mix.

    Returns:
        Copies of the items with ``round`` (from 1); from round 2 on the name is ``round_2/<name>`` and so on, so that
        no output overwrites another.

    Raises:
        ValueError: for an unknown order, ``rounds``, ``seed`` or ``blend`` out of range, or items that are in several
            rounds already (a datalist of an ordered stream) and are to be ordered or repeated once more.

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
        raise ValueError("the images are in several rounds already: take them as they are (order='sites', rounds=1)")
    sites = [item["site"] for item in items]
    stream = []
    for number in range(1, rounds + 1):
        places = _places(sites, order, blend, np.random.default_rng([seed, number]))
        stream += [_in_round(items[i], number) for i in np.argsort(places, kind="stable")]
    return stream


def _places(sites: list[str], order: str, blend: float, generator: np.random.Generator) -> Sequence[float]:
    """Return where in the stream each image stands: what the images are sorted by."""
    if order == "shuffled":
        return generator.permutation(len(sites))
    if order == "gradual":
        return _site_places(sites) + generator.uniform(-blend, blend, len(sites))
    return range(len(sites))


def _site_places(sites: list[str]) -> np.ndarray:
    """Return k + (i + 0.5) / n for the i-th of the n images of the k-th site."""
    counts, seen = Counter(sites), Counter()
    number = {site: k for k, site in enumerate(counts)}
    places = []
    for site in sites:
        places.append(number[site] + (seen[site] + 0.5) / counts[site])
        seen[site] += 1
    return np.array(places)


def _in_round(item: dict[str, Any], number: int) -> dict[str, Any]:
    if number == 1:
        return {**item, "round": item.get("round", 1)}
    return {**item, "name": f"round_{number}/{item['name']}", "round": number}


TOGETHER = {"site": "site", "case": "image"}
"""By what to share, to the key of an item that images of one process have in common."""


def share_stream(items: Sequence[dict[str, Any]], rank: int, processes: int, by: str = "site") -> list[dict[str, Any]]:
    """Deal a stream out to several processes and return one process's share, in the stream's order.

    What stays together (see ``by``) is dealt out from the most items to the fewest, each to the process that has the
    fewest items so far; of equals the first goes first. So cases that come equally often are dealt out in turn.

    Args:
        items: the images, as :func:`mgipt_monai.find_stream` or :func:`order_stream` give them; not changed.
        rank: the process whose share is wanted, from 0.
        processes: how many there are. Each image goes to exactly one.
        by: what goes to one process as a whole: ``site``, or ``case``, an image in all its rounds.

    Returns:
        The items of the process, at least one.

    Raises:
        ValueError: for an unknown ``by``, a ``rank`` out of range, or more processes than there is to deal out.

    Example:
        >>> items = [{"site": name[0], "image": name} for name in ("A0.png", "B0.png", "B1.png", "C0.png")]
        >>> [[item["image"] for item in share_stream(items, rank, 2)] for rank in (0, 1)]
        [['B0.png', 'B1.png'], ['A0.png', 'C0.png']]
        >>> [[item["image"] for item in share_stream(items, rank, 2, by="case")] for rank in (0, 1)]
        [['A0.png', 'B1.png'], ['B0.png', 'C0.png']]
    """
    if by not in TOGETHER:
        raise ValueError(f"share by one of {', '.join(TOGETHER)}; got {by!r}")
    if not 0 <= rank < processes:
        raise ValueError(f"rank must be from 0 to {processes - 1}, got {rank}")
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        # an image of several files is a list of them
        groups.setdefault(str(item[TOGETHER[by]]), []).append(place)
    if len(groups) < processes:
        other = "take by='case', or " if by == "site" else ""
        raise ValueError(f"{processes} processes for {len(groups)} {by}s: {other}start fewer processes")
    shares: list[list[int]] = [[] for _ in range(processes)]
    for places in sorted(groups.values(), key=len, reverse=True):
        min(shares, key=len).extend(places)
    return [items[place] for place in sorted(shares[rank])]
