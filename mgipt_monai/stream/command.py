# SPDX-License-Identifier: Apache-2.0
"""Show the state file of a stream, roll it back to an earlier state, or compare two.

Run as ``mgipt state show FILE``, ``mgipt state rollback FILE --to 400``, ``mgipt state diff FILE OTHER``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mgipt_monai.stream.state_file import StreamFile, change, differences, read

__all__ = ["main"]


def show(path: str) -> str:
    """Describe the content of a state file in lines of text."""
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
    """Describe how two state files differ: weights, settings, position in the stream, and prompts."""
    first, second = read(one), read(other)
    keys = ("weights", "position", "site")
    lines = differences({key: first[key] for key in keys}, {key: second[key] for key in keys})
    lines += differences(first["settings"], second["settings"])
    far = change(first["adaptation"], second["adaptation"])
    lines += [f"{name}: largest difference {value:.4g}" for name, value in far.items() if value]
    return "\n".join(lines) or "no difference"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `mgipt state`."""
    parser = argparse.ArgumentParser(
        prog="mgipt state",
        description="Show the state file of a stream, roll it back to an earlier state, or compare two.",
        epilog="example: mgipt state rollback masks/adaptation_state.pt --to 400",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="show the content of the file").add_argument("path")
    back = commands.add_parser("rollback", help="make a snapshot the current state")
    back.add_argument("path")
    back.add_argument("--to", type=int, required=True, help="number of images after which the snapshot was saved")
    two = commands.add_parser("diff", help="show the differences between two files")
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
