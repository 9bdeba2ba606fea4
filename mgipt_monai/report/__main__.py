# SPDX-License-Identifier: Apache-2.0
"""The command that regenerates the report page of a benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mgipt_monai.installed import require


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `mgipt report`."""
    parser = argparse.ArgumentParser(
        prog="mgipt report",
        description="Regenerate the report page of a benchmark.",
        epilog="example: mgipt report results",
    )
    parser.add_argument("folder", metavar="FOLDER", help="output folder of a benchmark")
    parser.add_argument("--chart", metavar="FILE", help="also draw the change of each image into a picture: gain.png")
    options = parser.parse_args(arguments)
    try:
        require("benchmark", "jinja2", "matplotlib")
        from .page import write_gain_chart, write_report  # need these packages

        print(write_report(options.folder))
        if options.chart:
            print(write_gain_chart(options.folder, options.chart))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
