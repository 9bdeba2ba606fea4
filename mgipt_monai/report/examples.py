# SPDX-License-Identifier: Apache-2.0
"""Example images of a stream with the contours of two methods: a figure, and the images that the report shows."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mgipt_monai.utils.files import plain_text
from mgipt_monai.utils.outputs import output_file

from .folder import BenchmarkFolder
from .pictures import ADAPTED, INPUT, MASK, picture_path, read_masks

__all__ = ["ChosenImage", "Example", "chosen_images", "draw_contours", "draw_examples"]

METHODS = ("before", "after")
LONGEST_SIDE = 512  # pixels of the drawn picture, about twice its size on the page
DPI = 160
# two colours that colour-blind readers and grey prints can tell apart; the line styles differ as well
STYLES: dict[str, dict[str, Any]] = {
    "reference": {"colors": "white", "linewidths": 2.2},
    "source": {"colors": "#e69f00", "linewidths": 1.5, "linestyles": "dashed"},
    "adapted": {"colors": "#0072b2", "linewidths": 1.5},
}


@dataclass(frozen=True)
class Example:
    """One image of a stream with the results of two methods.

    Attributes:
        title: what the image is.
        image: network input (C, H, W) in [0, 1], three channels or one.
        adapted_image: the image with its instance prompt applied, same shape.
        reference: masks of 0 and 1 (K, H, W).
        source: the source network's masks, same shape.
        adapted: the adapted network's masks, same shape.
        source_dsc: mean Dice of ``source`` over the classes, in [0, 1].
        adapted_dsc: the same for ``adapted``.
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
    """Draw the examples in ``columns`` columns and save the figure (the file extension sets its format).

    Raises:
        FileExistsError: if a file stands there that no run wrote.
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
        _draw_example(axes[i // columns, 3 * (i % columns) : 3 * (i % columns) + 3], example)
    labels = {"reference": "reference", "source": "source network", "adapted": "adapted (MGIPT)"}
    legend = [
        Line2D([], [], color=style["colors"], ls=style.get("linestyles", "-"), label=labels[name])
        for name, style in STYLES.items()
    ]
    legend[0].set_path_effects(_dark_edge())
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
    folder, name = output_file(path)
    with folder.writing(name) as part:
        figure.savefig(part, dpi=110)
    plt.close(figure)


def _draw_example(axes: Sequence[Any] | np.ndarray, example: Example) -> None:
    grey = {"cmap": "gray"} if example.image.shape[0] == 1 else {}
    for axis, image in zip(axes, (example.image, example.adapted_image, example.image), strict=True):
        axis.imshow(np.clip(image.transpose(1, 2, 0), 0, 1), **grey)
    draw_contours(axes[2], example.reference, example.source, example.adapted)
    axes[0].set_title(plain_text(example.title), fontsize=9)
    axes[1].set_title("with the instance prompt", fontsize=9)
    axes[2].set_title(f"DSC {100 * example.source_dsc:.1f} → {100 * example.adapted_dsc:.1f}", fontsize=9)


def draw_contours(axes: Any, reference: np.ndarray, source: np.ndarray, adapted: np.ndarray) -> None:
    """Draw the contours of masks (K, H, W) of 0 and 1 on matplotlib axes that show their image."""
    for (name, style), masks in zip(STYLES.items(), (reference, source, adapted), strict=True):
        for mask in masks:
            if mask.any() and not mask.all():
                lines = axes.contour(mask, levels=[0.5], **style)
                if name == "reference":
                    lines.set_path_effects(_dark_edge())


def _dark_edge() -> list[Any]:
    from matplotlib import patheffects

    # a white line does not show on a white page or on bright parts of an image
    return [patheffects.Stroke(linewidth=3.5, foreground="0.3"), patheffects.Normal()]


class ChosenImage(NamedTuple):
    """One image with the results of the baseline and of a method; the pictures are data URIs.

    Attributes:
        what: why it was chosen.
        name: the image's name in the stream.
        before: mean DSC of the baseline.
        after: mean DSC of the method.
        shown: the network's input.
        adapted: the input as changed by the prompt; None if the method does not change it.
        contours: the input with the contours of reference, baseline and method.
    """

    what: str
    name: str
    before: float
    after: float
    shown: str
    adapted: str | None
    contours: str


def chosen_images(folder: BenchmarkFolder, method: str) -> list[ChosenImage]:
    """Return the images with the best, median and worst change in DSC from the baseline; none without pictures.

    Raises:
        ValueError: if the benchmark has no baseline.
    """
    changes = folder.changes(method)
    names = [name for name in changes if _files(folder, method, name).keys() >= {"input", "reference", *METHODS}]
    names.sort(key=lambda name: changes[name])
    if not names:
        return []
    # keyed by name, so that no image is shown twice if there are only one or two
    chosen = {names[0]: "worst change", names[len(names) // 2]: "median change", names[-1]: "best change"}
    return [_chosen(folder, method, name, what) for name, what in reversed(chosen.items())]


def _files(folder: BenchmarkFolder, method: str, name: str) -> dict[str, Path]:
    reference = folder.path / "reference" / "pictures"
    of_method = folder.path / method / "pictures"
    files = {
        "input": picture_path(reference, name, INPUT),
        "reference": picture_path(reference, name, MASK),
        "before": picture_path(folder.path / folder.required_baseline / "pictures", name, MASK),
        "after": picture_path(of_method, name, MASK),
        "adapted": picture_path(of_method, name, ADAPTED),
    }
    return {key: path for key, path in files.items() if path.is_file()}


def _chosen(folder: BenchmarkFolder, method: str, name: str, what: str) -> ChosenImage:
    files = _files(folder, method, name)
    classes = len(folder.results["classes"])
    masks = [read_masks(files[key], classes) for key in ("reference", *METHODS)]
    return ChosenImage(
        what,
        name,
        folder.scores[folder.required_baseline][name],
        folder.scores[method][name],
        _jpeg(files["input"].read_bytes()),
        _jpeg(files["adapted"].read_bytes()) if "adapted" in files else None,
        _draw_outlines(files["input"], *masks),
    )


def _draw_outlines(path: Path, reference: np.ndarray, before: np.ndarray, after: np.ndarray) -> str:
    from matplotlib.figure import Figure

    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    height, width = (LONGEST_SIDE * length / max(pixels.shape[:2]) for length in pixels.shape[:2])
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, aspect="auto")
    draw_contours(axes, reference, before, after)
    buffer = io.BytesIO()
    # chroma subsampling would blur the thin coloured lines
    figure.savefig(buffer, format="jpeg", pil_kwargs={"quality": 88, "subsampling": 0})
    return _jpeg(buffer.getvalue())


def _jpeg(content: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
