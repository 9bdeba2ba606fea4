# SPDX-License-Identifier: Apache-2.0
"""Processes that die, disks that fill, folders that vanish: nothing is lost, and nothing is silently wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.transforms import Compose, Lambdad, LoadImaged, Resized, ScaleIntensityd
from PIL import Image

from mgipt_monai import MGIPT, PersistentInferer, RecordFile, StreamFailedError, load_state
from mgipt_monai.data import PhotographReader
from mgipt_monai.engines import MachineFailureError
from mgipt_monai.handlers import WorkAheadHandler
from mgipt_monai.stream import command
from mgipt_monai.stream.state_file import read
from tests.attack.faults import DIED, Step, build, exit_at_line, in_child, items
from tests.bundle.conftest import BUNDLE, CONFIGS, ONE_THREAD, QUICK, ROOT, run_bundle
from tests.conftest import same_state, stream, tiny_network, without_times

OWN = ("adaptation.py", "progress.py", "images.py", "records.py", "state_file.py", "files.py", "inferers.py")


def run(folder: Path, data: list[dict], ahead: bool = False, **settings) -> MGIPT:
    """A run over a stream, whether images fail or not."""
    method, evaluator = build(folder, data, **settings)
    if ahead:
        WorkAheadHandler().attach(evaluator)
    with suppress(StreamFailedError):
        evaluator.run()
    return method


def small() -> MGIPT:
    return MGIPT(tiny_network(), steps=1, instance_sizes=(1,), global_sizes=(3,))


def rows(folder: Path) -> list[dict]:
    return RecordFile(folder / "records.jsonl").read()


def assert_same_end(folder: Path, other: Path) -> None:
    """Two streams have come to the same end, whatever happened on the way."""
    assert without_times(folder / "records.jsonl") == without_times(other / "records.jsonl")
    ends = [read(each / "state.pt") for each in (folder, other)]
    assert same_state(ends[0]["adaptation"], ends[1]["adaptation"])
    assert ends[0]["position"] == ends[1]["position"]


# an image at which the process dies


class DyingAt:
    """A transform that ends the process at one image."""

    def __init__(self, name: str, how: Callable[[], None] = lambda: os._exit(DIED)) -> None:
        self.name, self.how = name, how

    def __call__(self, item: dict) -> dict:
        if item["name"] == self.name:
            self.how()
        return dict(item)


@pytest.mark.parametrize("save_every", [1, 4])
def test_image_at_which_the_process_died_twice_is_passed_over_and_may_be_retried(
    tmp_path: Path, save_every: int
) -> None:
    data = items(6)
    for _ in range(2 if save_every == 1 else 3):
        status = in_child(lambda: run(tmp_path / "a", data, transform=DyingAt("3"), resume=True, save_every=save_every))
        if status == 0:
            break
        assert status == DIED
    run(tmp_path / "a", data, transform=DyingAt("3"), resume=True, save_every=save_every)
    found = rows(tmp_path / "a")
    assert [row["name"] for row in found] == list("012345")
    assert [row["status"] for row in found] == ["ok"] * 3 + ["failed"] + ["ok"] * 2
    assert "the process ended 2 times at this image, so it is passed over: was it out of memory" in found[3]["reason"]
    assert not (tmp_path / "a" / "state.pt.attempt").exists()
    # as if it had never been there
    without = run(tmp_path / "b", [item for item in data if item["name"] != "3"])
    assert same_state(read(tmp_path / "a" / "state.pt")["adaptation"], without.adaptation_state())

    _, evaluator = build(tmp_path / "a", data, resume=True, retry_failed=True)
    evaluator.run()
    found = rows(tmp_path / "a")
    assert [(row["name"], row["status"]) for row in found] == [(name, "ok") for name in "012453"]
    assert evaluator.state.summary.figures()["all"]["images"] == 6
    assert evaluator.state.summary.figures()["all"]["failed"] == 0
    run(tmp_path / "c", [data[int(name)] for name in "012453"])
    assert_same_end(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(("workers", "ahead"), [(2, False), (0, True)], ids=["worker processes", "work ahead"])
def test_death_while_images_are_loaded_ahead_is_put_down_to_the_right_one(
    tmp_path: Path, workers: int, ahead: bool
) -> None:
    data = items(9)
    for _starts in range(1, 16):
        settings = {"transform": DyingAt("5"), "workers": workers, "ahead": ahead, "resume": True}
        if in_child(lambda settings=settings: run(tmp_path, data, **settings)) == 0:
            break
    assert [row["name"] for row in rows(tmp_path) if row["status"] == "failed"] == ["5"]
    assert len(rows(tmp_path)) == 9
    assert _starts <= 9


def test_orderly_ends_are_not_counted(tmp_path: Path) -> None:
    data = items(3)

    def interrupt() -> None:
        raise KeyboardInterrupt

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, data, transform=DyingAt("1", interrupt), resume=True)
        assert not (tmp_path / "state.pt.attempt").exists()
    run(tmp_path, data, resume=True)
    assert [row["status"] for row in rows(tmp_path)] == ["ok"] * 3


def test_image_is_tried_for_ever_on_request_and_a_new_stream_begins_with_none(tmp_path: Path) -> None:
    data = items(3)
    for _ in range(4):
        assert in_child(lambda: run(tmp_path, data, transform=DyingAt("1"), resume=True, attempts=None)) == DIED
    (tmp_path / "state.pt.attempt").write_text("[[[" * 10_000)  # a damaged note counts as none
    run(tmp_path, data, resume=True, attempts=1)
    assert [row["status"] for row in rows(tmp_path)] == ["ok"] * 3
    with pytest.raises(ValueError, match="attempts must be at least 1, got 0"):
        build(tmp_path, data, attempts=0)


def test_bundle_passes_over_an_image_that_kills_it(tmp_path: Path, demo_sites: Path) -> None:
    overlay = tmp_path / "dies.yaml"
    overlay.write_text(
        '"+preprocessing#transforms":\n  - {_target_: tests.attack.faults.ExitAt, keys: image, name: eye_001}\n'
    )
    settings = {"dataset_dir": demo_sites, "sites": "['cold_noisy']", "output_dir": tmp_path / "out", **QUICK}
    for _ in range(2):
        done = run_bundle([CONFIGS / "inference.yaml", overlay], check=False, resume=True, **settings)
        assert done.returncode == DIED
    done = run_bundle([CONFIGS / "inference.yaml", overlay], check=False, resume=True, **settings)
    assert "1 of 3 images failed, the others are done" in done.stderr
    assert {path.name for path in (tmp_path / "out").rglob("*.png")} == {"eye_000.png", "eye_002.png"}


# failures of the machine


def oom() -> Exception:
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


FAILURES: dict[str, Callable[[], Exception]] = {
    "no space": lambda: OSError(errno.ENOSPC, "No space left on device", "out/eye.png"),
    "quota": lambda: OSError(errno.EDQUOT, "Disk quota exceeded"),
    "input/output": lambda: OSError(errno.EIO, "Input/output error"),
    "read-only": lambda: OSError(errno.EROFS, "Read-only file system"),
    "not allowed": lambda: PermissionError(errno.EACCES, "Permission denied"),
    "too many files": lambda: OSError(errno.EMFILE, "Too many open files"),
    "memory": lambda: MemoryError("Unable to allocate 9 GiB"),
    "torch": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "device": oom,
    "broken device": lambda: RuntimeError("CUDA error: unspecified launch failure"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_of_the_machine_stops_the_stream_which_is_resumed_as_if_nothing_had_been(
    tmp_path: Path, failure: str
) -> None:
    data = items(4)
    whole = run(tmp_path / "whole", data)
    method, evaluator = build(tmp_path / "parts", data, postprocessing=Step(_raise_third(FAILURES[failure])))
    with pytest.raises(MachineFailureError, match=r"at 2: .*The machine failed, not the image, so it is not recorded"):
        evaluator.run()
    assert [row["status"] for row in rows(tmp_path / "parts")] == ["ok", "ok"]
    assert read(tmp_path / "parts" / "state.pt")["position"] == method.images_seen == 2
    again = run(tmp_path / "parts", data, resume=True)
    assert same_state(again.adaptation_state(), whole.adaptation_state())
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def _raise_third(error: Callable[[], Exception]) -> Callable[[dict], dict]:
    calls = []

    def write(output: dict) -> dict:
        calls.append(1)
        if len(calls) == 3:
            try:
                raise error()
            except Exception as cause:
                raise RuntimeError("applying transform") from cause  # as MONAI does
        return output

    return write


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "stops"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (MemoryError(), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (PermissionError(errno.EACCES, "Permission denied", "in/eye.png"), False),
        (OSError("image file is truncated"), False),
    ],
)
def test_while_loading_only_what_concerns_the_file_is_the_images_failure(
    tmp_path: Path, error: Exception, stops: bool, workers: int
) -> None:
    def fail() -> None:
        raise error

    _, evaluator = build(tmp_path, items(3), transform=DyingAt("1", fail), workers=workers)
    with pytest.raises(MachineFailureError if stops else StreamFailedError):
        evaluator.run()
    assert [row["status"] for row in rows(tmp_path)] == (["ok"] if stops else ["ok", "failed", "ok"])


class BadDisk:
    """Opens files as ``open`` does, but some give an I/O error behind their first bytes, as a bad sector does.

    Args:
        monkeypatch: takes the place of ``open``.
        bad: names of the files, and how often reading them fails.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad: dict[str, int]) -> None:
        self.left, self.open = bad, open
        monkeypatch.setattr("builtins.open", self)

    def __call__(self, path: object, *args: object, **kwargs: object) -> IO:
        file = self.open(path, *args, **kwargs)
        name = Path(path).name if isinstance(path, (str, os.PathLike)) else ""
        return _BadFile(file, self, name) if name in self.left else file


