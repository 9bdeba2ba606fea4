# SPDX-License-Identifier: Apache-2.0
"""What lasts of a stream while it runs: state, records, noted attempts and folders, kept in step with each other."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.stream.images import StreamImages, site_of
from mgipt_monai.stream.records import AuditTrail, Identifiers
from mgipt_monai.stream.state_file import StreamFile
from mgipt_monai.stream.terminal import in_words
from mgipt_monai.utils.files import file_names, root_cause
from mgipt_monai.utils.machine import out_of_memory
from mgipt_monai.utils.outputs import WatchedFolders

__all__ = ["StreamProgress"]

logger = logging.getLogger(__name__)


class Attempts:
    """Counts how often a process began with an image and did not come to its end.

    Args:
        path: the note's file; it is there only while a run is under way, and after one that died.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "state.pt.attempt")
        >>> Attempts(path).begin(7)  # and the process dies
        >>> again = Attempts(path)
        >>> again.read()
        >>> again.count(7), again.count(8)
        (1, 0)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._counts: dict[int, int] = {}
        self._begun: int | None = None

    def read(self) -> None:
        """Read what an earlier run left; a damaged note counts as none."""
        self._begun = None
        try:
            found = json.loads(self.path.read_bytes())
            self._counts = {int(position): int(count) for position, count in found.items()}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            self._counts = {}

    def count(self, position: int) -> int:
        """Return how often a process died at the image at this position."""
        return self._counts.get(position, 0)

    @property
    def latest(self) -> int | None:
        """The last position at which a process died and which is not done yet."""
        return max(self._counts, default=None)

    def move(self, old: int, new: int) -> None:
        """Move the note of an image to its new position."""
        if old in self._counts:
            self._counts[new] = self._counts.pop(old)

    def begin(self, position: int) -> None:
        """Note that an image is begun; those before it are done."""
        later = {other: count for other, count in self._counts.items() if other > position}
        self._counts = {position: self.count(position) + 1, **later}
        self._begun = position
        self._write()

    def forgive(self) -> None:
        """Do not count the image that was begun: the run ended in an orderly way."""
        if self._begun is not None:
            self._counts[self._begun] -= 1
            self._counts = {position: count for position, count in self._counts.items() if count > 0}
            self._begun = None
        self._write()

    def clear(self) -> None:
        """Forget everything, at the start or the end of a stream."""
        self._counts, self._begun = {}, None
        self._write()

    def _write(self) -> None:
        # not synchronised to the disk: it is for a process that dies, not for a machine that loses its power
        if self._counts:
            self.path.write_text(json.dumps(self._counts), encoding="ascii")
        else:
            self.path.unlink(missing_ok=True)


