# SPDX-License-Identifier: Apache-2.0
"""A bound on what a pickle unfolds to: some kilobytes of nested references would keep whoever walks them for ever."""

from __future__ import annotations

import pickletools
from typing import Any

__all__ = ["check_pickle"]

LARGEST = 10_000_000
"""Number of values that a pickle may unfold to; five snapshots of a large network's weights have some 100,000."""
DEEPEST = 64

_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FROM_MARK = {"TUPLE", "LIST", "DICT", "FROZENSET"}
_INTO_BELOW = {"APPENDS", "SETITEMS", "ADDITEMS"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_CALLS = {"REDUCE", "NEWOBJ", "BUILD"}
_MARK: Any = object()


class _Node:
    """One object of the pickle, and what it holds."""

    def __init__(self, parts: list[_Node] | None = None) -> None:
        self.parts = parts or []


def check_pickle(content: bytes) -> None:
    """Raise ValueError for a pickle that unfolds to too much, or is nested too deeply; nothing of it is loaded.

    Example:
        >>> import pickle
        >>> nested = []
        >>> for _ in range(60):
        ...     nested = [nested, nested]
        >>> check_pickle(pickle.dumps(nested, protocol=2))
        Traceback (most recent call last):
        ValueError: it unfolds to more than 10,000,000 values
    """
    try:
        nodes = _nodes(content)
    except Exception as error:
        raise ValueError(f"its pickle is damaged: {error}") from error
    _check_size(nodes)


def _nodes(content: bytes) -> list[_Node]:
    """Return all objects that loading the pickle would make."""
    stack: list[Any] = []
    memo: dict[Any, _Node] = {}
    nodes: list[_Node] = []

    def push(parts: list[_Node] | None = None) -> None:
        nodes.append(_Node(parts))
        stack.append(nodes[-1])

    def from_mark() -> list[_Node]:
        parts: list[_Node] = []
        while (part := stack.pop()) is not _MARK:
            parts.append(part)
        return parts

    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            break
        if name == "MARK":
            stack.append(_MARK)
        elif name in _PUT:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _GET:
            stack.append(memo[argument])
        elif name in _CONTAINERS:
            push()
        elif name in _TUPLES:
            parts = stack[-_TUPLES[name] :]
            del stack[-_TUPLES[name] :]
            push(parts)
        elif name in _FROM_MARK:
            push(from_mark())
        elif name in _INTO_BELOW:
            parts = from_mark()
            stack[-1].parts += parts
        elif name == "APPEND":
            part = stack.pop()
            stack[-1].parts.append(part)
        elif name == "SETITEM":
            parts = [stack.pop(), stack.pop()]
            stack[-1].parts += parts
        elif name in _CALLS:
            part = stack.pop()
            if name == "BUILD":
                stack[-1].parts.append(part)
            else:
                push([stack.pop(), part])
        elif name == "BINPERSID":
            push([stack.pop()])
        elif name == "POP":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif opcode.stack_before:
            raise ValueError(f"torch.save does not write {name}")
        else:
            push()
    return nodes


def _check_size(nodes: list[_Node]) -> None:
    """Raise ValueError if a node unfolds to more than the bound, or holds itself."""
    sizes: dict[int, tuple[int, int]] = {}  # of a node's id: number of values, and depth
    for start in nodes:
        path: list[tuple[_Node, int]] = [(start, 0)]
        entered = {id(start)}
        while path:
            node, index = path.pop()
            if id(node) in sizes:
                continue
            if index < len(node.parts):
                path.append((node, index + 1))
                part = node.parts[index]
                if id(part) in entered:
                    raise ValueError("it holds itself")
                if id(part) not in sizes:
                    entered.add(id(part))
                    path.append((part, 0))
                continue
            entered.discard(id(node))
            count = 1 + sum(sizes[id(part)][0] for part in node.parts)
            depth = 1 + max((sizes[id(part)][1] for part in node.parts), default=0)
            if count > LARGEST:
                raise ValueError(f"it unfolds to more than {LARGEST:,} values")
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} deep")
            sizes[id(node)] = count, depth