class _BadFile(io.BufferedIOBase):
    def __init__(self, file: IO, disk: BadDisk, name: str) -> None:
        self.file, self.disk, self.name = file, disk, name

    def read(self, size: int = -1) -> bytes:
        if self.disk.left[self.name] > 0 and (size < 0 or self.file.tell() + size > 600):
            self.disk.left[self.name] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return self.file.read(size)

    def seek(self, *place: int) -> int:
        return self.file.seek(*place)

    def tell(self) -> int:
        return self.file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()


def photographs(folder: Path, count: int) -> list[dict]:
    """Items of photographs of noise, each larger than what is read of a header."""
    folder.mkdir()
    found = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        found.append({"image": str(folder / f"{number}.png"), "name": f"{number}", "site": "A"})
    return found


READ = Compose([LoadImaged("image", PhotographReader, ensure_channel_first=True), ScaleIntensityd("image")])
FOR_EVER = 10**6


def test_one_bad_sector_fails_its_image_alone_which_may_be_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = photographs(tmp_path / "in", 4)
    with monkeypatch.context() as patch:
        BadDisk(patch, {"1.png": FOR_EVER})
        run(tmp_path / "out", data, transform=READ)
    assert [row["status"] for row in rows(tmp_path / "out")] == ["ok", "failed", "ok", "ok"]
    assert rows(tmp_path / "out")[1]["kind"] == "unreadable"
    assert "1.png: gives an I/O error where it is read" in rows(tmp_path / "out")[1]["reason"]
    run(tmp_path / "out", data, transform=READ, resume=True, retry_failed=True)
    assert [(row["name"], row["status"]) for row in rows(tmp_path / "out")] == [(name, "ok") for name in "0231"]
    run(tmp_path / "whole", [data[index] for index in (0, 2, 3, 1)], transform=READ)
    ends = [rows(tmp_path / name) for name in ("out", "whole")]
    assert [row["loss_after"] for row in ends[0]] == [row["loss_after"] for row in ends[1]]