class StreamProgress:
    """A stream from its start to its end, or to where the next run goes on: the one place that decides what is kept.

    After each image its record is written, then the state that belongs to it, so that a process may die at any moment.
    Call :meth:`open`, for each image :meth:`loaded`, :meth:`begin` and :meth:`done`, then :meth:`end` and
    :meth:`close`. An image that is begun is rolled back where :meth:`rolling_back` is left by an error.

    The arguments are those of :class:`mgipt_monai.TestTimeAdaptationHandler`.

    Raises:
        ValueError: at construction, for ``save_every`` or ``attempts`` below 1 or settings that exclude each other.
    """

    def __init__(
        self,
        state_path: str | os.PathLike[str] | None = None,
        record_path: str | os.PathLike[str] | None = None,
        resume: bool = False,
        start_from: str | os.PathLike[str] | None = None,
        save_every: int = 1,
        reset_at_site: bool = False,
        snapshot_every: int = 100,
        snapshots: int = 5,
        identifiers: Identifiers = "names",
        retry_failed: bool = False,
        attempts: int | None = 2,
        key_path: str | os.PathLike[str] | None = None,
    ) -> None:
        if resume and state_path is None:
            raise ValueError("resume needs state_path: the file with the position at which the stream stopped")
        if resume and start_from is not None:
            raise ValueError("resume continues this stream, start_from starts a new one: set only one of them")
        if retry_failed and (not resume or record_path is None):
            raise ValueError("retry_failed needs resume and record_path: the records say which images have failed")
        for name, value in (("save_every", save_every), ("attempts", 1 if attempts is None else attempts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.resume, self.start_from, self.save_every = resume, start_from, save_every
        self.reset_at_site, self.retry_failed, self.attempts = reset_at_site, retry_failed, attempts
        self.records = None if record_path is None else AuditTrail(record_path, identifiers, key_path)
        self._file = None if state_path is None else StreamFile(state_path, snapshot_every, snapshots)
        self._note = None if state_path is None else Attempts(f"{os.fspath(state_path)}.attempt")
        self._held = ExitStack()  # what is held while the stream is open
        self._image = ExitStack()  # the transaction of the current image
        self._folders = WatchedFolders()
        self._position, self._site = 0, None
        self._adaptation: dict[str, Any] = {}  # the state after the latest complete image, copied once per image
        self._names: Sequence[str] = ()  # of the current image's files
        self._alone_until = 0
        self.is_new = True  # nothing of the stream is on the disk yet
        self._wrote = False  # whether an earlier run of this process has records

    @property
    def may_work_ahead(self) -> bool:
        """Whether the next image may be begun before this one is done.

        Not where a process has died: the next death must be put down to the right image.
        """
        return self._position + 1 >= self._alone_until

    def open(self, method: AdaptationMethod, loader: Any, pipeline: dict[str, Any]) -> list[dict[str, Any]]:
        """Begin a new stream, or load the one to resume into a method; return the records of the images done.

        Args:
            method: the method that adapts.
            loader: the loader of the images; one that keeps their order to resume.
            pipeline: plain settings that a resumed stream must share.

        Raises:
            RuntimeError: if another process adapts with the state file.
            ValueError: if the stream cannot be resumed as it is; the message names what differs.
        """
        self._method, self._pipeline = method, pipeline
        try:
            if self._file is not None:
                self._file.acquire()
                self._held.callback(self._file.release)
            kept = [self._file, None if self.records is None else self.records.file]
            self._folders = WatchedFolders(part.path for part in kept if part is not None)
            self._held.callback(self._folders.close)
            self._images = StreamImages(loader, self.records)
            self.is_new = not (self.resume and self._file is not None and self._file.exists())
            return self._begin() if self.is_new else self._continue()
        except BaseException:
            self.close()
            raise

    def rest(self) -> tuple[Iterable[Any], int]:
        """Return the batches that are left of a resumed stream, empty at its end, and the number of those done."""
        return self._images.rest(self._position, self._alone_until)

    def _begin(self) -> list[dict[str, Any]]:
        """Start a new stream; what an earlier one left stays until the first image is loaded."""
        if self._file is not None:
            self._file.start(self._method)
        if self.start_from is not None:
            self._site = StreamFile(self.start_from).load(self._method)["site"]
        if self.records is not None:
            self.records.begin(self._method, 0)
        self._alone_until = 0
        self._remember(0)
        return []

    def _continue(self) -> list[dict[str, Any]]:
        """Go on with a stream; return the records of the images done."""
        assert self._file is not None
        assert self._note is not None
        content = self._file.load(self._method, self._pipeline)
        position, rows, images = content["position"], [], self._images
        images.loader()
        if "postponed" in content:
            images.postpone(content["postponed"]["images"], content["postponed"]["base"])
        if self.records is not None:
            # killed between the two, the state says that failed images are postponed and the records do not yet
            rows = self.records.keep(position, failed=position > images.base or not images.postponed)
            images.check(rows, position)
        images.check([], position)
        self._site = content["site"]
        self._note.read()
        self._remember(position)
        if self.retry_failed and (failed := images.postpone_failed(rows)):
            before = position
            position -= len(failed)
            self._file.renumber(lambda at: at - sum(one < at for one in failed))
            self._note.move(before, position)
            self._remember(position)
            self._save()
            assert self.records is not None
            rows = self.records.keep(position, failed=False)
            logger.info("%d failed images are taken again at the end of the stream", len(failed))
        if self.records is not None:
            self.records.begin(self._method, position)
        rows += self._pass_over()
        latest = self._note.latest
        self._alone_until = 0 if latest is None else latest + 1 + images.ahead()
        return rows

    def _pass_over(self) -> list[dict[str, Any]]:
        """Record the next image as failed if the process has died at it too often."""
        assert self._note is not None
        deaths = self._note.count(self._position)
        if self.attempts is None or deaths < self.attempts or self._position >= self._images.count():
            return []
        rows = self._images.failures(self._position, deaths)
        self._write(rows)
        site = rows[-1]["site"] or self._site
        if self.reset_at_site and self._site is not None and site != self._site:
            self._method.reset()
        self._site = site
        self._remember(self._position + len(rows))
        self._save()
        self._note.clear()
        return rows

    def loaded(self) -> None:
        """Note that the next image is about to be loaded, at which the process may die."""
        if self._note is not None:
            self._folders.check()
            self._note.begin(self._position)

    def begin(self, batch: Any) -> None:
        """Begin with the images of a batch: what they do to the method is undone unless :meth:`done` is called.

        Raises:
            ValueError: if the stream resets the method at a new site, and the batch has no site or several.
        """
        self._names = file_names(batch)
        site = site_of(batch, self.reset_at_site)
        if self.is_new:
            self._replace_files()
        is_new_site = self._site is not None and site != self._site
        if is_new_site and self._file is not None:
            self._file.snapshot(self._state(), always=True)
        self._image.enter_context(self._at(site))
        if is_new_site and self.reset_at_site:
            # a failed image rolls back to this state, so the reset stays
            self._method.reset()
            self._adaptation = self._method.adaptation_state()
        self._image.enter_context(self._method.transaction(self._adaptation))

    def done(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the records of the images of a batch, and the state after them."""
        self._folders.check()
        self._write([self._named(row, place) for place, row in enumerate(rows)])
        self._wrote = True
        self._image.close()
        before = self._position
        self._remember(before + len(rows))
        if self._file is not None:
            self._file.snapshot(self._state())
        # near an image at which the process died, none that is done may be lost
        every = 1 if before < self._alone_until else self.save_every
        if self._position // every > before // every:
            self._save()

    @contextmanager
    def rolling_back(self) -> Iterator[None]:
        """Undo an image that is begun if the block raises."""
        with self._image:
            yield

    def end(self, error: BaseException | None = None) -> None:
        """Save the state after the latest complete image, and forget the noted attempts.

        Args:
            error: what ended the stream early; a full disk does not hide it behind a second one.
        """
        try:
            if error is not None:
                at = f", at {', '.join(self._names)}" if self._names else ""
                # the error itself is told by whoever runs the stream
                logger.error("the stream stopped after %d images%s", self._position, at)
            if not self.is_new:  # a new stream without an image leaves the files of an earlier one
                self._folders.check()
                if not self._saved:
                    self._save()
        except Exception as second:
            if error is None:
                raise
            logger.error("the state could not be saved: %s", root_cause(second))
        if self._note is None:
            return
        if error is None:
            self._note.clear()
        elif not out_of_memory(error):
            with suppress(OSError):
                self._note.forgive()

    def close(self) -> None:
        """Release the state file and the folders."""
        self._held.close()

    def _replace_files(self) -> None:
        """Take the place of an earlier stream: its state first, so that this one can be resumed at any moment."""
        self._folders.check()
        self._save()
        if self.records is not None:
            if self._wrote:  # an evaluator that runs a second time goes on adapting, in files of its own
                self.records.set_aside()
            self.records.keep(0)
        self.is_new = False

    @contextmanager
    def _at(self, site: Any) -> Iterator[None]:
        """Enter a site; if the run ends during this image, undo it."""
        before, adaptation, self._site = self._site, self._adaptation, site
        try:
            yield
        except BaseException:
            self._site, self._adaptation = before, adaptation
            self._method.load_adaptation_state(adaptation)
            raise

    def _named(self, row: dict[str, Any], place: int) -> dict[str, Any]:
        """Return a record with its image's file, where the pipeline has lost the name."""
        if row["name"]:
            return row
        file = self._names[place] if place < len(self._names) else self._images.file(self._position + place)
        return {**row, "name": file or str(row.get("index", self._position + place))}

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Log and record the images from the current position on."""
        for position, row in enumerate(rows, start=self._position):
            level = logging.INFO if row["status"] == "ok" else logging.ERROR
            logger.log(level, "image %d: %s", position + 1, in_words(row))
            if self.records is not None:
                named = {**row, **self._images.source(position)}
                self.records.append(named, [*self._names, *self._images.names(position)])

    def _remember(self, position: int) -> None:
        """Remember the state after a complete image, the only one that is saved or restored."""
        self._position, self._adaptation, self._names = position, self._method.adaptation_state(), ()
        self._saved = False

    def _state(self) -> dict[str, Any]:
        state = {"adaptation": self._adaptation, "position": self._position, "site": self._site}
        images = self._images
        if images.postponed:
            state["postponed"] = {"base": images.base, "images": images.postponed}
        return {**state, "pipeline": self._pipeline}

    def _save(self) -> None:
        if self._file is not None:
            self._file.save(self._method, self._state())
            self._saved = True
