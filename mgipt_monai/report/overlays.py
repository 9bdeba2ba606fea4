# SPDX-License-Identifier: Apache-2.0
"""Contours of masks on their images, as files that a stream writes, with a page that goes through them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import quote

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from monai.utils import CommonKeys, convert_to_numpy
from nibabel import orientations
from PIL import Image
from torch import Tensor

try:
    from matplotlib import patheffects
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"pictures need {error.name}: pip install mgipt_monai[benchmark]") from error

from mgipt_monai.utils.outputs import OutputFolder, check_output_name

from .page import page_environment

__all__ = ["STYLES", "OverlayWriter", "contour_picture", "fullest_plane", "plane_pictures"]

DPI = 100
# Distinct in colour for all kinds of colour vision, in brightness and in dashes. The later ones have gaps, so that one
# that lies on another hides no more than half of it; the dark edge keeps them visible on bright images.
STYLES: dict[str, dict[str, Any]] = {
    "reference": {"colors": "#ffffff", "linewidths": 1.3, "linestyles": "solid"},
    "before": {"colors": "#e69f00", "linewidths": 1.1, "linestyles": [(0, (5, 2.5))]},
    "after": {"colors": "#56b4e9", "linewidths": 1.3, "linestyles": [(0, (1.2, 1.6))]},
}
EDGE = "#202020"
KEYS = {"reference": CommonKeys.LABEL, "before": "unadapted", "after": CommonKeys.PRED}
PICTURE = "picture"
"""Key of the image as it was read."""
PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}
"""Axis across each plane, and those along its width and height, of a volume whose axes go right, anterior, superior."""
ENDS = ("LR", "PA", "IS")
"""Letters of the two ends of these axes."""


class OverlayWriter:
    """Ignite handler that writes the contours of each image's masks on the image, and a page that shows them.

    A picture is ``<folder>/<name>.png``: the adapted mask's contour in blue, that without adaptation in orange, the
    reference's in white, as far as there are any. Of a volume the axial, coronal and sagittal planes with the largest
    masks are shown, in radiological orientation (the patient's right is on the left), with letters. At the end,
    ``<folder>/index.html`` goes through the pictures, those to look at first in front (see
    :meth:`mgipt_monai.stream.summary.StreamSummary.review`).

    Attach it to a :class:`mgipt_monai.StreamingAdaptationEvaluator` whose data have the image as it was read under
    ``picture``, and whose masks are in its geometry.

    Args:
        folder: folder to write to.
        side: longest side of a picture in pixels.
        columns_first: whether photographs were read columns first, as MONAI's ``PILReader`` does by default.

    Raises:
        FileExistsError: in a run, if a file stands there that no run wrote.
        ValueError: at construction, if ``side`` is below 16; in a run, if the data have no ``picture``.

    Example:
        >>> from ignite.engine import Engine
        >>> OverlayWriter("masks/overlays").attach(Engine(lambda engine, batch: None))
    """

    def __init__(self, folder: str | os.PathLike[str], side: int = 640, columns_first: bool = False) -> None:
        if side < 16:
            raise ValueError(f"side must be at least 16 pixels, got {side}")
        self.folder, self.side, self.columns_first = OutputFolder(folder, durable=False), side, columns_first

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _write(self, engine: Engine) -> None:
        (item,), (output,) = (cast("list[dict[str, Any]]", part) for part in (engine.state.batch, engine.state.output))
        if PICTURE not in item:
            raise ValueError(f"there is no {PICTURE!r} of the image: copy it in the preprocessing, before any change")
        image = item[PICTURE]
        pixels = convert_to_numpy(image)
        masks = {name: convert_to_numpy(output[key]) for name, key in KEYS.items() if output.get(key) is not None}
        if pixels.ndim == 4:
            png = plane_pictures(pixels, masks, convert_to_numpy(image.affine), self.side)
        else:
            if self.columns_first:
                pixels, masks = pixels.swapaxes(1, 2), {name: mask.swapaxes(1, 2) for name, mask in masks.items()}
            png = contour_picture(pixels, masks, self.side)
        name = f"{_shown(engine)(cast(Any, engine.state).record['name'])}.png"
        check_output_name(name)
        with self.folder.writing(name) as part:
            part.write_bytes(png)

    def _finish(self, engine: Engine) -> None:
        if idist.get_rank() > 0:
            return  # the first process has the images of all
        rows = cast(Any, engine.state).summary.review()
        entries = [_entry(row) for row in rows if self.folder.file(f"{row['name']}.png").is_file()]
        if not entries:
            return
        html = page_environment().get_template("overlays.html.j2").render(entries=entries, styles=STYLES)
        with self.folder.writing("index.html") as part:
            part.write_text(html, encoding="utf-8", errors="replace")


def _shown(engine: Engine) -> Callable[[str], str]:
    return getattr(getattr(engine, "adaptation_handler", None), "shown", str)


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page says of an image: its name and picture, and facts, what to value."""
    facts = {}
    if row.get("elsewhere"):
        facts["look"] = "unlike the images before"
    for key, words in (("quality", "quality"), ("agreement", "agreement with the mask without adaptation")):
        if values := row.get(key):
            facts[words] = ", ".join(f"{name} {100 * value:.0f} %" for name, value in values.items())
    for key, words in (("metrics", "adapted"), ("unadapted_metrics", "without adaptation")):
        for metric, values in (row.get(key) or {}).items():
            shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in values.items() if value is not None)
            if metric == "dsc":
                facts[f"DSC {words}"] = shown
    return {"name": row["name"], "picture": quote(f"{row['name']}.png"), "facts": facts}