def test_io_error_that_goes_away_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = photographs(tmp_path / "in", 3)
    run(tmp_path / "whole", data, transform=READ)
    # once where the pixels are read, which MONAI hides in an error of its own, and once where that is looked into
    BadDisk(monkeypatch, {"1.png": 2})
    run(tmp_path / "out", data, transform=READ)
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_three_unreadable_images_in_a_row_stop_the_stream_and_two_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = photographs(tmp_path / "in", 8)
    bad = ["1.png", "2.png", "4.png", "5.png", "6.png", "7.png"]
    with monkeypatch.context() as patch:
        BadDisk(patch, dict.fromkeys(bad, FOR_EVER))
        _, evaluator = build(tmp_path / "out", data, transform=READ)
        with pytest.raises(MachineFailureError, match=r"at 6: 3 images in a row give I/O errors: is the disk"):
            evaluator.run()
    assert [row["status"] for row in rows(tmp_path / "out")] == ["ok", "failed", "failed", "ok", "failed", "failed"]
    run(tmp_path / "out", data, transform=READ, resume=True, retry_failed=True)
    assert [row["name"] for row in rows(tmp_path / "out")] == list("03671245")
    assert {row["status"] for row in rows(tmp_path / "out")} == {"ok"}


def test_images_with_a_key_of_the_same_name_are_not_taken_as_unreadable(tmp_path: Path) -> None:
    data = [{**item, "kind": "OCT"} for item in photographs(tmp_path / "in", 4)]
    run(tmp_path / "out", data, transform=READ)
    assert [(row["status"], "kind" in row) for row in rows(tmp_path / "out")] == [("ok", False)] * 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_pipe_under_the_name_of_an_image_is_not_waited_for(tmp_path: Path) -> None:
    data = photographs(tmp_path / "in", 2)
    (tmp_path / "in" / "0.png").unlink()
    os.mkfifo(tmp_path / "in" / "0.png")
    run(tmp_path / "out", data, transform=READ)
    assert [row["status"] for row in rows(tmp_path / "out")] == ["failed", "ok"]


