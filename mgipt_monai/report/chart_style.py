# SPDX-License-Identifier: Apache-2.0
"""How the report's charts look: one colour, line and marker per method in all of them, readable without colour."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["Chart", "MethodStyle", "as_svg", "legend_below", "method_styles", "plain_axes"]

# the palette of Okabe and Ito without its yellow, which white paper swallows
BASELINE, MAIN = "#e69f00", "#0072b2"
OTHERS = ("#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
DASHES = ("-.", ":", (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = "^vDPX*<>"
HATCHES = ("\\\\\\", "xxx", "...", "+++", "ooo")


class Chart(NamedTuple):
    """A chart of the page: its heading, how to read it, what it shows for who cannot see it, and the image's source."""

    title: str
    caption: str
    alt: str
    source: str


@dataclass(frozen=True)
class MethodStyle:
    """How a method is drawn in every chart."""

    color: str
    dashes: Any
    marker: str
    hatch: str = ""
    width: float = 1.1

    def line(self) -> dict[str, Any]:
        """Return matplotlib's settings of a line."""
        return {
            "color": self.color,
            "linestyle": self.dashes,
            "marker": self.marker,
            "linewidth": self.width,
            "markersize": 4 + self.width / 2,
        }


def method_styles(methods: Sequence[str], baseline: str | None) -> dict[str, MethodStyle]:
    """Return each method's style: the baseline's and the last method's stand out.

    Example:
        >>> styles = method_styles(["source", "tent", "mgipt"], "source")
        >>> styles["source"].color, styles["tent"].color, styles["mgipt"].color
        ('#e69f00', '#009e73', '#0072b2')
    """
    *others, last = [method for method in methods if method != baseline] or [None]
    styles = {baseline: MethodStyle(BASELINE, "--", "s", "///", 2.0), last: MethodStyle(MAIN, "-", "o", "", 2.0)}
    for i, method in enumerate(others):
        # the dashes move on by one after each pass through the colours, so that no two methods share both
        dashes, hatch = (kinds[(i + i // len(OTHERS)) % len(kinds)] for kinds in (DASHES, HATCHES))
        styles[method] = MethodStyle(OTHERS[i % len(OTHERS)], dashes, MARKERS[i % len(MARKERS)], hatch)
    return {method: styles[method] for method in methods}


def plain_axes(axes: Axes, grid: str = "y") -> None:
    """Leave the axes' left and bottom line, and faint grid lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend below the axes, in as few rows as fit."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), int(80 / (max(map(len, labels)) + 7))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)


def as_svg(figure: Figure) -> str:
    """Return the figure as a data URI for an image; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    without_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "mgipt_monai"}):
        figure.savefig(buffer, format="svg", metadata=without_metadata)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