def plane_pictures(image: np.ndarray, masks: Mapping[str, np.ndarray], affine: np.ndarray, side: int = 640) -> bytes:
    """Draw the axial, coronal and sagittal plane of a volume in which the masks are largest, side by side, as a PNG.

    Args:
        image: (C, *spatial), three spatial axes.
        masks: as for :func:`contour_picture`.
        affine: (4, 4), from voxels to millimetres, right, anterior and superior positive, as in NIfTI.
        side: longest side of each picture in pixels.
    """
    axes = orientations.io_orientation(affine)
    spacing = np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(axis=0))[np.argsort(axes[:, 0])]
    volume, turned = _turned(image, axes), {name: _turned(mask, axes) for name, mask in masks.items()}
    union = np.stack([(mask != 0).any(axis=0) for mask in turned.values()] or [np.zeros(volume.shape[1:], bool)])
    drawn = []
    for across, along, up in PLANES.values():
        index = fullest_plane(np.moveaxis(union, across + 1, -1))
        letters = ENDS[along][::-1], ENDS[up]
        # rows from the top down, and the patient's right and front on the left
        planes = [
            np.take(part, index, axis=across + 1).swapaxes(1, 2)[:, ::-1, ::-1] for part in (volume, *turned.values())
        ]
        plane, *outlines = planes
        png = contour_picture(
            plane, dict(zip(turned, outlines, strict=True)), side, (spacing[up], spacing[along]), letters
        )
        drawn.append(Image.open(io.BytesIO(png)).convert("RGB"))
    whole = Image.new("RGB", (sum(one.width for one in drawn) + 2 * 8, max(one.height for one in drawn)))
    left = 0
    for one in drawn:
        whole.paste(one, (left, (whole.height - one.height) // 2))
        left += one.width + 8
    buffer = io.BytesIO()
    whole.save(buffer, format="png")
    return buffer.getvalue()


def _turned(values: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Return a volume (C, *spatial) with axes that go right, anterior and superior."""
    return cast(np.ndarray, orientations.apply_orientation(np.moveaxis(values, 0, -1), axes).transpose(3, 0, 1, 2))


def contour_picture(
    image: Tensor | np.ndarray,
    masks: Mapping[str, Tensor | np.ndarray],
    side: int = 288,
    spacing: Sequence[float] = (1, 1),
    letters: Sequence[str] = (),
) -> bytes:
    """Draw an image with the contours of masks on it, as a PNG.

    Of a volume, the plane of the last axis is drawn in which the first masks are largest.

    Args:
        image: (C, H, W) or (C, H, W, D), of any range of values: its smallest becomes black, its largest white. With
            other than one or three channels, only the first is drawn.
        masks: ``reference``, ``before`` or ``after`` to masks (classes, \\*spatial), 0 outside.
        side: longest side of the picture in pixels. Smaller images are enlarged, contours are drawn at this size.
        spacing: height and width of a pixel, in the same unit.
        letters: what to write at the left and right end, and at the lower and upper end.

    Raises:
        ValueError: for a name that has no style, and for masks of another size than the image.

    Example:
        >>> import torch
        >>> disc = (torch.cartesian_prod(*[torch.linspace(-1, 1, 24)] * 2).norm(dim=1) < 0.5).view(1, 24, 24)
        >>> contour_picture(torch.rand(1, 24, 24), {"reference": disc})[1:4]
        b'PNG'
    """
    if unknown := set(masks) - set(STYLES):
        raise ValueError(
            f"there is no style for the masks {', '.join(map(repr, sorted(unknown)))}: {', '.join(STYLES)}"
        )
    pixels, outlines = convert_to_numpy(image), {name: convert_to_numpy(mask) for name, mask in masks.items()}
    for name, mask in outlines.items():
        if mask.shape[1:] != pixels.shape[1:]:
            raise ValueError(f"the {name} masks are {mask.shape[1:]}, the image is {pixels.shape[1:]}")
    if pixels.ndim == 4:
        index = fullest_plane(next(iter(outlines.values()), pixels[:0]))
        pixels, outlines = pixels[..., index], {name: mask[..., index] for name, mask in outlines.items()}
    picture = _resized(pixels, side, spacing)
    width, height = picture.size
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.imshow(np.asarray(picture.convert("RGB")), extent=(0, width, height, 0), interpolation="none", aspect="auto")
    for name, mask in outlines.items():
        style = {**STYLES[name], "linewidths": STYLES[name]["linewidths"] * min(1.6, max(1, side / 288))}
        style = {**STYLES[name], "linewidths": STYLES[name]["linewidths"] * min(1.6, max(1, side / 288))}
        edge = [patheffects.Stroke(linewidth=style["linewidths"] + 1, foreground=EDGE), patheffects.Normal()]
        for of_class in mask:
            # zeros around it close the contour of a mask that reaches the image's border
            padded = np.pad(of_class != 0, 1)
            if padded.any():
                rows, columns = (
                    (np.arange(-1, length + 1) + 0.5) * drawn / length
                    for length, drawn in zip(of_class.shape, (height, width), strict=True)
                )
                axes.contour(columns, rows, padded, levels=[0.5], **style).set_path_effects(edge)
    ends = [letter for pair in letters for letter in pair]
    sides = [(0.01, 0.5, "left", "center"), (0.99, 0.5, "right", "center")]
    sides += [(0.5, 0.01, "center", "bottom"), (0.5, 0.99, "center", "top")]
    for letter, (x, y, ha, va) in zip(ends, sides, strict=False):
        axes.text(x, y, letter, transform=axes.transAxes, color="white", ha=ha, va=va)
    axes.set(xlim=(0, width), ylim=(height, 0))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _resized(pixels: np.ndarray, side: int, spacing: Sequence[float]) -> Image.Image:
    """Return the picture of an image (C, H, W) with a longest side of ``side``."""
    pixels = (pixels if len(pixels) in (1, 3) else pixels[:1]).astype(np.float64)
    low, high = pixels.min(), pixels.max()
    grey = np.round(255 * (pixels - low) / (high - low or 1)).astype(np.uint8)
    picture = Image.fromarray(grey[0] if len(grey) == 1 else grey.transpose(1, 2, 0))
    sizes = [length * step for length, step in zip(picture.size, reversed(spacing), strict=True)]
    width, height = (max(1, round(side * size / max(sizes))) for size in sizes)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def fullest_plane(masks: np.ndarray) -> int:
    """Return the plane of the last axis with the most voxels in any mask (classes, H, W, D); the middle one of none."""
    count = (masks != 0).any(axis=0).sum(axis=(0, 1))
    return int(count.argmax()) if count.any() else len(count) // 2