def test_io_error_of_another_file_than_the_image_stops_the_stream(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error", str(tmp_path / "cache" / "1.pt"))

    _, evaluator = build(tmp_path / "out", photographs(tmp_path / "in", 3), Compose([READ, DyingAt("1", fail)]))
    with pytest.raises(MachineFailureError, match=r"at 1: Input/output error: .*1\.pt"):
        evaluator.run()
    assert [row["status"] for row in rows(tmp_path / "out")] == ["ok"]


def test_image_for_which_there_is_never_enough_memory_is_passed_over(tmp_path: Path) -> None:
    data = items(3)

    def fail() -> None:
        raise MemoryError

    for _ in range(2):
        with pytest.raises(MachineFailureError, match="at 1: out of memory"):
            build(tmp_path, data, transform=DyingAt("1", fail), resume=True)[1].run()
    run(tmp_path, data, transform=DyingAt("1", fail), resume=True)
    assert [row["status"] for row in rows(tmp_path)] == ["ok", "failed", "ok"]


@pytest.mark.parametrize("where", ["records", "state"])
def test_full_disk_in_the_midst_of_a_record_or_a_state_leaves_a_stream_to_resume(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = items(4)
    run(tmp_path / "whole", data)
    _, evaluator = build(tmp_path / "parts", data)
    own = evaluator.inferer
    left = [3]

    def full(*_: object) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    if where == "records":
        evaluator.add_event_handler(Events.ITERATION_STARTED, lambda: full())
        monkeypatch.setattr(RecordFile, "append", _torn(RecordFile.append, left))
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        evaluator.run()
    monkeypatch.undo()
    assert evaluator.inferer is own
    run(tmp_path / "parts", data, resume=True)
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def _torn(append: Callable, left: list[int]) -> Callable:
    """Write half a line once the disk is full."""

    def write(self: RecordFile, row: dict) -> None:
        if left[0] > 1:
            append(self, row)
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row)[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    return write


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 96 kB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_that_is_really_full_and_then_is_not(tmp_path: Path, small_disk: Path) -> None:
    data = items(12)
    run(tmp_path / "whole", data)

    def write(output: dict) -> dict:
        (small_disk / f"mask_{time.monotonic_ns()}").write_bytes(bytes(8000))
        return output

    with pytest.raises(Exception, match="No space left"):
        build(small_disk / "out", data, postprocessing=Step(write))[1].run()
    for path in small_disk.glob("mask_*"):
        path.unlink()
    assert 0 < len(rows(small_disk / "out")) < 12
    assert {row["status"] for row in rows(small_disk / "out")} == {"ok"}
    run(small_disk / "out", data, resume=True)
    assert_same_end(small_disk / "out", tmp_path / "whole")


# images that failed are taken again


def test_failed_images_come_again_at_the_end_and_each_image_has_one_record(tmp_path: Path) -> None:
    data = items(6, sites="AB")
    broken = [{**item, "pixels": torch.full((3, 24, 24), torch.nan)} if item["name"] in "14" else item for item in data]
    run(tmp_path / "a", broken)
    # the one is repaired, the other is not
    mended = [*broken]
    mended[1] = data[1]
    run(tmp_path / "a", mended, resume=True, retry_failed=True)
    assert [(row["name"], row["status"]) for row in rows(tmp_path / "a")] == [
        ("0", "ok"), ("2", "ok"), ("3", "ok"), ("5", "ok"), ("1", "ok"), ("4", "failed"),
    ]  # fmt: skip
    run(tmp_path / "a", data, resume=True, retry_failed=True)
    assert [row["name"] for row in rows(tmp_path / "a")] == list("023514")
    run(tmp_path / "b", [data[int(name)] for name in "023514"])
    assert_same_end(tmp_path / "a", tmp_path / "b")
    # nothing is left to do
    run(tmp_path / "a", data, resume=True, retry_failed=True)
    assert_same_end(tmp_path / "a", tmp_path / "b")
    for settings in ({"retry_failed": True}, {"retry_failed": True, "resume": True, "record": None}):
        with pytest.raises(ValueError, match="retry_failed needs resume and record_path"):
            _handler(tmp_path, **settings)


def _handler(folder: Path, record: str | None = "records.jsonl", **settings) -> None:
    from mgipt_monai import TestTimeAdaptationHandler

    TestTimeAdaptationHandler(None, folder / "state.pt", None if record is None else folder / record, **settings)


def test_bundle_takes_failed_images_again(tmp_path: Path, demo_sites: Path) -> None:
    source = Path(shutil.copytree(demo_sites / "cold_noisy" / "images", tmp_path / "in"))
    whole = (source / "eye_000.png").read_bytes()
    (source / "eye_000.png").write_bytes(whole[:200])
    settings = {"dataset_dir": source, "output_dir": tmp_path / "out", **QUICK}
    assert run_bundle([CONFIGS / "inference.yaml"], check=False, **settings).returncode
    (source / "eye_000.png").write_bytes(whole)
    run_bundle([CONFIGS / "inference.yaml"], resume=True, retry_failed=True, **settings)
    assert [row["name"] for row in rows(tmp_path / "out")] == ["eye_001", "eye_002", "eye_000"]
    assert (tmp_path / "out" / "eye_000.png").is_file()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["all"]["images"] == 3


# kills at every line of what reads and writes


def _killed_at(lines: int, work: Callable[[], None]) -> int:
    def do() -> None:
        exit_at_line(lines, OWN)
        work()
        sys.settrace(None)

    return in_child(do)


def _kill_everywhere(tmp_path: Path, every: int, before: Callable[[Path], None], work: Callable[[Path], None]) -> int:
    """Kill the work at each ``every``-th line, do it again, and compare with what it gives without."""
    before(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    work(tmp_path / "whole")
    for kills in range(10_000):
        folder = tmp_path / f"{kills}"
        shutil.copytree(tmp_path / "before", folder)
        status = _killed_at(1 + kills * every, lambda folder=folder: work(folder))
        work(folder)
        assert_same_end(folder, tmp_path / "whole")
        shutil.rmtree(folder)
        if status == 0:
            return kills
    raise AssertionError("it does not end")


@pytest.mark.parametrize("every", [61, pytest.param(5, marks=pytest.mark.slow)])
def test_stream_killed_at_any_line_ends_as_if_nothing_had_been(
    tmp_path: Path, every: int, record_property: Callable[[str, int], None]
) -> None:
    data = items(5, sites="AB")
    kills = _kill_everywhere(
        tmp_path,
        every,
        lambda folder: run(folder, data[:2]),
        lambda folder: run(folder, data, resume=True, snapshot_every=2),
    )
    record_property("kills", kills)  # for the results page: --junitxml
    assert kills * every > 300


@pytest.mark.parametrize("every", [41, pytest.param(4, marks=pytest.mark.slow)])
def test_retry_of_failed_images_killed_at_any_line_ends_as_if_nothing_had_been(
    tmp_path: Path, every: int, record_property: Callable[[str, int], None]
) -> None:
    data = items(4)
    broken = [{**item, "pixels": torch.full((3, 24, 24), torch.nan)} if item["name"] in "02" else item for item in data]
    kills = _kill_everywhere(
        tmp_path,
        every,
        lambda folder: run(folder, broken, snapshot_every=1),
        lambda folder: run(folder, data, resume=True, retry_failed=True, snapshot_every=1),
    )
    record_property("kills", kills)  # for the results page: --junitxml
    assert kills * every > 150


@pytest.mark.parametrize("every", [29, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("done", [0, 2])
def test_persistent_stream_killed_at_any_line_has_one_record_of_each_image(
    tmp_path: Path, every: int, done: int, record_property: Callable[[str, int], None]
) -> None:
    images = stream(3)
    small()(images[0])  # loads, before it forks, what each process would load anew

    def ask(folder: Path, count: int) -> None:
        """Send the images that were not learnt from yet, as a client does that got no answer."""
        inferer = PersistentInferer(small(), folder / "state.pt", folder / "records.jsonl")
        position = read(folder / "state.pt")["position"] if (folder / "state.pt").exists() else 0
        for image in images[position:count]:
            inferer(image, inferer.method.network)

    def before(folder: Path) -> None:
        folder.mkdir()
        # in a process of its own, since this one would hold the lock
        assert in_child(ask, folder, done) == 0

    def work(folder: Path) -> None:
        ask(folder, done + 1)

    before(tmp_path / "before")
    whole = Path(shutil.copytree(tmp_path / "before", tmp_path / "whole"))
    assert in_child(work, whole) == 0
    for kills in range(10_000):
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / f"{kills}"))
        status = _killed_at(1 + kills * every, lambda folder=folder: work(folder))
        assert in_child(work, folder) == 0
        assert [row["position"] for row in rows(folder)] == list(range(1, done + 2))
        assert_same_end(folder, whole)
        if status == 0:
            break
    record_property("kills", kills)  # for the results page: --junitxml
    assert kills * every > 60


def test_persistent_stream_killed_within_a_line_loses_no_record_after_it(tmp_path: Path) -> None:
    images = stream(3)

    def ask(image: torch.Tensor) -> None:
        inferer = PersistentInferer(small(), tmp_path / "state.pt", tmp_path / "records.jsonl")
        inferer(image, inferer.method.network)

    ask(images[0])
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"name": "x", "stat')
    ask(images[1])
    # the record of an image whose state was not saved
    RecordFile(tmp_path / "records.jsonl").append({"name": "", "status": "ok", "position": 3})
    ask(images[2])
    assert [row["position"] for row in rows(tmp_path)] == [1, 2, 3]
    # records that were put away are not missed, and others are not cut
    (tmp_path / "records.jsonl").write_text('{"name": "mine"}\n' * 30)
    ask(images[0])
    assert len(rows(tmp_path)) == 31


# a resumed run is the same run


def _scale(size: int = 24, **settings) -> Compose:
    return Compose([Resized("image", spatial_size=(size, size)), ScaleIntensityd("image", **settings)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform": _scale(16)}, r"spatial_size was \[24, 24\], is \[16, 16\]"),
        ({"transform": _scale(maxv=0.5)}, r"preprocessing\..*\.scaler\.maxv was 1\.0, is 0\.5"),
        ({"transform": Compose([_scale(), Lambdad("image", torch.sqrt)])}, "preprocessing"),
        ({"postprocessing": ScaleIntensityd("pred")}, "postprocessing was None, is 'ScaleIntensityd'"),
        ({"settings": {"head": "softmax"}}, "head was 'sigmoid', is 'softmax'"),
        ({"reset_at_site": True}, "reset_at_site was False, is True"),
    ],
)
def test_resumed_run_with_another_pipeline_is_refused_and_named(tmp_path: Path, change: dict, message: str) -> None:
    own = {"transform": _scale(), "settings": {"head": "sigmoid"}}
    run(tmp_path, items(2), **own)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"was made with other settings: .*{message}.*set them back"):
        run(tmp_path, items(3), resume=True, **{**own, **change})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(tmp_path, items(3), resume=True, **own)
    assert len(rows(tmp_path)) == 3


def test_bundle_refuses_to_resume_with_another_size_or_head(tmp_path: Path, demo_sites: Path) -> None:
    settings = {"dataset_dir": demo_sites, "output_dir": tmp_path, "limit": 1, **QUICK}
    run_bundle([CONFIGS / "inference.yaml"], **settings)
    for change, message in (
        ({"spatial_size": "[32,32]"}, "spatial_size was [64, 64], is [32, 32]"),
        ({"color_mode": "RGB"}, "color_mode was None, is 'RGB'"),
    ):
        done = run_bundle([CONFIGS / "inference.yaml"], check=False, resume=True, **{**settings, **change})
        assert message in done.stderr
    run_bundle([CONFIGS / "inference.yaml"], resume=True, **settings)


def _photographs(folder: Path, count: int) -> list[dict]:
    folder.mkdir(exist_ok=True)
    found = []
    for i, image in enumerate(stream(count)):
        path = folder / f"{i}.png"
        Image.fromarray((255 * image[0].permute(1, 2, 0).numpy()).astype("uint8")).save(path)
        found.append({"image": str(path), "name": f"{i}", "site": "A"})
    return found


def _load(item: dict) -> dict:
    pixels = torch.from_numpy(np.asarray(Image.open(item["image"]))).permute(2, 0, 1) / 255
    return {**item, "image": pixels}


@pytest.mark.parametrize("identifiers", ["names", "hashed"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[1].update(name="x"), r"image 2 was .*, is "),
        (lambda data: data[1].update(site="B"), r"the site of .* was A, is B"),
        (lambda data: data[1].update(image=data[0]["image"]), r"the file of .* has another name or size"),
        (lambda data: Image.new("RGB", (24, 24)).save(data[1]["image"]), r"the file of .* has another name or size"),
        (lambda data: data.reverse(), r"image 1 was .*, is "),
        (lambda data: data.__delitem__(slice(1, None)), r"2 done of 1"),
    ],
)
def test_resumed_run_over_other_images_is_refused_and_names_the_first(
    tmp_path: Path, change: Callable, message: str, identifiers: str
) -> None:
    data = _photographs(tmp_path / "in", 4)
    settings = {"transform": _load, "identifiers": identifiers}
    run(tmp_path / "out", data[:2], **settings)
    changed = [dict(item) for item in data]
    change(changed)
    with pytest.raises(ValueError, match=rf"the stream has changed since it was interrupted \({message}.*same order"):
        run(tmp_path / "out", changed, resume=True, **settings)


def test_images_that_moved_were_put_away_or_repaired_do_not_stop_a_resumed_run(tmp_path: Path) -> None:
    data = _photographs(tmp_path / "in", 4)
    whole = Path(data[1]["image"]).read_bytes()
    Path(data[1]["image"]).write_bytes(whole[:50])
    run(tmp_path / "out", data[:3], transform=_load)
    (tmp_path / "in").rename(tmp_path / "moved")
    data = [{**item, "image": item["image"].replace("/in/", "/moved/")} for item in data]
    Path(data[0]["image"]).unlink()
    Path(data[1]["image"]).write_bytes(whole)
    run(tmp_path / "out", data, transform=_load, resume=True)
    assert [row["status"] for row in rows(tmp_path / "out")] == ["ok", "failed", "ok", "ok"]


RECORD_DAMAGE = {
    "not json": b"{not json\n",
    "not utf-8": b"\xff\xfe\n",
    "a list": b"[1]\n",
    "nested": b"[" * 100_000 + b"\n",
    "zeros": b"\0" * 100 + b"\n",
    "no name": b'{"status": "ok", "seconds": 1}\n',
    "metrics": b'{"name": "0", "status": "ok", "seconds": 1, "metrics": 5}\n',
}


@pytest.mark.parametrize("damage", RECORD_DAMAGE)
def test_damaged_records_are_named_with_a_way_on(tmp_path: Path, damage: str) -> None:
    run(tmp_path, items(3))
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + RECORD_DAMAGE[damage] + whole[2])
    with pytest.raises(ValueError, match=rf"line 2 of {path} is damaged \(.*restore the file from a copy, or move it"):
        run(tmp_path, items(4), resume=True)
    path.write_bytes(b"".join(whole))
    with path.open("ab") as file:  # behind what the state knows it does no harm
        file.write(RECORD_DAMAGE[damage])
    run(tmp_path, items(4), resume=True)
    assert [row["name"] for row in rows(tmp_path)] == list("0123")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"1": 5}', b'{"1": {}}', b"\xff", b"[" * 100_000])
