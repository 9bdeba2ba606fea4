# SPDX-License-Identifier: Apache-2.0
"""The report's charts of a benchmark folder, each left out where its data are absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from mgipt_monai.report.tables import percent

from .chart_style import Chart, MethodStyle, as_svg, legend_below, method_styles, plain_axes
from .folder import BenchmarkFolder
from .prompt_maps import prompt_chart
from .stream_chart import WIDTH, stream_chart

__all__ = ["charts_of", "gain_chart", "round_chart", "size_chart"]

TICKS = (1, 3, 10, 30, 100)


def charts_of(folder: BenchmarkFolder) -> Iterator[Chart]:
    """Give the charts in the order of the page; a method looks the same in all of them."""
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


def round_chart(folder: BenchmarkFolder, styles: Mapping[str, MethodStyle]) -> Chart:
    """Draw each method's mean DSC in each round over the same images."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    for method, style in styles.items():
        means = folder.results["methods"][method]["metrics"]["dsc"]["rounds"]
        axes.plot(range(1, len(means) + 1), [100 * mean for mean in means], **style.line(), label=method)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.set_ylabel("mean DSC, %")
    plain_axes(axes)
    legend_below(figure, axes)
    return Chart(
        "Round by round",
        "Mean DSC over the same images each time the stream comes round: a falling line is a method that wears out, "
        "a rising one a method that goes on learning.",
        f"Mean DSC in each round, one line each for {', '.join(styles)}.",
        as_svg(figure),
    )


def gain_chart(folder: BenchmarkFolder, styles: Mapping[str, MethodStyle]) -> Chart:
    """Draw each image's change in DSC against the baseline, a strip of dots per method."""
    figure = Figure(figsize=(WIDTH, 1.3 + 0.62 * len(folder.adapting)), layout="constrained")
    axes = figure.subplots()
    for edge in (-1, 1):
        axes.axvline(edge, color="0.35", linestyle=(0, (4, 3)), linewidth=0.9)
    axes.axvline(0, color="black", linewidth=1.2)
    shares = []
    for row, method in enumerate(folder.adapting):
        changes = 100 * np.array(folder.image_changes(method))
        # steps of the golden ratio spread the dots evenly over the strip's height, the same way each time
        heights = row + 0.55 * ((np.arange(len(changes)) * 0.618034) % 1 - 0.5)
        style = styles[method]
        axes.plot(changes, heights, style.marker, color=style.color, markersize=4, alpha=0.55, markeredgewidth=0)
        against = folder.results["methods"][method]["against_baseline"]["dsc"]
        bounds = [100 * bound for bound in against["interval"] or ()]
        axes.plot(bounds, [row] * len(bounds), color="black", linewidth=2.5, solid_capstyle="butt")
        axes.plot(100 * against["gain"], row, "d", color="white", markeredgecolor="black", markersize=8)
        shares.append(f"{percent(against['worse'], 0)} % worse by > 1\n{percent(against['better'], 0)} % better by > 1")
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(shares)), shares, fontsize=9)
    beside.tick_params(length=0)
    beside.spines[:].set_visible(False)
    axes.set_ylim(len(folder.adapting) - 0.45, -0.6)
    axes.set_yticks(range(len(folder.adapting)), folder.adapting)
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("symlog", linthresh=1, linscale=0.8)
    axes.xaxis.set_major_locator(FixedLocator([*(-tick for tick in reversed(TICKS)), 0, *TICKS]))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0"))
    axes.set_xlabel(f"change in DSC against {folder.baseline}, points (logarithmic beyond ±1)")
    plain_axes(axes, grid="x")
    averaged = " (rounds averaged)" if folder.results["stream"]["rounds"] > 1 else ""
    return Chart(
        f"Image by image against {folder.baseline}",
        f"Each dot is an image{averaged}, right of the solid line better than {folder.baseline}, left of it "
        "worse; between the dashed lines it is within one point, and the diamond is the mean with its 95 % interval.",
        f"Change in DSC of each image against {folder.baseline}, a strip of dots for each method.",
        as_svg(figure),
    )


def size_chart(folder: BenchmarkFolder, styles: Mapping[str, MethodStyle]) -> Chart:
    """Draw how often each method chose each size of instance prompt."""
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
            places, heights, 0.92 * width, label=method, color=style.color, hatch=style.hatch, edgecolor="white"
        )
        axes.bar_label(bars, [of_method.get(str(size), 0) for size in sizes], fontsize=9)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlabel("side of the instance prompt, frequencies per axis")
    axes.set_ylabel("images, %")
    plain_axes(axes)
    legend_below(figure, axes)
    return Chart(
        "Chosen prompt sizes",
        "Share of the images for which each size of instance prompt was kept, with their number above the bar: large "
        "sizes mean that growing the prompt went on making the predictions more consistent.",
        f"Bars of how often each prompt size was chosen, for {', '.join(counts)}.",
        as_svg(figure),
    )
