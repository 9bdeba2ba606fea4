# SPDX-License-Identifier: Apache-2.0
"""Sum up record files, and say what in them is worth a look.

Run as ``python -m mgipt_monai.report.records RECORDS.jsonl [MORE.jsonl ...] [--by day] [--html PAGE.html]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from mgipt_monai.summary import aligned

from .alerts import alerts
from .record_reader import read_records
from .record_table import Period, record_table

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", help="records.jsonl of one or more runs")
    parser.add_argument("--by", choices=get_args(Period), default="month", help="what a line of the table is of")
    parser.add_argument("--html", help="write a page with charts too (needs jinja2)")
    options = parser.parse_args(arguments)
    try:
        rows, skipped = read_records(options.records)
    except OSError as error:
        parser.error(str(error))
    found = alerts(rows)
    if skipped:
        found.append(f"{skipped} lines could not be read and are left out")
    table = record_table(rows, options.by)
    print(aligned(table, texts=2))
    print("\n".join(["", *(f"! {alert}" for alert in found)]) if found else "\nno alerts")
    if options.html:
        from .record_page import write_record_page

        print(write_record_page(options.html, rows, table, found))


if __name__ == "__main__":
    main()