def test_damaged_list_of_runs_is_named_with_a_way_on(tmp_path: Path, damage: bytes) -> None:
    run(tmp_path, items(2))
    (tmp_path / "records.runs.json").write_bytes(damage)
    with pytest.raises(
        ValueError, match=r"records\.runs\.json is damaged .*or remove it to resume without what it says"
    ):
        run(tmp_path, items(3), resume=True)
    (tmp_path / "records.runs.json").unlink()
    run(tmp_path, items(3), resume=True)
    assert [row["run"] for row in rows(tmp_path)] == [1, 1, 2]


def test_run_begun_anew_over_a_finished_one_and_killed_at_once_orphans_nothing(tmp_path: Path) -> None:
    data = items(3)
    run(tmp_path / "whole", data)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    # killed while the first image is loaded, the old files are as they were
    assert in_child(lambda: run(tmp_path / "killed", data, transform=DyingAt("0"))) == DIED
    before = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.suffix != ".lock"}
    after = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir() if path.suffix != ".lock"}
    assert after.pop("state.pt.attempt")
    assert after == before
    run(tmp_path / "killed", data, resume=True)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    # killed within the first image, the new stream can be resumed
    assert in_child(lambda: run(tmp_path / "killed", data, postprocessing=Step(lambda _: os._exit(DIED)))) == DIED
    assert read(tmp_path / "killed" / "state.pt")["position"] == 0
    run(tmp_path / "killed", data, resume=True)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_output_folder_that_vanishes_stops_the_run(tmp_path: Path, how: str) -> None:
    data, folder = items(6), tmp_path / "out"
    method, evaluator = build(folder, data)

    @evaluator.on(Events.ITERATION_COMPLETED(once=3))
    def vanish(_engine: Engine) -> None:
        folder.rename(tmp_path / "elsewhere")
        if how == "removed":
            shutil.rmtree(tmp_path / "elsewhere")
        if how == "replaced":
            shutil.copytree(tmp_path / "elsewhere", folder)

    with pytest.raises(MachineFailureError, match=rf"the folder {folder} was removed or replaced during the run"):
        evaluator.run()
    assert method.images_seen == 3
    if how == "moved":
        (tmp_path / "elsewhere").rename(folder)
    if how != "removed":
        run(folder, data, resume=True)
        run(tmp_path / "whole", data)
        assert_same_end(folder, tmp_path / "whole")


