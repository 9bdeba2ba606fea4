# SPDX-License-Identifier: Apache-2.0
"""The charts of a benchmark folder, each omitted if its data are missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from mgipt_monai.utils.files import plain_text

from .folder import BenchmarkFolder
from .styles import WIDTH, Chart, MethodStyle, as_svg, legend_below, method_styles, plain_axes
from .tables import percent

__all__ = [
    "Block",
    "blocks_of",
    "charts_of",
    "gain_chart",
    "gain_figure",
    "prompt_chart",
    "round_chart",
    "running_mean",
    "size_chart",
    "stream_chart",
]

TICKS = (1, 3, 10, 30, 100)
MARKS = 12  # markers per line
LARGEST_WITH_NUMBERS = 7  # side of the largest prompt whose numbers fit into their cells


def charts_of(folder: BenchmarkFolder) -> Iterator[Chart]:
    """Yield the charts in page order; a method has the same style in all of them."""
    styles = method_styles(folder.methods, folder.baseline)
    yield stream_chart(folder, styles)
    if folder.results["stream"]["rounds"] > 1:
        yield round_chart(folder, styles)
    if folder.baseline is not None and folder.adapting:
        yield gain_chart(folder, styles)
    if any(figures["instance_sizes"] for figures in folder.results["methods"].values()):
        yield size_chart(folder, styles)
    for method, figures in folder.results["methods"].items():
        if figures["prompts"]:
            yield prompt_chart(method, figures["prompts"])


class Block(NamedTuple):
    """Images ``start`` to ``stop`` (exclusive) of a stream: the images of one site in one round."""

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
            # one line per visit, so that no line connects the levels of two sites
            places = np.arange(block.start, block.stop)
            step = max(1, math.ceil(len(names) / MARKS))
            axes.plot(
                places + 1,
                means[places],
                **style.line(),
                markevery=(min(offset * step // len(styles), len(places) - 1), step),
                label=plain_text(method) if i == 0 else None,
            )
    _shade(axes, blocks)
    plain_axes(axes)
    axes.set_xlim(0.5, len(names) + 0.5)
    axes.set_xlabel("image of the stream")
    axes.set_ylabel("running mean DSC, %")
    legend_below(figure, axes)
    rounds = ", dark vertical lines separate the rounds" if blocks[-1].round > 1 else ""
    return Chart(
        "Along the stream",
        f"Each point is the mean DSC of the image and up to {half} before and {half} after it in the same visit to a "
        f"site; every other visit is shaded{rounds}, and the lines break between visits and at failed images.",
        f"Running mean DSC along the stream, one line for each of {', '.join(styles)}.",
        as_svg(figure),
    )


def blocks_of(rows: Iterable[Mapping[str, Any]]) -> list[Block]:
    """Split the records of a stream into visits to sites, or into rounds (with site "") if the sites are mixed.

    Example:
        >>> blocks_of([{"site": site, "round": 1} for site in "AAB"])
        [Block(start=0, stop=2, site='A', round=1), Block(start=2, stop=3, site='B', round=1)]
        >>> blocks_of([{"site": site, "round": 1} for site in "ABA"])
        [Block(start=0, stop=3, site='', round=1)]
    """
    visits = [(row.get("round", 1), row["site"]) for row in rows]
    runs = [visit for visit, _ in groupby(visits)]
    if len(runs) > len(set(runs)):
        visits = [(round_, "") for round_, _ in visits]
    blocks, start = [], 0
    for (round_, site), run in groupby(visits):
        stop = start + len(list(run))
        blocks.append(Block(start, stop, site, round_))
        start = stop
    return blocks


def running_mean(values: Sequence[float] | np.ndarray, blocks: Iterable[Block], half: int) -> np.ndarray:
    """Return for each value the mean of it and up to ``half`` neighbours on either side in its block.

    NaNs stay NaN and are ignored in the other means.

    Example:
        >>> running_mean([1.0, 2.0, 6.0, 8.0], [Block(0, 3, "A", 1), Block(3, 4, "B", 1)], half=1)
        array([1.5, 3. , 4. , 8. ])
    """
    array = np.asarray(values, dtype=float)
    means = array.copy()
    for start, stop, *_ in blocks:
        for i in range(start, stop):
            if math.isfinite(array[i]):
                means[i] = np.nanmean(array[max(start, i - half) : min(stop, i + half + 1)])
    return means


def _shade(axes: Axes, blocks: Sequence[Block]) -> None:
    """Shade every other visit, label the sites above and the rounds below, and separate the rounds."""
    for block in blocks[::2]:
        axes.axvspan(block.start + 0.5, block.stop + 0.5, color="0.94", linewidth=0, zorder=0)
    middles = [(block.start + block.stop + 1) / 2 for block in blocks]
    above = axes.secondary_xaxis("top")
    above.set_xticks(middles, [plain_text(_short(block.site)) for block in blocks])
    # a letter is about 0.07 inches wide; labels that would overlap are rotated
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


def round_chart(folder: BenchmarkFolder, styles: Mapping[str, MethodStyle]) -> Chart:
    """Draw the mean DSC of each method in each round."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    for method, style in styles.items():
        means = folder.results["methods"][method]["metrics"]["dsc"]["rounds"]
        axes.plot(range(1, len(means) + 1), [100 * mean for mean in means], **style.line(), label=plain_text(method))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.set_ylabel("mean DSC, %")
    plain_axes(axes)
    legend_below(figure, axes)
    return Chart(
        "Round by round",
        "Mean DSC over the same images in each round of the stream: a falling line is a method that degrades, a rising "
        "one a method that keeps improving.",
        f"Mean DSC in each round, one line for each of {', '.join(styles)}.",
        as_svg(figure),
    )


