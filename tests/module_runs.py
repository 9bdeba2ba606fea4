# SPDX-License-Identifier: Apache-2.0
"""Runs of ``python -m MODULE`` that need not load torch and MONAI each time, which would take most of their time."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pty
import runpy
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
# several runs at once on few cores: more threads only wait for each other
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
# a process of its own that loads them once, and of which each run is a fork
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["tests.module_runs", "fire", "monai.bundle", "monai.engines", "monai.handlers", "mgipt_monai"]
)


def run_module(module: str, arguments: Sequence[str], timeout: float = 300) -> subprocess.CompletedProcess:
    """Do what ``python -m module arguments`` does in the project's root; return its exit status and output."""
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("out", "err")]
        process = SERVER.Process(target=_main, args=(module, list(arguments), files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(["python", "-m", module, *arguments], timeout)
        out, err = (Path(file).read_text(errors="backslashreplace") if os.path.exists(file) else "" for file in files)
    return subprocess.CompletedProcess(["python", "-m", module, *arguments], process.exitcode, out, err)


def run_in_terminal(module: str, arguments: Sequence[str], timeout: float = 300) -> tuple[int, str]:
    """Do what ``python -m module arguments`` does in a terminal of 200 columns; return its exit status and text."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the last one has closed the terminal
            while text := os.read(master, 4096):
                shown.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    process = SERVER.Process(target=_main, args=(module, list(arguments), [os.ttyname(slave)] * 2))
    process.start()
    process.join(timeout)
    process.kill()
    os.close(slave)
    reader.join(10)
    os.close(master)
    return process.exitcode, b"".join(shown).decode(errors="replace")


def _main(module: str, arguments: list[str], files: list[str]) -> None:
    import torch

    # what `python -m` has, and not the way that this process was started itself
    multiprocessing.set_start_method(None, force=True)
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
