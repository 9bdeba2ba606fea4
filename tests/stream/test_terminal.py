# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: the bar, lines in plain words, each failure once, and its list at the very end."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from mgipt_monai.stream.terminal import beside_bars, in_words
from tests.bundle.conftest import BUNDLE, QUICK
from tests.module_runs import run_in_terminal, run_module

SMALL = [word for key, value in QUICK.items() for word in (f"--{key}", value)]
BAR = re.compile(r"stream: +(\d+)/3")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs of 64 px, the second one no image."""
    folder = tmp_path_factory.mktemp("sites")
    write_demo_stream(folder, [CAMERAS["cold_noisy"]], count=3, size=64)
    (folder / "cold_noisy" / "images" / "eye_001.png").write_text("none")
    return folder / "cold_noisy" / "images"


def command(kind: str, photographs: Path, masks: Path) -> tuple[str, list[str]]:
    if kind == "mgipt":
        return "mgipt_monai", ["predict", str(photographs), str(masks), *SMALL]
    places = ["--bundle_root", str(BUNDLE), "--dataset_dir", str(photographs), "--output_dir", str(masks)]
    return "monai.bundle", ["run", "--config_file", str(BUNDLE / "configs" / "inference.yaml"), *places, *SMALL]


@pytest.mark.parametrize("kind", ["mgipt", "monai"])
def test_no_line_is_glued_to_the_bar(kind: str, photographs: Path, tmp_path: Path) -> None:
    status, shown = run_in_terminal(*command(kind, photographs, tmp_path / "masks"))
    assert status == 1
    # what stands in a line of the terminal, after the returns to its start
    pieces = [piece for line in shown.split("\r\n") for piece in line.split("\r") if piece.strip()]
    bars = [piece for piece in pieces if BAR.search(piece)]
    assert all(piece.startswith("stream:") and " INFO " not in piece and " ERROR " not in piece for piece in bars)
    assert next(BAR.search(piece)[1] for piece in bars) == "0"
    assert BAR.search(bars[-1])[1] == "3", "a failed image is counted"
    first = next(place for place, piece in enumerate(pieces) if "image 1:" in piece)
    assert pieces.index(bars[0]) < first
    for line in (piece for piece in pieces if re.search(r" (INFO|ERROR) mgipt_monai", piece)):
        assert re.match(r"\d\d:\d\d:\d\d ", line), line


@pytest.mark.parametrize("kind", ["mgipt", "monai"])
def test_files_get_whole_lines_and_no_bar(kind: str, photographs: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    done = run_module(*command(kind, photographs, masks))
    assert done.returncode == 1
    assert "stream:" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert next(line for line in lines if "image 1:" in line).endswith(" s")
    assert "prompt size" in done.stdout
    assert "alignment loss" in done.stdout
    assert sum("eye_001" in line for line in lines) == 1
    assert not [line for line in lines if re.search(r"Engine run (starting|finished)|Epoch\[1\] Complete", line)]
    table = next(place for place, line in enumerate(lines) if line.startswith("site "))
    written = [line.split() for line in lines[table:] if str(masks) in line]
    assert written[:3] == [
        ["masks", str(masks)],
        ["records", str(masks / "records.jsonl")],
        ["summary", str(masks / "summary.json")],
    ]
    # behind its error, MONAI's own command has a traceback of where it was raised
    last = done.stderr.rstrip().splitlines()[-2:] if kind == "mgipt" else done.stderr.splitlines()
    place = next(
        place for place, line in enumerate(last) if line.endswith("1 of 3 images failed, the others are done:")
    )
    assert last[place + 1].startswith("  eye_001: ")


def test_a_folder_with_results_is_left_alone(photographs: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    run_module(*command("mgipt", photographs, masks))
    before = {path: path.read_bytes() for path in masks.iterdir()}
    module, words = command("monai", photographs, masks)
    for runs in (command("mgipt", photographs, masks), (module, words)):
        done = run_module(*runs)
        assert re.search(
            rf"{masks} has the results of an earlier run \(3 images, \d{{4}}-\d\d-\d\d\): --resume True continues it, "
            "--overwrite True replaces it, or give another folder",
            done.stderr.splitlines()[-1] if runs[0] == "mgipt_monai" else done.stderr,
        )
        assert {path: path.read_bytes() for path in masks.iterdir()} == before
    done = run_module(module, [*words, "--overwrite", "True"])
    assert "1 of 3 images failed" in done.stderr
    done = run_module(module, [*words, "--resume", "True"])
    assert "1 of 3 images failed" in done.stderr
    for name, what in (("records.jsonl", "a state after 3 images"), ("adaptation_state.pt", "the mask eye_000.png")):
        (masks / name).unlink()
        done = run_module(*command("mgipt", photographs, masks))
        assert f"has the results of an earlier run ({what})" in done.stderr.splitlines()[-1]
    (masks / "records.jsonl").touch()  # a run that was killed in its first image
    done = run_module(*command("mgipt", photographs, masks))
    assert "1 of 3 images failed" in done.stderr


class Terminal(io.StringIO):
    """A text stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_handlers_keep_their_level_and_warnings_their_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    logger = logging.Logger("alone")
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    monkeypatch.setitem(logging.Logger.manager.loggerDict, "alone", logger)
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: print(message, file=sys.stderr))
    with tqdm(total=2, file=sys.stderr, desc="bar") as bar, beside_bars():
        bar.refresh()
        logger.info("unheard")
        logger.warning("heard")
        warnings.showwarning("odd", UserWarning, "file.py", 1)
    assert handler.stream is sys.stderr
    text = sys.stderr.getvalue()
    assert "unheard" not in text
    assert re.search(r"\r +\rheard\n", text)
    assert re.search(r"\r +\rodd\n", text)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"instance_size": 1, "loss_before": 0.153, "loss_after": 0.1191},
            "prompt size 1, alignment loss 0.153 to 0.119",
        ),
        ({"loss_before": 0.5}, "loss 0.5"),
        ({"loss_before": None}, ""),
        (
            {"evidence": 0.333, "adapted_weight": 0.69, "disagreement": 0.0537},
            "evidence of a shift 33 %, adapted prediction weighs 69 %, the views disagree by 5.4 %",
        ),
        ({"decision": "unadapted", "reasons": ["far"]}, "predicted without adaptation since far"),
        ({"decision": "adapted", "learned": False, "reasons": ["far"]}, "nothing learned for later images since far"),
        ({"dropped": ["jitter"]}, "left out to save passes: jitter"),
        ({"monitor": {"alarm": True, "signal": "area"}}, "ALARM: the images have changed (area)"),
        ({"forwards": 1, "backwards": 0}, "1 forward pass"),
        ({"forwards": 25, "backwards": 17}, "25 forward and 17 backward passes"),
    ],
)
def test_records_in_words(more: dict, words: str) -> None:
    said = in_words({"name": "A/eye", "status": "ok", "seconds": 0.5, **more})
    assert said == f"A/eye: {words}{', ' * bool(words)}0.50 s"


class Deadly(io.StringIO):
    """A text stream at which a process dies."""

    def write(self, text: str) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return len(text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forked processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("is_worker", [False, True])
def test_a_process_that_is_killed_while_it_logs_stops_no_other(
    is_worker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tqdm.get_lock()  # which all processes share from now on
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    logger, handler = logging.Logger("alone"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    monkeypatch.setitem(logging.Logger.manager.loggerDict, "alone", logger)

    def die() -> None:
        child = os.fork()
        if not child:
            if is_worker:  # of a loader, within the parent's block
                handler.stream.stream = Deadly()
                logger.warning("dying")
            sys.stderr = handler.stream = Deadly()
            with beside_bars():  # a run of its own
                logger.warning("dying")
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])

    def go_on() -> None:
        with beside_bars():
            if is_worker:
                die()
            logger.warning("alive")

    if not is_worker:
        die()
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert "alive" in sys.stderr.getvalue()
