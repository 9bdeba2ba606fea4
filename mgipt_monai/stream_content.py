# SPDX-License-Identifier: Apache-2.0
"""What a stream's state file must hold, checked before anything of it is used."""

from __future__ import annotations

from typing import Any

from .networks.state_checks import check_keys, check_number

__all__ = ["check_content"]

DEPTH = 8
"""How deep settings may be nested; a file's own are three deep."""


def check_content(content: dict[str, Any]) -> None:
    """Check the types of all that a stream file holds, except what only its method can judge.

    Raises:
        ValueError: naming the entry that is something else.
    """
    if not isinstance(content["weights"], str):
        raise ValueError(f"weights must be a text, got {type(content['weights']).__name__}")
    if not isinstance(content["settings"], dict) or not _is_plain(content["settings"]):
        raise ValueError("settings must be a dict of plain values")
    if not isinstance(content["snapshots"], list):
        raise ValueError(f"snapshots must be a list, got {type(content['snapshots']).__name__}")
    for state in (content, *content["snapshots"]):
        check_keys("stream's state", state, {"adaptation", "position", "site"})
        check_number("position", state["position"], least=0, whole=True)
        check_keys("adaptation", state["adaptation"], set())
        if not (state["site"] is None or isinstance(state["site"], (str, int))):
            raise ValueError(f"site must be a text or a whole number, got {type(state['site']).__name__}")


def _is_plain(value: Any, depth: int = DEPTH) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(k, str) and _is_plain(v, depth - 1) for k, v in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(v, depth - 1) for v in value)
    return isinstance(value, (bool, int, float, str))
