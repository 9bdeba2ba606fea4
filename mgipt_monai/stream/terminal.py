# SPDX-License-Identifier: Apache-2.0
"""What a terminal shows of a stream while it runs: a progress bar, and a line of plain words for each image."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO, cast

from ignite.engine import Engine, Events
from tqdm.auto import tqdm

__all__ = ["StreamBar", "beside_bars", "in_words"]


class StreamBar:
    """An Ignite handler that shows a progress bar from before the first image on, also of a resumed stream.

    Where the standard error is no terminal, such as a file, no bar is drawn.

    Args:
        shown: returns what to write behind the bar after an image, by name.
        image_events: fired at the end of an image.
    """

    def __init__(self, shown: Callable[[], dict[str, Any]], image_events: Any) -> None:
        self._shown, self._events = shown, image_events
        self._bar: Any = None

    def attach(self, engine: Engine) -> None:
        """Attach to an engine."""
        # a stream that is resumed knows its place only when all handlers have started
        engine.add_event_handler(Events.EPOCH_STARTED, self._open)
        engine.add_event_handler(self._events, self._advance)

    def close(self) -> None:
        """Leave the bar as it is; the run has ended, or was ended."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _open(self, engine: Engine) -> None:
        self.close()
        state, in_notebook = engine.state, any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
        self._bar = tqdm(
            desc="stream",
            total=state.epoch_length,
            initial=state.iteration,
            unit="image",
            bar_format="{desc}: {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
            disable=False if in_notebook else None,
        )

    def _advance(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.set_postfix(self._shown(), refresh=False)
            self._bar.update(engine.state.iteration - self._bar.n)


class _BesideBars:
    """A stream of text whose writing takes the bars away for its time."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.process = stream, os.getpid()

    def write(self, text: str) -> int:
        if os.getpid() != self.process:  # a forked worker has no bar, and its copy of the lock may be held for ever
            return self.stream.write(text)
        with tqdm.external_write_mode(file=self.stream):
            return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def beside_bars() -> Iterator[None]:
    """Keep what is logged, and Python's warnings, on lines of their own beside the progress bars of the block.

    Unlike ``tqdm.contrib.logging.logging_redirect_tqdm`` it leaves each handler its level, formatter and filters, and
    finds those of all loggers, such as the ones that MONAI makes.
    """
    loggers = [logging.root, *logging.Logger.manager.loggerDict.values()]
    handlers = {id(each): each for one in loggers for each in getattr(one, "handlers", ())}
    if not logging.root.handlers and isinstance(logging.lastResort, logging.StreamHandler):
        warn_only = logging.StreamHandler()  # Python's own of last resort cannot be given another stream
        warn_only.setLevel(logging.lastResort.level)
        logging.root.addHandler(warn_only)
        handlers[id(warn_only)] = warn_only
    else:
        warn_only = None
    show = warnings.showwarning

    def show_beside(*args: Any, **kwargs: Any) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            show(*args, **kwargs)

    with ExitStack() as stack:
        # not tqdm's own lock, which processes share: one that is killed while it writes would stop all others for ever
        stack.callback(tqdm.set_lock, tqdm.get_lock())
        tqdm.set_lock(threading.RLock())
        if warn_only is not None:
            stack.callback(logging.root.removeHandler, warn_only)
        for handler in handlers.values():
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr):
                stack.callback(handler.setStream, handler.stream)
                handler.setStream(cast("TextIO", _BesideBars(handler.stream)))
        warnings.showwarning = show_beside
        stack.callback(setattr, warnings, "showwarning", show)
        yield


def in_words(row: dict[str, Any]) -> str:
    """Describe one record in a line for the log.

    Example:
        >>> in_words({"name": "A/eye", "status": "ok", "seconds": 0.5, "forwards": 25, "backwards": 17})
        'A/eye: 25 forward and 17 backward passes, 0.50 s'
        >>> in_words({"name": "A/eye", "status": "failed", "reason": "the image is constant"})
        'A/eye failed: the image is constant'
    """
    if row["status"] != "ok":
        return f"{row['name']} failed: {row['reason']}"
    words = [*_adaptation(row), *_notes(row), *_cost(row), f"{row['seconds']:.2f} s"]
    return f"{row['name']}: {', '.join(words)}"


def _adaptation(row: dict[str, Any]) -> Iterator[str]:
    before, after = row.get("loss_before"), row.get("loss_after")
    if row.get("instance_size"):
        yield f"prompt size {row['instance_size']}"
    if before is not None:
        yield f"loss {before:.3g}" if after is None else f"alignment loss {before:.3g} to {after:.3g}"
    if row.get("adapted_weight") is not None:
        evidence, weight = 100 * row["evidence"], 100 * row["adapted_weight"]
        yield f"evidence of a shift {evidence:.0f} %, adapted prediction weighs {weight:.0f} %"
    if row.get("disagreement") is not None:
        yield f"the views disagree by {100 * row['disagreement']:.1f} %"
    if row.get("corrected"):
        yield f"corrected {' and '.join(row['corrected'])}"
    if row.get("adapted_slices") is not None:
        yield f"{row['adapted_slices']} slices adapted to"


def _notes(row: dict[str, Any]) -> Iterator[str]:
    if row.get("decision") == "unadapted":
        yield f"predicted without adaptation since {row['reasons'][0]}"
    elif row.get("learned") is False:
        yield f"nothing learned for later images since {row['reasons'][0]}" if row.get("reasons") else "nothing learned"
    if row.get("dropped"):
        yield f"left out to save passes: {' and '.join(row['dropped'])}"
    if row.get("elsewhere"):
        yield "unlike the images before"
    monitor = row.get("monitor") or {}
    if monitor.get("alarm"):
        yield f"ALARM: the images have changed ({monitor.get('signal')})"


def _cost(row: dict[str, Any]) -> Iterator[str]:
    forwards, backwards = row.get("forwards"), row.get("backwards")
    if forwards is None:
        return
    total = backwards or forwards
    kinds = f"{forwards} forward and {backwards} backward" if backwards else f"{forwards} forward"
    yield f"{kinds} pass{'' if total == 1 and not backwards else 'es'}"