def gain_chart(folder: BenchmarkFolder, styles: Mapping[str, MethodStyle]) -> Chart:
    """Return the chart of :func:`gain_figure`."""
    averaged = " (rounds averaged)" if folder.results["stream"]["rounds"] > 1 else ""
    return Chart(
        f"Image by image against {folder.baseline}",
        f"Each dot is an image{averaged}, better than {folder.baseline} to the right of the solid line and worse to "
        "the left; between the dashed lines the change is within one point, the diamond is the mean change, and the "
        "bar its 95 % interval.",
        f"Change in DSC of each image from {folder.baseline}, a strip of dots for each method.",
        as_svg(gain_figure(folder, styles)),
    )


def gain_figure(folder: BenchmarkFolder, styles: Mapping[str, MethodStyle]) -> Figure:
    """Draw the change in DSC of each image from the baseline, with a strip of dots per method."""
    figure = Figure(figsize=(WIDTH, 1.6 + 0.62 * len(folder.adapting)), layout="constrained")
    axes = figure.subplots()
    for edge in (-1, 1):
        axes.axvline(edge, color="0.35", linestyle=(0, (4, 3)), linewidth=0.9)
    axes.axvline(0, color="black", linewidth=1.2)
    shares = []
    dot: dict[str, Any] = {"linestyle": "", "markersize": 4, "alpha": 0.55, "markeredgewidth": 0}
    mean: dict[str, Any] = {"linestyle": "", "color": "white", "markeredgecolor": "black", "markersize": 8}
    bar: dict[str, Any] = {"color": "black", "linewidth": 2.5, "solid_capstyle": "butt"}
    for row, method in enumerate(folder.adapting):
        changes = 100 * np.array(folder.image_changes(method))
        # golden-ratio steps spread the dots evenly over the height of the strip, and reproducibly
        heights = row + 0.55 * ((np.arange(len(changes)) * 0.618034) % 1 - 0.5)
        style = styles[method]
        axes.plot(changes, heights, marker=style.marker, color=style.color, **dot)
        against = folder.results["methods"][method]["against_baseline"]["dsc"]
        bounds = [100 * bound for bound in against["interval"] or ()]
        axes.plot(bounds, [row] * len(bounds), **bar)
        axes.plot(100 * against["gain"], row, marker="d", **mean)
        shares.append(f"{percent(against['worse'], 0)} % worse by > 1\n{percent(against['better'], 0)} % better by > 1")
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(shares)), shares, fontsize=9)
    beside.tick_params(length=0)
    beside.spines[:].set_visible(False)
    axes.set_ylim(len(folder.adapting) - 0.45, -0.6)
    axes.set_yticks(range(len(folder.adapting)), [plain_text(method) for method in folder.adapting])
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("symlog", linthresh=1, linscale=0.8)
    axes.xaxis.set_major_locator(FixedLocator([*(-tick for tick in reversed(TICKS)), 0, *TICKS]))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0"))
    axes.set_xlabel(f"change in DSC from {plain_text(folder.baseline or '')}, points (logarithmic beyond ±1)")
    plain_axes(axes, grid="x")
    signs = {
        "an image": Line2D([], [], marker="o", color="0.4", **dot),
        "mean change": Line2D([], [], marker="d", **mean),
        "its 95 % interval": Line2D([], [], **bar),
    }
    figure.legend(list(signs.values()), list(signs), loc="outside lower center", ncols=len(signs), frameon=False)
    return figure