# a state file may be anything


def _nested(kind: str) -> bytes:
    """A pickle of a few kilobytes that unfolds to 2**200 values."""
    make = {"list": b"](hhe", "dict": b"}(K\x01hK\x02hu", "tuple": b"hh\x86", "key": b"hh\x86"}[kind]
    content = b"\x80\x02" + {"list": b"]", "dict": b"}", "tuple": b")", "key": b")"}[kind] + b"q\x00"
    for level in range(200):
        content += make.replace(b"h", b"h" + bytes([level])) + b"q" + bytes([level + 1])
    # torch reads a dict; of a tuple as its key it must compute the hash
    top = b"}(" + (b"h\xc8K\x01" if kind == "key" else b"X\x06\x00\x00\x00schemah\xc8") + b"u"
    return content + top + b"."


@pytest.mark.parametrize("kind", ["list", "dict", "tuple", "key"])
def test_state_of_nested_references_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    method = MGIPT(tiny_network(), steps=1)
    torch.save({"a": 1}, whole := io.BytesIO())
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "state.pt", "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(entry.filename, _nested(kind) if entry.filename.endswith("data.pkl") else content)
    assert (tmp_path / "state.pt").stat().st_size < 10_000
    since = time.monotonic()
    with pytest.raises(ValueError, match=r"unfolds to more than 10,000,000 values|nested more than"):
        PersistentInferer(method, tmp_path / "state.pt")(stream(1)[0], method.network)
    with pytest.raises(SystemExit):
        command.main(["show", str(tmp_path / "state.pt")])
    assert time.monotonic() - since < 10


