# SPDX-License-Identifier: Apache-2.0
"""Heat maps of a method's prompts: what the stream taught it to do to the images' low frequencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from .chart_style import Chart, as_svg

__all__ = ["prompt_chart"]

WRITTEN = 7  # up to this side the numbers fit into their cells


def prompt_chart(method: str, prompts: Mapping[str, Sequence]) -> Chart:
    """Draw prompts as heat maps, a row per prompt and a column per channel, all with one colour bar.

    Args:
        method: whose prompts they are.
        prompts: name to amplitude factors (C, h, w), or (C, d, h, w) of which the middle slice of the first axis is
            shown, which has the zero frequency; 1 leaves a frequency as it is. All have the same channels.
    """
    arrays = [np.array(values, dtype=float) for values in prompts.values()]
    volumes = arrays[0].ndim == 4
    if volumes:
        arrays = [array[:, array.shape[1] // 2] for array in arrays]
    channels = len(arrays[0])
    norm = CenteredNorm(1, max(0.01, *(float(np.abs(array - 1).max()) for array in arrays)))
    figure = Figure(figsize=(1.2 + 2.2 * channels, 0.5 + 2.2 * len(arrays)), layout="constrained")
    grid = figure.subplots(len(arrays), channels, squeeze=False)
    for row, name, array in zip(grid, prompts, arrays, strict=True):
        for channel, (axes, values) in enumerate(zip(row, array, strict=True), start=1):
            shown = axes.imshow(values, cmap="RdBu_r", norm=norm)
            axes.axis("off")
            axes.set_title(f"{name}, channel {channel}", fontsize=9)
            if max(values.shape) <= WRITTEN:
                for (y, x), value in np.ndenumerate(values):
                    color = "white" if abs(value - 1) > 0.6 * norm.halfrange else "black"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=color)
    figure.colorbar(shown, ax=grid, label="factor on the amplitude", shrink=min(1.0, 1.6 / len(arrays)))
    which = ", of each prompt's middle slice" if volumes else ""
    return Chart(
        f"Prompts of {method} after the stream",
        f"Each cell is the factor on the amplitude of one frequency of a channel{which}, the zero frequency (mean "
        "brightness) in the middle: red strengthens it, blue weakens it, white leaves it as it is.",
        f"Heat maps of the prompts {', '.join(prompts)} of {method}.",
        as_svg(figure),
    )
