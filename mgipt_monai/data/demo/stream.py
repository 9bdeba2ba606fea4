# SPDX-License-Identifier: Apache-2.0
"""Write the sites of the demo to disk: synthetic eyes photographed by several cameras, as PNG pairs.

Run as ``python -m mgipt_monai.data.demo.stream --folder demo --cameras source,low_contrast --count 16``.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mgipt_monai.data.demo.cameras import CAMERAS, Camera
from mgipt_monai.data.demo.fundus import fundus_scene
from mgipt_monai.utils.outputs import OutputFolder


def write_demo_site(folder: str | Path, camera: Camera, count: int, seed: int, size: int = 128) -> list[dict[str, str]]:
    """Write one site: `count` different eyes photographed by one camera with slightly varying settings.

    Writes ``<folder>/<camera.name>/images/eye_000.png`` (8-bit RGB) and ``.../masks/eye_000.png`` (8-bit grey, coded
    0 background, 1 disc rim, 2 cup). The same arguments give the same bytes; cameras with different names
    photograph different eyes.

    Args:
        folder: parent folder, created if missing; files of an earlier call are overwritten.
        camera: camera of the site; the site has its name.
        count: number of eyes, at least 1.
        seed: non-negative integer.
        size: side of the square images in pixels.

    Returns:
        A MONAI datalist, one ``{"image": path, "label": path, "site": name}`` for each eye.

    Raises:
        FileExistsError: if a file stands there that no such call wrote.
        ValueError: if `count` or `seed` is out of range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     items = write_demo_site(folder, CAMERAS["source"], count=2, seed=0, size=64)
        >>> len(items), items[0]["site"], items[1]["image"][-11:]
        (2, 'source', 'eye_001.png')
    """
    if count < 1:
        raise ValueError(f"count is {count}; a site needs at least 1 eye")
    if seed < 0:
        raise ValueError(f"seed is {seed}; pass a non-negative integer")
    target = OutputFolder(folder, durable=False)
    target.prepare()
    items = []
    for index in range(count):
        # crc32 instead of hash(), which differs between processes
        sequence = np.random.SeedSequence([seed, zlib.crc32(camera.name.encode()), index])
        eye, settings, noise = (int(word) for word in sequence.generate_state(3))
        scene, mask = fundus_scene(eye, size)
        photograph = camera.jittered(settings)(scene, noise)
        item = {"site": camera.name}
        pixels = {"image": np.round(photograph * 255).astype(np.uint8), "label": mask}
        for key, kind in (("image", "images"), ("label", "masks")):
            name = f"{camera.name}/{kind}/eye_{index:03d}.png"
            with target.writing(name) as part:
                Image.fromarray(pixels[key]).save(part)
            item[key] = str(target.file(name))
        items.append(item)
    return items


def write_demo_stream(
    folder: str | Path, cameras: Sequence[Camera], count: int, seed: int = 0, size: int = 128
) -> list[dict[str, str]]:
    """Write several sites and return their joint datalist in stream order.

    Args:
        folder: parent folder of the sites.
        cameras: cameras of the sites, in stream order.
        count: number of eyes for each site.
        seed: non-negative integer.
        size: side of the square images in pixels.

    Raises:
        ValueError: if two cameras have the same name, or as in `write_demo_site`.
    """
    names = [camera.name for camera in cameras]
    if len(set(names)) < len(names):
        raise ValueError(f"camera names are {names}; give each camera its own name, which is that of the site folder")
    return [item for camera in cameras for item in write_demo_site(folder, camera, count, seed, size)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a demo stream with the command-line options and print one line per site."""
    parser = argparse.ArgumentParser(description="Write synthetic fundus sites (images and masks) for the demo.")
    parser.add_argument("--folder", required=True, help="folder to write to; created if missing")
    parser.add_argument("--cameras", default=",".join(CAMERAS), help="comma-separated, from: %(default)s")
    parser.add_argument("--count", type=int, default=16, help="eyes per camera (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stream (default %(default)s)")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.cameras.split(",")]
    unknown = [name for name in names if name not in CAMERAS]
    if unknown:
        parser.error(f"there is no camera {', '.join(map(repr, unknown))}; choose from {', '.join(CAMERAS)}")
    try:
        write_demo_stream(options.folder, [CAMERAS[n] for n in names], options.count, options.seed, options.size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for name in names:
        print(f"{name}: {options.count} eyes in {Path(options.folder) / name}")


if __name__ == "__main__":
    main()
