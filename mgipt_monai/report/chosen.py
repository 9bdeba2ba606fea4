# SPDX-License-Identifier: Apache-2.0
"""The images that the report shows of a method: where it gained most, where least, and the one in the middle."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .examples import draw_contours
from .folder import BenchmarkFolder
from .pictures import ADAPTED, INPUT, MASK, picture_path, read_masks

__all__ = ["ChosenImage", "chosen_images"]

METHODS = ("before", "after")
LONGEST = 512  # pixels of the drawn picture, about twice what the page shows
DPI = 160


class ChosenImage(NamedTuple):
    """One image with what two methods made of it; the pictures are data URIs.

    Attributes:
        what: why it was chosen.
        name: the image's name in the stream.
        before: the baseline's mean DSC.
        after: the method's.
        shown: the network's input.
        adapted: the input as the prompt changed it, None if the method leaves it as it is.
        contours: the input with the outlines of reference, baseline and method.
    """

    what: str
    name: str
    before: float
    after: float
    shown: str
    adapted: str | None
    contours: str


def chosen_images(folder: BenchmarkFolder, method: str) -> list[ChosenImage]:
    """Return the images of the best, median and worst change in DSC against the baseline; none without pictures."""
    changes = folder.changes(method)
    names = [name for name in changes if _files(folder, method, name).keys() >= {"input", "reference", *METHODS}]
    names.sort(key=lambda name: changes[name])
    if not names:
        return []
    # keyed by name, since of one or two images none is to be shown twice
    chosen = {names[0]: "worst change", names[len(names) // 2]: "median change", names[-1]: "best change"}
    return [_chosen(folder, method, name, what) for name, what in reversed(chosen.items())]


def _files(folder: BenchmarkFolder, method: str, name: str) -> dict[str, Path]:
    reference = folder.path / "reference" / "pictures"
    of_method = folder.path / method / "pictures"
    files = {
        "input": picture_path(reference, name, INPUT),
        "reference": picture_path(reference, name, MASK),
        "before": picture_path(folder.path / folder.baseline / "pictures", name, MASK),
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
        folder.scores[folder.baseline][name],
        folder.scores[method][name],
        _jpeg(files["input"].read_bytes()),
        _jpeg(files["adapted"].read_bytes()) if "adapted" in files else None,
        _draw(files["input"], *masks),
    )


def _draw(path: Path, reference: np.ndarray, before: np.ndarray, after: np.ndarray) -> str:
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    height, width = (LONGEST * length / max(pixels.shape[:2]) for length in pixels.shape[:2])
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, aspect="auto")
    draw_contours(axes, reference, before, after)
    buffer = io.BytesIO()
    # without chroma subsampling, which would smear the thin coloured lines
    figure.savefig(buffer, format="jpeg", pil_kwargs={"quality": 88, "subsampling": 0})
    return _jpeg(buffer.getvalue())


def _jpeg(content: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
