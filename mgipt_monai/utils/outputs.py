# SPDX-License-Identifier: Apache-2.0
"""Folders that runs write to: no path leaves them, and no file is overwritten that no run wrote."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mgipt_monai.utils.files import atomic_path, clear_parts, load_state
from mgipt_monai.utils.machine import MachineFailureError

__all__ = [
    "MANIFEST",
    "OutputFolder",
    "WatchedFolders",
    "check_apart",
    "check_output_name",
    "normal_name",
    "output_file",
]

MANIFEST = ".mgipt_written"
"""File in an output folder that lists what runs wrote there."""

LONGEST = 255  # bytes of a file name
OWN_ENDINGS = (".pt", ".json", ".jsonl", ".csv", ".html", ".key", ".lock", ".md", ".sha256", ".attempt")
"""Endings of the files that a run keeps beside the masks, which no folder of a mask may have."""


class OutputFolder:
    """A folder that runs write to. Every output path is made here, and only what runs wrote is overwritten.

    ``.mgipt_written`` in the folder lists what runs wrote there: the fingerprint (SHA-256) of the name and content of
    each file, or the name itself for files with fixed names (see :meth:`claim`). It holds no image's name. A file that
    is not listed, or was changed since, is never overwritten.

    Args:
        path: the folder; it is created with the first file.
        durable: whether each file and its entry in the list outlive a loss of power as soon as they are written.

    Example:
        >>> import tempfile
        >>> folder = OutputFolder(tempfile.mkdtemp())
        >>> for text in ("first", "second"):
        ...     with folder.writing("clinic/eye.txt") as part:
        ...         _ = part.write_text(text)
        >>> folder.file("clinic/eye.txt").read_text()
        'second'
        >>> folder.file("../eye.txt")
        Traceback (most recent call last):
        ValueError: the name '../eye.txt' leaves its folder: remove the .. in it
    """

    def __init__(self, path: str | os.PathLike[str], durable: bool = True) -> None:
        self.path, self.durable = Path(path), durable
        self._entries: set[str] = set()
        self._prepared: tuple[int, int] | None = None

    def prepare(self) -> None:
        """Create the folder, check that it is writable, and clear what killed runs left half-written.

        Raises:
            OSError: if it cannot be created or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            test = self.path / f".write_test-{os.getpid()}"
            with atomic_path(test) as part:
                part.touch()
            test.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(
                f"cannot write to the output folder {self.path} ({error.strerror}): choose another output_dir"
            ) from error
        self._prepared = _identity(self.path)
        clear_parts(self.path)

    def file(self, name: str) -> Path:
        """Return the path of a file in the folder.

        Raises:
            ValueError: if the name is not that of a file below the folder, or a link leads elsewhere.
        """
        check_output_name(name)
        path = self.path / name
        wanted, real = self.path.resolve() / Path(name).parent, path.parent.resolve()
        if wanted != real:
            raise ValueError(f"{path} would be written to {real}, through a link: remove the link below {self.path}")
        return path

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a path to write to, which becomes the file ``name`` only if the block ends without an error.

        On Linux the path leads through an open folder, so that nothing is written elsewhere even if somebody exchanges
        a folder for a link meanwhile. Other systems are checked a second time before the file gets its name.

        Raises:
            FileExistsError: if a file stands there that no run wrote.
            MachineFailureError: if the output folder was replaced since :meth:`prepare`.
            ValueError: as :meth:`file`.
        """
        path = self.file(name)
        self.check(name)
        with self._opened(path.parent) as folder:
            try:
                with atomic_path(folder / path.name) as part:
                    yield part
                    if self.durable:
                        with part.open("r+b") as file:  # before the list and the states that refer to it
                            os.fsync(file.fileno())
                    if name not in self._entries:
                        self._add([_fingerprint(name, part)])
                    self.file(name)
                    self._check_same()
            except OSError as error:
                if isinstance(error.filename, (str, Path)) and folder in Path(error.filename).parents:
                    error.filename = str(path)  # not one that leads through an open folder
                raise

    @contextmanager
    def _opened(self, below: Path) -> Iterator[Path]:
        """Create this folder or one below it, and yield a path that leads there whatever becomes of its name."""
        if not os.path.isdir(OPEN_FILES):
            yield below
            return
        if self._prepared is None:
            self.path.mkdir(parents=True, exist_ok=True)
        self._check_same()
        with ExitStack() as stack:
            descriptor = _open_folder(stack, self.path)
            self._check_same(descriptor)
            for part in below.relative_to(self.path).parts:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
                try:
                    descriptor = _open_folder(stack, part, os.O_NOFOLLOW, descriptor)
                except NotADirectoryError:
                    raise ValueError(f"{below} lies behind a link or a file: remove it below {self.path}") from None
            yield Path(OPEN_FILES, str(descriptor))

    def _check_same(self, descriptor: int | None = None) -> None:
        """Raise MachineFailureError if another folder has the name of the one that was prepared."""
        found = _identity(self.path if descriptor is None else descriptor)
        if self._prepared is not None and found != self._prepared:
            raise MachineFailureError(
                f"the folder {self.path} was removed or replaced during the run: put it back and resume, or start again"
            )

    def check(self, name: str) -> None:
        """Raise FileExistsError if a file stands at ``name`` that no run wrote."""
        path = self.file(name)
        if not os.path.lexists(path):
            return
        if path.is_file() and not path.is_symlink():
            fingerprint = _fingerprint(name, path)
            for _ in range(2):  # a process beside this one may have written it since the list was read
                if name in self._entries or fingerprint in self._entries:
                    return
                self._read()
        raise FileExistsError(
            f"{path} was not written by a run, or was changed since: it is not overwritten; move it away, or choose "
            "another output_dir"
        )

    def claim(self, *names: str) -> None:
        """List files of fixed names, which a run rewrites or appends to, as the runs' own.

        Raises:
            FileExistsError: if one of them stands there and no run wrote it.
            ValueError: as :meth:`file`.
        """
        self._read()
        for name in names:
            # folders of versions before 0.3 have no list
            path = self.file(name)
            if path.is_symlink() or not (name in self._entries or _is_of_older_run(path.parent)):
                self.check(name)
        self._add(names)

    def _read(self) -> None:
        with suppress(FileNotFoundError):
            lines = (self.path / MANIFEST).read_bytes().split(b"\n")
            self._entries |= {os.fsdecode(line) for line in lines[:-1]}

    def _add(self, entries: Iterable[str]) -> None:
        entries = [entry for entry in entries if entry not in self._entries]
        if not entries:
            return
        path = self.path / MANIFEST
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise FileExistsError(f"{path} is a link, which no run makes: remove it, or choose another output_dir")
        text = b"".join(os.fsencode(entry) + b"\n" for entry in entries)
        with self._opened(self.path) as folder, open(folder / MANIFEST, "a+b", opener=_follow_no_link) as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = (b"" if file.read(1) == b"\n" else b"\n") + text  # after a line that a full disk cut off
            file.write(text)
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        self._entries |= set(entries)


OPEN_FILES = "/proc/self/fd"
"""Folder of the files that are open in this process, on systems that have one which leads into open folders."""


def _open_folder(stack: ExitStack, path: str | os.PathLike[str], flags: int = 0, beside: int | None = None) -> int:
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | flags, dir_fd=beside)
    stack.callback(os.close, descriptor)
    return descriptor


def _follow_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _fingerprint(name: str, path: Path) -> str:
    digest = hashlib.sha256(os.fsencode(Path(name)) + b"\0")
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_of_older_run(folder: Path) -> bool:
    for name, key in (("adaptation_state.pt", "schema"), ("training.pt", "trainer")):
        with suppress(FileNotFoundError, ValueError):
            if key in load_state(folder / name):
                return True
    with suppress(OSError, ValueError, AttributeError):
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return results.get("schema") == "mgipt_monai.results"
    return False


def output_file(path: str | os.PathLike[str]) -> tuple[OutputFolder, str]:
    """Return the folder of one file of a fixed name, and that name, as the runs' own.

    Raises:
        FileExistsError: if a file stands there that no run wrote.
    """
    whole = Path(os.path.abspath(path))
    folder = OutputFolder(whole.parent)
    folder.claim(whole.name)
    return folder, whole.name


class WatchedFolders:
    """Folders that must stay the same ones.

    Args:
        files: files in these folders; a folder is created if there is none.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._descriptors: dict[Path, int] = {}
        for folder in dict.fromkeys(file.parent for file in files):
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # a folder cannot be opened on every system
                # held open, so that the system gives its number to no other folder
                self._descriptors[folder] = os.open(folder, os.O_RDONLY)

    def check(self) -> None:
        """Raise MachineFailureError if a folder was removed, moved or replaced."""
        for folder, descriptor in self._descriptors.items():
            found = False
            with suppress(OSError):
                found = os.path.samestat(os.fstat(descriptor), os.stat(folder))
            if not found:
                raise MachineFailureError(
                    f"the folder {folder} was removed or replaced during the run, with all that was written there: put "
                    "it back and resume, or start again"
                )

    def close(self) -> None:
        """Watch no more."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}


def check_output_name(name: Any, ending: str = "") -> None:
    """Raise ValueError unless ``name`` (with an ``ending`` to be added) is that of a file below a folder.

    Example:
        >>> check_output_name("clinic/eye_007")
        >>> check_output_name(7)
        Traceback (most recent call last):
        ValueError: the name 7 is no text: write "7"
    """
    if not isinstance(name, str):
        raise ValueError(f'the name {name!r} is no text: write "{name}"')
    parts = re.split(r"[/\\]", name)
    if ".." in parts:
        raise ValueError(f"the name {name!r} leaves its folder: remove the .. in it")
    if Path(name).is_absolute() or Path(name).anchor:
        raise ValueError(f"the name {name!r} is an absolute path: give it relative to the output folder")
    if not name.strip() or parts[-1] in ("", ".") or "\0" in name:
        raise ValueError(f"the name {name!r} is not that of a file: write one such as site/image")
    if any(len(os.fsencode(part)) > LONGEST for part in [*parts, parts[-1] + ending]):
        raise ValueError(f"the name {name[:40]!r}... is longer than the {LONGEST} bytes of a file name: shorten it")
    for part in parts:
        if part.startswith((".part-", MANIFEST)) or (part is not parts[-1] and part.lower().endswith(OWN_ENDINGS)):
            raise ValueError(f"the name {name!r} has {part!r} in it, which a run needs for its own files: rename it")


def normal_name(name: str) -> str:
    """Return the same text for names that some system takes as the same: ``x//y`` and ``X/y``.

    Example:
        >>> normal_name("x//Y"), normal_name("./x/y")
        ('x/y', 'x/y')
    """
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", "/".join(parts)).casefold())


def check_apart(output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raise ValueError if an output folder is a folder of inputs, or lies in one, or holds one, also through links."""
    out = Path(output).resolve()
    above = _identities(out)
    own = _identity(out)
    for folder in dict.fromkeys(os.fspath(path) for path in inputs):
        there = Path(folder).resolve()
        identity = _identity(there)
        if identity in above or (own is not None and own in _identities(there)):
            where = "is" if own == identity else "lies in" if identity in above else "holds"
            raise ValueError(
                f"the output folder {output} {where} the folder {folder} of the images, which could be overwritten or "
                "taken for images later: choose a folder beside it"
            )


def _identities(path: Path) -> set[tuple[int, int]]:
    found = map(_identity, (path, *path.parents))
    return {identity for identity in found if identity is not None}


def _identity(path: Path | int) -> tuple[int, int] | None:
    """Return what is the same for two names of one folder, also where capitals make no difference."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