def test_settings_of_a_state_are_bounded(tmp_path: Path) -> None:
    run(tmp_path, items(1))
    content = load_state(tmp_path / "state.pt")
    for key in ("settings", "pipeline"):
        for value in ({"a": [[0.0] * 101] * 100}, {"a": {1: 2}}, {"a": torch.ones(1)}):
            torch.save({**content, key: value}, tmp_path / "state.pt")
            with pytest.raises(ValueError, match=f"{key} must be a dict of plain values"):
                run(tmp_path, items(2), resume=True)
    for value in (
        {"base": 0},
        {"base": 0, "images": [0, 0]},
        {"base": -1, "images": []},
        {"base": 0, "images": [7]},
        3,
    ):
        torch.save({**content, "postponed": value}, tmp_path / "state.pt")
        with pytest.raises(ValueError, match=r"postponed|the stream has changed"):
            run(tmp_path, items(2), resume=True)


# signals

HEARD = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
"""Under nohup, SIGHUP is none of them."""


@pytest.mark.parametrize("number", HEARD)
def test_signal_ends_a_run_as_cleanly_as_ctrl_c(tmp_path: Path, number: int) -> None:
    data = items(5)
    run(tmp_path / "whole", data)

    def kill() -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)
        os._exit(DIED)

    assert in_child(lambda: run(tmp_path / "parts", data, transform=DyingAt("3", kill), save_every=4)) == 128 + number
    assert read(tmp_path / "parts" / "state.pt")["position"] == 3
    assert not (tmp_path / "parts" / "state.pt.attempt").exists()
    run(tmp_path / "parts", data, resume=True)
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    assert signal.getsignal(number) is signal.SIG_DFL