def size_chart(folder: BenchmarkFolder, styles: Mapping[str, MethodStyle]) -> Chart:
    """Draw how often each method selected each instance prompt size."""
    counts = {m: f["instance_sizes"] for m, f in folder.results["methods"].items() if f["instance_sizes"]}
    sizes = sorted({int(size) for of_method in counts.values() for size in of_method})
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(counts)
    for i, (method, of_method) in enumerate(counts.items()):
        heights = [100 * of_method.get(str(size), 0) / sum(of_method.values()) for size in sizes]
        places = np.arange(len(sizes)) + (i + 0.5) * width - 0.4
        style = styles[method]
        bars = axes.bar(
            places,
            heights,
            0.92 * width,
            label=plain_text(method),
            color=style.color,
            hatch=style.hatch,
            edgecolor="white",
        )
        axes.bar_label(bars, [of_method.get(str(size), 0) for size in sizes], fontsize=9)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("side of the instance prompt, frequencies per axis")
    axes.set_ylabel("images, %")
    plain_axes(axes)
    legend_below(figure, axes)
    return Chart(
        "Chosen prompt sizes",
        "Share of images for which each instance prompt size was kept, with the number of images above the bar: large "
        "sizes mean that a larger prompt kept making the predictions more consistent.",
        f"Bars of how often each prompt size was chosen, for {', '.join(counts)}.",
        as_svg(figure),
    )


def prompt_chart(method: str, prompts: Mapping[str, Sequence[Any]]) -> Chart:
    """Draw prompts as heat maps with a row per prompt, a column per channel and a shared colour bar.

    Args:
        method: name of the method.
        prompts: name to amplitude factors (C, h, w), or (C, d, h, w), of which the middle slice along d is shown (the
            one with the zero frequency). A factor of 1 leaves a frequency unchanged. All have the same channels.
    """
    arrays = [np.array(values, dtype=float) for values in prompts.values()]
    volumes = arrays[0].ndim == 4
    if volumes:
        arrays = [array[:, array.shape[1] // 2] for array in arrays]
    channels = len(arrays[0])
    norm = CenteredNorm(1, max(0.01, *(float(np.abs(array - 1).max()) for array in arrays)))
    figure = Figure(figsize=(1.2 + 2.2 * channels, 0.5 + 2.2 * len(arrays)), layout="constrained")
    grid = figure.subplots(len(arrays), channels, squeeze=False)
    for height, (row, name, array) in enumerate(zip(grid, prompts, arrays, strict=True)):
        for channel, (axes, values) in enumerate(zip(row, array, strict=True), start=1):
            shown = axes.imshow(values, cmap="RdBu_r", norm=norm)
            axes.axis("off")
            if height == 0:
                axes.set_title(f"channel {channel}", fontsize=10)
            if channel == 1:  # the name once per row, as titles of neighbours would overlap
                label = plain_text(name).replace(", ", "\n")
                axes.text(-0.06, 0.5, label, transform=axes.transAxes, rotation=90, ha="right", va="center")
            if max(values.shape) <= LARGEST_WITH_NUMBERS:
                for (y, x), value in np.ndenumerate(values):
                    color = "white" if abs(value - 1) > 0.6 * norm.halfrange else "black"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=color)
    figure.colorbar(shown, ax=grid, label="factor on the amplitude", shrink=min(1.0, 1.6 / len(arrays)))
    which = ", in the middle slice of each prompt," if volumes else ""
    return Chart(
        f"Prompts of {method} after the stream",
        f"Each cell is the factor on the amplitude of one frequency of a channel{which} with the zero frequency (mean "
        "brightness) in the centre: red amplifies it, blue attenuates it, white leaves it unchanged.",
        f"Heat maps of the prompts {', '.join(prompts)} of {method}.",
        as_svg(figure),
    )
