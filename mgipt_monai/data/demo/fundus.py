# SPDX-License-Identifier: Apache-2.0
"""Synthetic fundus images: disc, cup, retina, and branching, tapering vessels drawn as an opacity map."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["draw_vessels", "fundus_scene", "grow_vessels"]

Vessel = tuple[np.ndarray, np.ndarray]
STEP = 0.0125  # length of a vessel segment as a fraction of the image side, short enough to look curved at 512 pixels
MIN_SIZE = 32


def grow_vessels(
    rng: np.random.Generator,
    hub: np.ndarray,
    cup_centre: np.ndarray,
    cup_frame: np.ndarray,
    side: float,
    wide: float,
) -> list[Vessel]:
    """Grow one kind of vessel (arteries or veins): trunks leave the disc upward and downward and fork.

    All positions are fractions of the image side, with the origin at the image centre and y pointing down.

    Args:
        rng: random number generator.
        hub: (2,) position inside the cup where the vessels emerge.
        cup_centre: (2,) centre of the cup.
        cup_frame: (2, 2) matrix that maps the unit circle to the edge of the cup.
        side: +1 if the macula is to the right of the disc, -1 if to the left.
        wide: factor on all widths; 1 gives the veins of a typical eye.

    Returns:
        Pairs of points (n, 2) and widths (n,), both as fractions of the side, thinnest vessels first.

    Example:
        >>> grown = grow_vessels(np.random.default_rng(0), np.zeros(2), np.zeros(2), 0.1 * np.eye(2), 1.0, 1.0)
        >>> grown[0][0].shape[1], len(grown) > 6
        (2, True)
    """
    paths: list[Vessel] = []
    for half in (-1, 1):
        for toward, share in ((side, 1.0), (-side, rng.uniform(0.6, 0.9)), (rng.choice([-1, 1]), 0.4)):
            # from the hub to the edge of the cup, then a bend, then out over the disc along an arcade
            out = half * (np.pi / 2 - toward * rng.uniform(-0.25, 0.55))
            rim = cup_centre + cup_frame @ np.array([np.cos(out), np.sin(out)])
            bend = -half * toward * rng.uniform(0.1, 0.7) * (1 if rng.random() < 0.7 else -0.6)
            inner = hub + (rim - hub) * np.linspace(0, 1, 6)[:, None]
            outer = _wander(rng, rim, out + bend, -half * toward * rng.uniform(0.2, 1.8), 0.75)
            points = np.concatenate([inner[:-1], outer])
            width = wide * share * rng.uniform(0.021, 0.030)
            paths.append((points, width * np.linspace(1.0, 0.55, len(points))))
            for at in rng.choice(np.arange(12, len(points) - 8), 3, replace=False):
                heading = np.arctan2(*(points[at + 1] - points[at])[::-1])
                fork = rng.choice([-1, 1]) * rng.uniform(0.4, 0.9)
                twig = _wander(rng, points[at], heading + fork, -1.5 * fork, rng.uniform(0.2, 0.5))
                paths.append((twig, width * rng.uniform(0.3, 0.6) * np.linspace(1.0, 0.4, len(twig))))
    return sorted(paths, key=lambda path: path[1][0])


def draw_vessels(vessels: list[Vessel], size: int) -> np.ndarray:
    """Draw vessels as an opacity map.

    Args:
        vessels: pairs of points and widths from `grow_vessels`.
        size: side of the square map in pixels.

    Returns:
        float64 of shape (size, size) in [0, 1]; thin vessels are fainter, as they hold less blood.
    """
    finer = max(2, -(-512 // size))  # drawn large and downsampled, as PIL rounds to whole pixels
    canvas = Image.new("L", (size * finer, size * finer))
    pen = ImageDraw.Draw(canvas)
    for points, widths in vessels:
        places = (points + 0.5) * size * finer
        outside = np.abs(points).max(axis=1) > 0.55
        for (x0, y0), (x1, y1), width, unseen in zip(places, places[1:], widths, outside, strict=False):
            if unseen:
                continue
            pixels = max(width * size * finer, 1.0)
            ink = int(255 * min(1.0, 0.35 + width / 0.03))
            pen.line([x0, y0, x1, y1], fill=ink, width=round(pixels))
            if pixels > 3:  # round joints; on very thin lines they would look like beads
                r = pixels / 2 - 0.5
                pen.ellipse([x1 - r, y1 - r, x1 + r, y1 + r], fill=ink)
    return np.asarray(canvas.reduce(finer), dtype=np.float64) / 255


def _wander(rng: np.random.Generator, start: np.ndarray, heading: float, curve: float, length: float) -> np.ndarray:
    """Return points (n, 2) of a curve of `length` from `start` (2,) with mean plus smooth random curvature."""
    t = np.arange(int(length / STEP)) * STEP
    angle = heading + curve * t
    for pace, phase in zip((9, 21, 40), rng.uniform(0, 2 * np.pi, 3), strict=True):
        angle = angle + rng.normal(0, 0.12) * (np.sin(pace * t + phase) - np.sin(phase))
    walk = np.cumsum(STEP * np.stack([np.cos(angle), np.sin(angle)], axis=1), axis=0)
    return np.concatenate([start[None], start + walk])


def fundus_scene(seed: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Draw one eye: a fundus image cropped around the optic disc and its label map.

    Args:
        seed: non-negative integer of the eye; it determines pigmentation, disc, cup and vessels.
        size: side of the square image in pixels, at least 32 (designed for 64 to 512).

    Returns:
        The RGB image, float32 of shape (size, size, 3) in [0, 1], and the mask, uint8 of shape (size, size) with
        0 background, 1 disc rim and 2 cup. The whole disc is ``mask >= 1``.

    Raises:
        ValueError: if `seed` is negative or `size` is too small.

    Example:
        >>> image, mask = fundus_scene(seed=7, size=64)
        >>> image.shape, mask.shape, sorted(set(mask.ravel().tolist()))
        ((64, 64, 3), (64, 64), [0, 1, 2])
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}, but must be a non-negative integer; pass seed >= 0")
    if size < MIN_SIZE:
        raise ValueError(f"size is {size} pixels, too small to draw a disc; pass size >= {MIN_SIZE}")
    rng = np.random.default_rng(seed)
    side = rng.choice([-1.0, 1.0])  # side of the macula: left and right eyes are mirrored
    axis = (np.arange(size) + 0.5) / size - 0.5
    x, y = np.meshgrid(axis, axis)

    # the disc's own frame, in which its edge is the unit circle with slight irregularities
    centre, tilt = rng.uniform(-0.06, 0.06, 2), rng.uniform(-0.5, 0.5)
    radius = rng.uniform(0.16, 0.24)
    radii = radius * np.array([rng.uniform(0.86, 0.98), 1.0])
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    u, v = np.einsum("ji,jhw->ihw", turn, np.stack([x - centre[0], y - centre[1]])) / radii[:, None, None]
    disc = np.hypot(u, v) / _wobble(rng, u, v, 0.015)
    ratio = np.clip(rng.normal(0.54, 0.13), 0.3, 0.8)
    cup_at = rng.uniform(-0.35, 0.35, 2) * (0.92 - ratio)  # scaled so that there is always a rim
    cup_u, cup_v = (u - cup_at[0]) / (ratio * rng.uniform(0.92, 1.05)), (v - cup_at[1]) / ratio
    cup = np.hypot(cup_u, cup_v) / _wobble(rng, cup_u, cup_v, 0.03)
    mask = np.where(disc < 1, np.where(cup < 1, 2, 1), 0).astype(np.uint8)

    image = _background(rng, size, x, y)
    toward_macula = side * u / np.maximum(np.hypot(u, v), 1e-6)
    if rng.random() < 0.45:  # peripapillary atrophy: a pale crescent, mostly on the macular side
        width = rng.uniform(0.15, 0.4) * np.clip(toward_macula + 0.15, 0, 1)
        patchy = 0.85 + 0.15 * _smooth_noise(rng, size, 20)
        crescent = _soft(disc, 1 + width, 0.05) * _soft(-toward_macula, 0.0, 0.15) * patchy
        image = _blend(image, rng.uniform(0.35, 0.8) * crescent, image * [1.08, 1.25, 1.3] + [0.05, 0.07, 0.05])
    # nerve fibres shine above and below the disc, and light scatters from it
    shine = np.exp(-((toward_macula / 0.6) ** 2)) * np.exp(-np.maximum(disc - 1, 0) / 0.8)
    image = image * (1 + rng.uniform(0.0, 0.14) * shine + 0.10 * np.exp(-np.maximum(disc - 1, 0) / 0.25))[..., None]

    # the rim has some of the red of the fundus; it is paler toward the macula, where fewer fibres cross it
    tone, tint = rng.uniform(0.92, 1.05), rng.normal(0, 0.015, 3)
    rim = tone * (np.array([0.90, 0.58, 0.33]) + tint)
    rim = rim * (1 + (0.08 * toward_macula * disc + 0.03 * _smooth_noise(rng, size, 12))[..., None])
    image = _blend(image, rng.uniform(0.75, 0.95) * _soft(disc, 1.0, rng.uniform(0.08, 0.25)), rim)
    pale = tone * (np.array([0.97, 0.80, 0.58]) + tint)
    depth = _soft(cup, 1.0, rng.uniform(0.15, 0.5)) * (1 - 0.25 * np.minimum(cup, 1) ** 2)
    image = _blend(image, rng.uniform(0.35, 0.85) * depth, pale * (1 + 0.03 * _smooth_noise(rng, size, 28))[..., None])

    # blood absorbs mostly green and blue; vessels are deeper, so fainter, inside the cup
    to_image = turn * radii
    for kind_tint, wide in (([0.80, 0.50, 0.48], 0.80), ([0.62, 0.34, 0.40], 1.0)):  # arteries below, veins above
        hub = cup_at + ratio * np.array([-side * rng.uniform(0.1, 0.5), rng.uniform(-0.2, 0.2)])
        frame = (centre + to_image @ hub, centre + to_image @ cup_at, ratio * to_image)
        paths = grow_vessels(rng, *frame, side, wide * rng.uniform(0.85, 1.15))
        ink = draw_vessels(paths, size) * (1 - 0.35 * _soft(cup, 0.9, 0.08)) * rng.uniform(0.65, 0.9)
        image = _blend(image, ink, image * kind_tint)
    return np.clip(image, 0, 1).astype(np.float32), mask


def _background(rng: np.random.Generator, size: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the retina without disc and vessels: pigment colour, texture and slow illumination, (size, size, 3)."""
    pigment = rng.uniform(0, 1)  # 0 blond, 1 dark
    colour = (1 - pigment) * np.array([0.78, 0.42, 0.22]) + pigment * np.array([0.56, 0.25, 0.11])
    colour = colour * rng.normal(1, 0.04, 3)
    mottle = sum(a * _smooth_noise(rng, size, c) for a, c in ((0.06, 3), (0.04, 7), (0.025, 18), (0.03, 44)))
    # choroidal vessels show as a faint net of ridges, more in some eyes than in others
    net = rng.uniform(0.0, 0.10) * (0.5 - np.abs(_smooth_noise(rng, size, 11)))
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.30)
    light = 1 + slope * (np.cos(angle) * x + np.sin(angle) * y) - rng.uniform(0.0, 0.35) * (x**2 + y**2)
    texture = (mottle + net)[..., None] * np.array([0.8, 1.25, 1.1])  # red light hides texture, green shows it
    return colour * (1 + texture) * light[..., None]


