# SPDX-License-Identifier: Apache-2.0
"""The chart of DSC along the stream: how each method goes from image to image and from site to site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .chart_style import Chart, MethodStyle, as_svg, legend_below, plain_axes
from .folder import BenchmarkFolder

__all__ = ["Block", "blocks_of", "running_mean", "stream_chart"]

WIDTH = 8.0  # inches
MARKS = 12  # markers per line


class Block(NamedTuple):
    """Images ``start`` to ``stop`` (exclusive) of a stream: one round's visit to one site."""

    start: int
    stop: int
    site: str
    round: int


def stream_chart(folder: BenchmarkFolder, styles: Mapping[str, MethodStyle]) -> Chart:
    """Draw each method's running mean DSC over the stream."""
    names = [row["name"] for row in folder.records[folder.methods[0]]]
    blocks = blocks_of(folder.records[folder.methods[0]])
    half = max(1, min(10, max(block.stop - block.start for block in blocks) // 5))
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    for offset, (method, style) in enumerate(styles.items()):
        scores = [100 * folder.scores[method].get(name, math.nan) for name in names]
        means = running_mean(scores, blocks, half)
        for i, block in enumerate(blocks):
            # each visit is a line of its own, so that no line leads from one site's level to the next one's
            places = np.arange(block.start, block.stop)
            step = max(1, math.ceil(len(names) / MARKS))
            axes.plot(
                places + 1,
                means[places],
                **style.line(),
                markevery=(min(offset * step // len(styles), len(places) - 1), step),
                label=method if i == 0 else None,
            )
    _shade(axes, blocks)
    plain_axes(axes)
    axes.set_xlim(0.5, len(names) + 0.5)
    axes.set_xlabel("image of the stream")
    axes.set_ylabel("running mean DSC, %")
    legend_below(figure, axes)
    rounds = ", dark upright lines part the rounds" if blocks[-1].round > 1 else ""
    return Chart(
        "Along the stream",
        f"Each point is the mean DSC of the image and up to {half} before and after it of the same visit to a site; "
        f"every other visit is shaded{rounds}, and the lines break between visits and at images that failed.",
        f"Running mean DSC along the stream, one line each for {', '.join(styles)}.",
        as_svg(figure),
    )


def blocks_of(rows: Iterable[Mapping[str, Any]]) -> list[Block]:
    """Cut a stream's records into visits to sites; where the sites are mixed, into rounds, with "" as their site.

    Example:
        >>> blocks_of([{"site": site, "round": 1} for site in "AAB"])
        [Block(start=0, stop=2, site='A', round=1), Block(start=2, stop=3, site='B', round=1)]
        >>> blocks_of([{"site": site, "round": 1} for site in "ABA"])
        [Block(start=0, stop=3, site='', round=1)]
    """
    visits = [(row["round"], row["site"]) for row in rows]
    runs = [visit for visit, _ in groupby(visits)]
    if len(runs) > len(set(runs)):
        visits = [(round_, "") for round_, _ in visits]
    blocks, start = [], 0
    for (round_, site), run in groupby(visits):
        stop = start + len(list(run))
        blocks.append(Block(start, stop, site, round_))
        start = stop
    return blocks


def running_mean(values: Sequence[float], blocks: Iterable[Block], half: int) -> np.ndarray:
    """Return for each value the mean over it and ``half`` neighbours on either side within its block.

    NaNs stay what they are and are left out of the other means.

    Example:
        >>> running_mean([1.0, 2.0, 6.0, 8.0], [Block(0, 3, "A", 1), Block(3, 4, "B", 1)], half=1)
        array([1.5, 3. , 4. , 8. ])
    """
    values = np.asarray(values, dtype=float)
    means = values.copy()
    for start, stop, *_ in blocks:
        for i in range(start, stop):
            if math.isfinite(values[i]):
                means[i] = np.nanmean(values[max(start, i - half) : min(stop, i + half + 1)])
    return means


def _shade(axes: Axes, blocks: Sequence[Block]) -> None:
    """Shade every other visit, name the sites above and the rounds below, and part the rounds."""
    for block in blocks[::2]:
        axes.axvspan(block.start + 0.5, block.stop + 0.5, color="0.94", linewidth=0, zorder=0)
    middles = [(block.start + block.stop + 1) / 2 for block in blocks]
    above = axes.secondary_xaxis("top")
    above.set_xticks(middles, [_short(block.site) for block in blocks])
    # a letter is about 0.07 inches wide; names that would touch each other are turned
    room = 0.9 * WIDTH / blocks[-1].stop
    tight = any(0.07 * len(_short(block.site)) > room * (block.stop - block.start) for block in blocks)
    above.tick_params(length=0, rotation=90 if tight else 0, labelsize=9)
    above.spines[:].set_visible(False)
    rounds = [list(of_round) for _, of_round in groupby(blocks, key=lambda block: block.round)]
    if len(rounds) > 1:
        for of_round in rounds[1:]:
            axes.axvline(of_round[0].start + 0.5, color="0.25", linewidth=1.2)
        middles = [(of_round[0].start + of_round[-1].stop + 1) / 2 for of_round in rounds]
        axes.set_xticks(middles, [f"round {of_round[0].round}" for of_round in rounds], minor=True)
        axes.tick_params(axis="x", which="minor", length=0, pad=18)
        axes.xaxis.remove_overlapping_locs = False


def _short(site: str) -> str:
    return site if len(site) <= 20 else f"{site[:19]}…"
