# SPDX-License-Identifier: Apache-2.0
"""How the cost of an image grows with its side, with the number of aligned layers, and along a stream.

    python benchmarks/growth.py --chart cost_growth.png

MGIPT with its default settings, with all three prompt sizes for every image (52 F), on the small U-Net with random
weights. Times are the fastest of a few repeats, except along the stream, where they are means.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mgipt_monai import MGIPT
from mgipt_monai.networks import InstancePrompt
from mgipt_monai.report.styles import MAIN, plain_axes

sys.path.insert(0, str(Path(__file__).parent))
from soak import resident_memory
from speed import Size, loaded, seconds, synthetic, unet, weights

TURNS = 3
LAYERS_SIDE = 256
STREAM_SIDE = 64
PLAIN_CALLS = 5


class Growth(NamedTuple):
    """A table of one figure: what grows, its columns, and a row for each value."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[float, ...]]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rows = [f"| {' | '.join(f'{value:.4g}' for value in row)} |" for row in self.rows]
        return "\n".join([f"| {' | '.join(self.columns)} |", f"|{'--:|' * len(self.columns)}", *rows])


def small_unet(side: int) -> Size:
    """Return the U-Net and the size of its images."""
    return Size(lambda: unet(2, 3), 3, (side, side))


def adapting(size: Size, state: dict[str, Tensor], layers: str | None = None) -> MGIPT:
    """Return MGIPT that tries all prompt sizes for every image, so that all images have the same cost."""
    return MGIPT(loaded(size, state), InstancePrompt(early_stop=False), aligned_layers=layers)


def fastest(size: Size, state: dict[str, Tensor], layers: str | None = None) -> tuple[float, float]:
    """Return the seconds for an image, and for a plain forward pass."""
    image, method, network = synthetic(size, 0, gain=0.7), adapting(size, state, layers), loaded(size, state)
    times, plain = [], []
    for _ in range(TURNS):
        times.append(seconds(lambda: method(image), "cpu"))
        with torch.no_grad():
            plain += [seconds(lambda: network(image), "cpu") for _ in range(PLAIN_CALLS)]
    return min(times), min(plain)


def with_side(sides: Sequence[int]) -> Growth:
    """Measure images of several sizes."""
    rows = []
    for side in sides:
        time_, plain = fastest(size := small_unet(side), weights(size))
        rows.append((side, time_, plain, time_ / plain))
    return Growth("image side", ("side, pixels", "s/image", "plain forward, s", "plain forwards"), rows)


def with_layers(counts: Sequence[int], side: int) -> Growth:
    """Measure images of one size with the first ``count`` layers aligned, in forward order."""
    size = small_unet(side)
    state = weights(size)
    names = list(adapting(size, state).norms.layers)
    rows = []
    for count in counts:
        pattern = "|".join(f"^{re.escape(name)}$" for name in names[:count])
        time_, plain = fastest(size, state, pattern)
        rows.append((count, time_, time_ / plain))
    return Growth("aligned layers", ("layers", "s/image", "plain forwards"), rows)


def along_stream(images: int, looks: int = 10) -> Growth:
    """Measure a stream in parts of equal length."""
    size = small_unet(STREAM_SIDE)
    method = adapting(size, weights(size))
    return Growth(
        "position in the stream", ("images seen", "s/image", "resident MiB"), list(_parts(method, size, images, looks))
    )


def _parts(method: MGIPT, size: Size, images: int, looks: int) -> Iterator[tuple[float, float, float]]:
    part = max(images // looks, 1)
    for first in range(0, images, part):
        start = time.perf_counter()
        for seed in range(first, first + part):
            method(synthetic(size, seed, gain=0.7))
        yield first + part, (time.perf_counter() - start) / part, resident_memory()


def draw(growths: Sequence[Growth]) -> Figure:
    """Draw the seconds of each table."""
    figure = Figure(figsize=(9.0, 2.8), layout="constrained")
    for axes, growth in zip(figure.subplots(1, len(growths)), growths, strict=True):
        axes.plot([row[0] for row in growth.rows], [row[1] for row in growth.rows], color=MAIN, marker="o")
        axes.set_ylim(0, 1.1 * max(row[1] for row in growth.rows))
        axes.set_xlim(left=0)
        axes.set_xlabel(growth.columns[0])
        axes.set_ylabel("seconds per image")
        axes.set_title(growth.title, fontsize="medium")
        plain_axes(axes)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sides", default="64,128,192,256,384,512", help="sides of the images in pixels (default %(default)s)"
    )
    parser.add_argument(
        "--layers", default="1,2,4,8,12,17", help="numbers of aligned layers, at most 17 (default %(default)s)"
    )
    parser.add_argument("--images", type=int, default=1000, help="length of the stream, 64 x 64 (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads (default %(default)s)")
    parser.add_argument("--chart", help="file for the figure, such as cost_growth.png")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sides, layers = ([int(value) for value in text.split(",")] for text in (options.sides, options.layers))
    growths = []
    for measure in (
        lambda: with_side(sides),
        lambda: with_layers(layers, LAYERS_SIDE),
        lambda: along_stream(options.images),
    ):
        growths.append(measure())
        print(f"\n{growths[-1].title}\n\n{growths[-1].markdown()}", flush=True)
    if options.chart:
        draw(growths).savefig(options.chart, dpi=120)


if __name__ == "__main__":
    main()