def test_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        run(tmp_path, items(3), transform=DyingAt("1", lambda: os.kill(os.getpid(), signal.SIGHUP)))

    assert in_child(work) == 0
    assert len(rows(tmp_path)) == 3


@pytest.mark.parametrize("number", HEARD)
@pytest.mark.parametrize("command_line", ["mgipt", "monai.bundle"])
def test_signal_ends_the_commands_with_their_status_and_the_run_goes_on(
    tmp_path: Path, demo_sites: Path, command_line: str, number: int
) -> None:
    settings = {"rounds": 20, "instance_prompt#steps": 1, "spatial_size": "[64,64]"}
    words = [f"--{key}={value}" for key, value in settings.items()]
    if command_line == "mgipt":
        words = ["-m", "mgipt_monai", "predict", str(demo_sites), str(tmp_path), *words]
    else:
        words = ["-m", "monai.bundle", "run", "--config_file", str(CONFIGS / "inference.yaml"), *words]
        words += ["--bundle_root", str(BUNDLE), "--dataset_dir", str(demo_sites), "--output_dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ONE_THREAD
    )
    records, until = tmp_path / "records.jsonl", time.monotonic() + 120
    while not (records.exists() and records.read_bytes().count(b"\n") > 1) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err[-2000:]
    if command_line == "mgipt":
        name = signal.Signals(number).name
        assert err.splitlines()[-1] == f"ended by {name}: what is done is kept, and --resume True goes on from there"
        assert "Traceback" not in out + err
    position = read(tmp_path / "adaptation_state.pt")["position"]
    # the record of an image that was about to be saved is cut off by the next run
    assert 0 < position <= len(RecordFile(records).read()) <= position + 1 < 120


# what an image is called


def test_name_that_is_not_utf8_does_not_end_a_hashed_run(tmp_path: Path, demo_sites: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    names = [b"b\xe9b\xe9.png", b"plain.png"]
    for name, path in zip(names, sorted((demo_sites / "cold_noisy" / "images").iterdir()), strict=False):
        (source / os.fsdecode(name)).write_bytes(path.read_bytes())
    for identifiers in ("hashed", "names"):
        out = tmp_path / identifiers
        run_bundle([CONFIGS / "inference.yaml"], dataset_dir=source, output_dir=out, identifiers=identifiers, **QUICK)
        assert [row["status"] for row in rows(out)] == ["ok", "ok"]
        assert {os.fsencode(path.name) for path in out.glob("*.png")} == set(names)
    assert all(len(row["name"]) == 16 for row in rows(tmp_path / "hashed"))
