# SPDX-License-Identifier: Apache-2.0
"""How charts look: sizes, the style of each method, axes, legends, and the image that a page shows."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "BASELINE",
    "MAIN",
    "WIDTH",
    "Chart",
    "MethodStyle",
    "as_svg",
    "legend_below",
    "method_styles",
    "plain_axes",
]

WIDTH = 12.0  # inches: as wide as the pages, so that letters keep their size

# the Okabe-Ito palette without yellow, which is hard to see on white, and dark hues of Paul Tol's for more methods
BASELINE, MAIN = "#e69f00", "#0072b2"
OTHERS = ("#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#882255", "#999933", "#7f7f7f", "#5d3a9b")
DASHES: tuple[Any, ...] = ("-.", ":", (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = "^vDPX*<>ph8"
HATCHES = ("\\\\\\", "xxx", "...", "+++", "ooo")


class Chart(NamedTuple):
    """A chart of the page: its heading, how to read it, its alternative text, and the source of the image."""

    title: str
    caption: str
    alt: str
    source: str


@dataclass(frozen=True)
class MethodStyle:
    """How a method is drawn in all charts."""

    color: str
    dashes: Any
    marker: str
    hatch: str = ""
    width: float = 1.1

    def line(self) -> dict[str, Any]:
        """Return the keyword arguments of a matplotlib line."""
        return {
            "color": self.color,
            "linestyle": self.dashes,
            "marker": self.marker,
            "linewidth": self.width,
            "markersize": 4 + self.width / 2,
        }


def method_styles(methods: Sequence[str], baseline: str | None) -> dict[str, MethodStyle]:
    """Return the style of each method; the baseline and the last method stand out.

    Colours and markers are each used once, as long as there are enough; no two methods share both.

    Example:
        >>> styles = method_styles(["source", "tent", "mgipt"], "source")
        >>> styles["source"].color, styles["tent"].color, styles["mgipt"].color
        ('#e69f00', '#009e73', '#0072b2')
    """
    adapting = [method for method in methods if method != baseline]
    styles = {method: MethodStyle(MAIN, "-", "o", "", 2.0) for method in adapting[-1:]}
    if baseline is not None:
        styles[baseline] = MethodStyle(BASELINE, "--", "s", "///", 2.0)
    for i, method in enumerate(adapting[:-1]):
        # as the numbers of colours, dashes and markers have no common factor, no two methods share two of them
        dashes, hatch = (kinds[i % len(kinds)] for kinds in (DASHES, HATCHES))
        styles[method] = MethodStyle(OTHERS[i % len(OTHERS)], dashes, MARKERS[i % len(MARKERS)], hatch)
    return {method: styles[method] for method in methods}


def plain_axes(axes: Axes, grid: Literal["both", "x", "y"] = "y") -> None:
    """Keep only the left and bottom spines, with faint grid lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend below the axes, in as few rows as fit."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), int(10 * WIDTH / (max(map(len, labels)) + 7))))
    columns = math.ceil(len(labels) / math.ceil(len(labels) / columns))  # rows of one length
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)


def as_svg(figure: Figure) -> str:
    """Return the figure as a data URI for an image; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    without_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "mgipt_monai"}):
        figure.savefig(buffer, format="svg", metadata=without_metadata)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
