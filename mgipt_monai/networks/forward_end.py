# SPDX-License-Identifier: Apache-2.0
"""Where a forward that is run for its alignment loss alone can end: at the last layer that is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ForwardEnd", "ForwardEndedError"]


class ForwardEndedError(BaseException):
    """Leaves the network at the last measured layer; it is no ``Exception``, so that the network does not catch it."""


class ForwardEnd:
    """The order in which layers are measured, seen in a whole forward, by which later ones know their last layer.

    A forward ends early where the same layers were measured in the same order, and as often, as in the latest whole
    forward. One that differs is run whole, and its order is the one to know from then on.

    Example:
        >>> end = ForwardEnd()
        >>> def run(*layers: str) -> list[str]:
        ...     done = []
        ...     with end.forward():
        ...         for layer in layers:
        ...             done.append(layer)
        ...             end.measured(layer)
        ...         done.append("head")
        ...     return done
        >>> run("encoder", "decoder"), run("encoder", "decoder")
        (['encoder', 'decoder', 'head'], ['encoder', 'decoder'])
    """

    def __init__(self) -> None:
        self._known: list[str] = []
        self._seen: list[str] | None = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Run a forward within it that may end early."""
        self._seen = []
        try:
            yield
            self._known = self._seen
        except ForwardEndedError:
            pass
        finally:
            self._seen = None

    def begin(self) -> bool:
        """Begin the forward, or begin it anew, with nothing measured; return whether it is one that may end early."""
        if self._seen is not None:
            self._seen = []
        return self._seen is not None

    def is_last(self, name: str) -> bool:
        """Whether this forward ends at the layer, if it is measured now."""
        return self._seen is not None and [*self._seen, name] == self._known

    def measured(self, name: str) -> None:
        """Take note of a layer that has been measured.

        Raises:
            ForwardEndedError: if it was the last one.
        """
        last = self.is_last(name)
        if self._seen is not None:
            self._seen.append(name)
        if last:
            raise ForwardEndedError
