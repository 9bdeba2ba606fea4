# SPDX-License-Identifier: Apache-2.0
"""Branching, tapering blood vessels for the synthetic fundus, grown as polylines and drawn as an opacity map."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

Vessel = tuple[np.ndarray, np.ndarray]
STEP = 0.0125  # walking step as a share of the image side: short enough to look curved at 512 pixels


def grow_vessels(
    rng: np.random.Generator,
    hub: np.ndarray,
    cup_centre: np.ndarray,
    cup_frame: np.ndarray,
    side: float,
    wide: float,
) -> list[Vessel]:
    """Grow one kind of vessel (arteries or veins): trunks leave the disc upward and downward and fork.

    All places are shares of the image side, with the origin at the image's centre and y pointing down.

    Args:
        rng: source of all variation.
        hub: (2,) place inside the cup where the vessels surface.
        cup_centre: (2,) centre of the cup.
        cup_frame: (2, 2) matrix that carries the unit circle to the cup's edge.
        side: +1 if the macula lies to the right of the disc, -1 if to the left.
        wide: factor on every width; 1 gives the veins of a common eye.

    Returns:
        Pairs of points (n, 2) and widths (n,), both in shares of the side, thinnest vessels first.

    Example:
        >>> grown = grow_vessels(np.random.default_rng(0), np.zeros(2), np.zeros(2), 0.1 * np.eye(2), 1.0, 1.0)
        >>> grown[0][0].shape[1], len(grown) > 6
        (2, True)
    """
    paths: list[Vessel] = []
    for half in (-1, 1):
        for toward, share in ((side, 1.0), (-side, rng.uniform(0.6, 0.9)), (rng.choice([-1, 1]), 0.4)):
            # from the hub to the cup's rim, then a bend, then out over the disc along an arcade
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
        float64 of shape (size, size) in [0, 1]; thin vessels are fainter, as less blood lies in the light's way.
    """
    finer = max(2, -(-512 // size))  # drawn large and averaged down: PIL rounds to whole pixels
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
            if pixels > 3:  # round joints; on hair-thin lines they would only make beads
                r = pixels / 2 - 0.5
                pen.ellipse([x1 - r, y1 - r, x1 + r, y1 + r], fill=ink)
    return np.asarray(canvas.reduce(finer), dtype=np.float64) / 255


def _wander(rng: np.random.Generator, start: np.ndarray, heading: float, curve: float, length: float) -> np.ndarray:
    """Walk `length` from `start` (2,) with a mean curvature and a smooth random one; returns points (n, 2)."""
    t = np.arange(int(length / STEP)) * STEP
    angle = heading + curve * t
    for pace, phase in zip((9, 21, 40), rng.uniform(0, 2 * np.pi, 3), strict=True):
        angle = angle + rng.normal(0, 0.12) * (np.sin(pace * t + phase) - np.sin(phase))
    walk = np.cumsum(STEP * np.stack([np.cos(angle), np.sin(angle)], axis=1), axis=0)
    return np.concatenate([start[None], start + walk])
