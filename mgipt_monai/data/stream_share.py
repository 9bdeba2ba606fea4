# SPDX-License-Identifier: Apache-2.0
"""Which images of a stream each of several processes gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["share_stream"]

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
