# SPDX-License-Identifier: Apache-2.0
"""A figure of chosen images: the photograph, what the adapted network saw, and the contours of two methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Example", "draw_contours", "draw_examples"]

# two colours that stay apart for colour-blind readers and in grey print; lines differ as well
STYLES = {
    "reference": {"colors": "white", "linewidths": 2.2},
    "source": {"colors": "#e69f00", "linewidths": 1.5, "linestyles": "dashed"},
    "adapted": {"colors": "#0072b2", "linewidths": 1.5},
}


@dataclass(frozen=True)
class Example:
    """One image of a stream with what two methods made of it.

    Attributes:
        title: what the image is.
        image: network input (C, H, W) in [0, 1], three channels or one.
        adapted_image: the image under its instance prompt, same shape.
        reference: masks of 0 and 1 (K, H, W).
        source: the source network's masks, same shape.
        adapted: the adapted network's masks, same shape.
        source_dsc: mean Dice of ``source`` over the classes, in [0, 1].
        adapted_dsc: likewise of ``adapted``.
    """

    title: str
    image: np.ndarray
    adapted_image: np.ndarray
    reference: np.ndarray
    source: np.ndarray
    adapted: np.ndarray
    source_dsc: float
    adapted_dsc: float


def draw_examples(examples: Sequence[Example], path: str | os.PathLike, columns: int = 1) -> None:
    """Draw the examples, ``columns`` of them side by side, and save the figure (the ending sets its format).

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    rows = -(-len(examples) // columns)
    figure, axes = plt.subplots(
        rows, 3 * columns, figsize=(7.2 * columns, 2.6 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, example in enumerate(examples):
        _draw(axes[i // columns, 3 * (i % columns) : 3 * (i % columns) + 3], example)
    labels = {"reference": "reference", "source": "source network", "adapted": "adapted (MGIPT)"}
    legend = [
        Line2D([], [], color=style["colors"], ls=style.get("linestyles", "-"), label=labels[name])
        for name, style in STYLES.items()
    ]
    legend[0].set_path_effects(_dark_edge())
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axes: Sequence, example: Example) -> None:
    grey = {"cmap": "gray"} if example.image.shape[0] == 1 else {}
    for axis, image in zip(axes, (example.image, example.adapted_image, example.image), strict=True):
        axis.imshow(np.clip(image.transpose(1, 2, 0), 0, 1), **grey)
    draw_contours(axes[2], example.reference, example.source, example.adapted)
    axes[0].set_title(example.title, fontsize=9)
    axes[1].set_title("as the prompt shows it", fontsize=9)
    axes[2].set_title(f"DSC {100 * example.source_dsc:.1f} → {100 * example.adapted_dsc:.1f}", fontsize=9)


def draw_contours(axes: Any, reference: np.ndarray, source: np.ndarray, adapted: np.ndarray) -> None:
    """Draw the outlines of masks (K, H, W) of 0 and 1 on matplotlib axes that show their image."""
    for (name, style), masks in zip(STYLES.items(), (reference, source, adapted), strict=True):
        for mask in masks:
            if mask.any() and not mask.all():
                lines = axes.contour(mask, levels=[0.5], **style)
                if name == "reference":
                    lines.set_path_effects(_dark_edge())


def _dark_edge() -> list:
    from matplotlib import patheffects

    # a white line is lost on a white page, and on bright parts of an image
    return [patheffects.Stroke(linewidth=3.5, foreground="0.3"), patheffects.Normal()]
