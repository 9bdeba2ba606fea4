# SPDX-License-Identifier: Apache-2.0
"""Write a stream as a MONAI datalist, from folders, CSV tables or other datalists.

Run as ``mgipt datalist SITES stream.json --labelled --order shuffled --rounds 3``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgipt_monai.data.order import ORDERS, order_stream
from mgipt_monai.data.streams import find_stream
from mgipt_monai.utils.outputs import OutputFolder, output_file

__all__ = ["datalist_file", "write_datalist"]


def write_datalist(items: Sequence[dict[str, Any]], path: str | os.PathLike[str], key: str = "testing") -> None:
    """Write a stream to a datalist for :func:`mgipt_monai.find_stream` or MONAI's ``load_decathlon_datalist``.

    Paths of images and masks below the file's folder are written relative to it, so that the folder can be moved; other
    paths are absolute. Everything else in an item is written unchanged.

    Args:
        items: items such as those of :func:`mgipt_monai.find_stream` or :func:`mgipt_monai.order_stream`.
        path: the file to write; its name must end in ``.json``.
        key: key of the list in the file.

    Raises:
        FileExistsError: if a file stands there that this function did not write.
        ValueError: if the name does not end in ``.json``, as the file would not be recognised as a datalist.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_datalist([{"image": str(folder / "eye.png"), "site": "A", "name": "A/eye"}], folder / "list.json")
        >>> json.loads((folder / "list.json").read_text())
        {'testing': [{'image': 'eye.png', 'site': 'A', 'name': 'A/eye'}]}
    """
    target, name = datalist_file(path)
    folder = Path(os.path.abspath(path)).parent
    written = [
        {name: _portable(value, folder) if name in ("image", "label") else value for name, value in item.items()}
        for item in items
    ]
    with target.writing(name) as part:
        part.write_text(json.dumps({key: written}, indent=2) + "\n", encoding="utf-8")


def datalist_file(path: str | os.PathLike[str]) -> tuple[OutputFolder, str]:
    """Return the folder of a datalist that may be written, and its name; raise the errors of :func:`write_datalist`."""
    if not os.fspath(path).endswith(".json"):
        raise ValueError(f"a datalist's name must end in .json, got {os.fspath(path)}")
    return output_file(path)


def _portable(path: Any, folder: Path) -> Any:
    if isinstance(path, (list, tuple)):
        return [_portable(one, folder) for one in path]
    path = Path(os.path.abspath(path))
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `mgipt datalist`; print one line per site."""
    parser = argparse.ArgumentParser(
        prog="mgipt datalist",
        description="Write a stream of images as a MONAI JSON datalist.",
        epilog="example: mgipt datalist sites stream.json --labelled --order shuffled --rounds 3",
    )
    parser.add_argument("source", help="a folder, a glob pattern or a list of images (JSON, CSV)")
    parser.add_argument("out", help="the JSON file to write")
    parser.add_argument("--sites", help="comma-separated sites to use, in this order (default all)")
    parser.add_argument("--labelled", action="store_true", help="each image has a mask")
    parser.add_argument("--limit", type=int, help="at most this number of images per site (default all)")
    parser.add_argument("--order", choices=ORDERS, default="sites", help="order of the images (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of the stream (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order (default %(default)s)")
    options = parser.parse_args(arguments)
    sites = options.sites and [site.strip() for site in options.sites.split(",")]
    try:
        items = find_stream(options.source, sites, options.labelled, options.limit)
        items = order_stream(items, options.order, options.rounds, options.seed)
        write_datalist(items, options.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for site, count in Counter(item["site"] for item in items).items():
        print(f"{site}: {count} images in {options.out}")


if __name__ == "__main__":
    main()
