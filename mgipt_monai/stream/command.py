# SPDX-License-Identifier: Apache-2.0
"""Look at a stream's state file, go back to an earlier state, or compare two.

Run as ``python -m mgipt_monai.stream.command show FILE``, ``... rollback FILE --to 400``, ``... diff FILE OTHER``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mgipt_monai.stream.state_file import StreamFile, change, differences, read

__all__ = ["main"]


def show(path: str) -> str:
    """Say in lines of text what a stream's state file holds."""
    content = read(path)
    snapshots = ", ".join(str(state["position"]) for state in content["snapshots"]) or "none"
    return "\n".join(
        [
            f"images done: {content['position']}, latest site: {content['site']}",
            f"snapshots after images: {snapshots}",
            f"source weights: SHA-256 {content['weights']}",
            f"settings: {content['settings']}",
        ]
    )


def diff(one: str, other: str) -> str:
    """Say in lines of text where two state files differ: weights, settings, place in the stream, and prompts."""
    first, second = read(one), read(other)
    lines = differences(
        *({key: content[key] for key in ("weights", "position", "site")} for content in (first, second))
    )
    lines += differences(first["settings"], second["settings"])
    far = change(first["adaptation"], second["adaptation"])
    lines += [f"{name}: largest difference {value:.4g}" for name, value in far.items() if value]
    return "\n".join(lines) or "no difference"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="what the file holds").add_argument("path")
    back = commands.add_parser("rollback", help="make a snapshot the current state")
    back.add_argument("path")
    back.add_argument("--to", type=int, required=True, help="the images that were done then")
    two = commands.add_parser("diff", help="where two files differ")
    two.add_argument("one")
    two.add_argument("other")
    options = parser.parse_args(arguments)
    try:
        if options.command == "diff":
            print(diff(options.one, options.other))
            return
        if options.command == "rollback":
            StreamFile(options.path).rollback(options.to)
        print(show(options.path))
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
