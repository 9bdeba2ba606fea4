# SPDX-License-Identifier: Apache-2.0
"""Write the report page of a benchmark's folder anew: ``python -m mgipt_monai.report OUT``."""

from __future__ import annotations

import argparse

from .page import write_report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="output folder of a benchmark")
    print(write_report(parser.parse_args().folder))