def _soft(distance: np.ndarray, edge: float | np.ndarray, width: float) -> np.ndarray:
    """Return about 1 where `distance` is below `edge` and 0 above, and one half exactly at the edge."""
    return 1 / (1 + np.exp(np.clip(4 * (distance - edge) / width, -60, 60)))


def _blend(under: np.ndarray, opacity: np.ndarray, over: np.ndarray) -> np.ndarray:
    """Blend the colours `over` onto the image `under` with an opacity map (H, W) in [0, 1]."""
    return under + opacity[..., None] * (over - under)


def _wobble(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, strength: float) -> np.ndarray:
    """Return the relative radius of an almost round outline in the direction of each pixel."""
    angle, phases = np.arctan2(v, u), rng.uniform(0, 2 * np.pi, 3)
    return 1 + strength * sum(np.sin(k * angle + p) / (k - 1) for k, p in zip((2, 3, 4), phases, strict=True))


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Return noise (size, size) of about unit standard deviation, with `cells` independent patches per side."""
    first, weights = _spline_weights(size, cells)
    noise = rng.standard_normal((cells + 3, cells + 3))
    for _ in range(2):  # one axis, then the other; the rounding of matrix products would depend on the threads
        noise = sum(w[:, None] * noise[first + k] for k, w in enumerate(weights)).T
    return 2 * noise


@lru_cache(maxsize=64)
def _spline_weights(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first taps (size,) and cubic B-spline weights (4, size) of a grid that does not depend on the pixels."""
    at = (np.arange(size) + 0.5) / size * cells
    first = at.astype(int)
    d = np.abs(at - first + 1 - np.arange(4)[:, None])
    return first, np.where(d < 1, 2 / 3 - d**2 + d**3 / 2, (2 - d) ** 3 / 6)
