# SPDX-License-Identifier: Apache-2.0
"""The command that converts a published dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from monai.utils import OptionalImportError

from mgipt_monai.data.published import LAYOUTS, convert


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `mgipt published`; print one line per site."""
    parser = argparse.ArgumentParser(
        prog="mgipt published",
        description="Convert a published dataset to OUT/SITE/images and OUT/SITE/masks. Nothing is downloaded.",
        epilog="example: mgipt published drishti_gs Drishti-GS1_files --output_dir sites --crop 800 --size 512\n\n"
        "layouts and their expected folders:\n"
        + "\n".join(f"  {name}: {layout.expected}" for name, layout in LAYOUTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("layout", choices=LAYOUTS, metavar="LAYOUT", help=f"one of {', '.join(LAYOUTS)}")
    parser.add_argument("folder", metavar="FOLDER", help="the dataset as distributed by its owner, unpacked")
    parser.add_argument("--output_dir", metavar="OUT", required=True, help="folder to write to; datasets may share it")
    parser.add_argument("--crop", type=int, metavar="SIDE", help="crop SIDE x SIDE pixels around the optic disc")
    parser.add_argument("--size", type=int, metavar="N", help="resize image and mask to N x N pixels")
    parser.add_argument("--site", metavar="NAME", help="name of the site, for layouts with a single site")
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
