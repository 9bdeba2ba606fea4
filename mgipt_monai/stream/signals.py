# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGHUP end a run as Ctrl-C does: the current image is rolled back, and what is done is kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["StoppedError", "stopping_at_once", "stopping_cleanly"]

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StoppedError(SystemExit):
    """A signal ends the process, with exit status 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP within the block into a :class:`StoppedError`.

    It acts only in the main thread, and only on signals that would end the process at once: whoever ignores one
    (``nohup``) or has a handler of its own keeps that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    owner = os.getpid()

    def stop(number: int, _frame: FrameType | None) -> Any:
        if os.getpid() != owner:  # a forked worker process, which has nothing to keep
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for each in taken:  # a second one would cut off the saving
            signal.signal(each, signal.SIG_IGN)
        raise StoppedError(number)

    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the process in the block as the system does, within :func:`stopping_cleanly` too.

    For where the process waits in a library that does not return to Python, so that nothing else could stop it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = {number: signal.getsignal(number) for number in SIGNALS}
    own = {number: handler for number, handler in taken.items() if getattr(handler, "__module__", "") == __name__}
    for number in own:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)
