# SPDX-License-Identifier: Apache-2.0
"""The command that converts a published data set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from monai.utils import OptionalImportError

from mgipt_monai.data.published import LAYOUTS, convert


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert a data set as told on the command line and print one line for each site."""
    parser = argparse.ArgumentParser(
        prog="python -m mgipt_monai.data.published",
        description="Write a published data set as OUT/SITE/images and OUT/SITE/masks. Nothing is downloaded.",
        epilog="layouts and the folder that each expects:\n"
        + "\n".join(f"  {name}: {layout.expected}" for name, layout in LAYOUTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("layout", choices=LAYOUTS, metavar="LAYOUT", help=f"one of {', '.join(LAYOUTS)}")
    parser.add_argument("folder", metavar="FOLDER", help="the data set as its owner distributes it, unpacked")
    parser.add_argument("--output_dir", metavar="OUT", required=True, help="where to write; data sets may share it")
    parser.add_argument("--crop", type=int, metavar="SIDE", help="cut a square of so many pixels round the optic disc")
    parser.add_argument("--size", type=int, metavar="N", help="resize image and mask to N x N pixels")
    parser.add_argument("--site", metavar="NAME", help="name of the site, for layouts that give one")
    options = parser.parse_args(arguments)
    try:
        counts = convert(
            LAYOUTS[options.layout], options.folder, options.output_dir, options.crop, options.size, options.site
        )
    except (ValueError, OSError, OptionalImportError) as error:
        parser.error(str(error))
    for site, count in counts.items():
        print(f"{site}: {count} images in {Path(options.output_dir) / site}")


if __name__ == "__main__":
    main()
