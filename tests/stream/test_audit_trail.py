# SPDX-License-Identifier: Apache-2.0
"""When, by which run and under which name each image was recorded."""

from __future__ import annotations

import contextlib
import json
import re
import stat
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, ScaleIntensityd
from PIL import Image

from mgipt_monai import (
    MGIPT,
    RecordFile,
    StreamFailedError,
    StreamingAdaptationEvaluator,
    TestTimeAdaptationHandler,
    load_state,
)
from mgipt_monai.data import CheckImaged, StreamDataset
from mgipt_monai.stream.pseudonyms import Pseudonyms, without_names
from mgipt_monai.stream.records import AuditTrail
from mgipt_monai.utils.provenance import fingerprint
from tests.conftest import stream, tiny_network, without_times


def items(count: int) -> list[dict]:
    return [{"image": image[0], "site": "A", "name": f"A/Ann_Lee_{i}"} for i, image in enumerate(stream(count))]


def run(folder: Path, data: list[dict], transform: Callable | None = None, **settings) -> list[dict]:
    """One run over a stream; return its records."""
    mgipt = MGIPT(tiny_network(), steps=2)
    handler = TestTimeAdaptationHandler(mgipt, folder / "state.pt", folder / "records.jsonl", **settings)
    dataset = Dataset(data) if transform is None else StreamDataset(data, transform)
    loader = DataLoader(dataset, batch_size=1)
    engine = StreamingAdaptationEvaluator("cpu", loader, mgipt.network, val_handlers=[handler], progress=False)
    with contextlib.suppress(StreamFailedError):
        engine.run()
    return RecordFile(folder / "records.jsonl").read()


def test_records_are_set_aside_under_names_that_nobody_has(tmp_path: Path) -> None:
    (tmp_path / "records.1.runs.json").write_text("somebody's")
    trail = AuditTrail(tmp_path / "records.jsonl")
    for number in (2, 3):
        trail.file.append({"name": f"eye_{number}"})
        trail.runs_path.write_text(f"{number}")
        trail.set_aside()
        assert RecordFile(tmp_path / f"records.{number}.jsonl").read() == [{"name": f"eye_{number}"}]
        assert (tmp_path / f"records.{number}.runs.json").read_text() == f"{number}"
    assert (tmp_path / "records.1.runs.json").read_text() == "somebody's"
    assert not trail.file.path.exists()


def test_records_say_when_and_by_which_run(tmp_path: Path) -> None:
    rows = run(tmp_path, items(2))
    for row in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["time"])
        assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(row["time"])) < timedelta(minutes=5)
        assert row["run"] == 1
    about = json.loads((tmp_path / "records.runs.json").read_text())["1"]
    assert about["weights"] == fingerprint(tiny_network())
    assert about["settings"] == MGIPT(tiny_network(), steps=2).settings()
    assert (about["first"], about["identifiers"]) == (0, "names")
    assert about["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_prompt_norm_is_the_distance_of_the_lasting_prompts_from_ones(tmp_path: Path) -> None:
    rows = run(tmp_path, items(2))
    teachers = load_state(tmp_path / "state.pt")["adaptation"]["teachers"]
    flat = torch.cat([(teacher - 1).flatten() for teacher in teachers])
    assert rows[1]["prompt_norm"] == pytest.approx(flat.norm().item(), rel=1e-5)
    assert rows[1]["prompt_norm"] > rows[0]["prompt_norm"] > 0


@pytest.mark.parametrize("identifiers", ["names", "hashed"])
def test_resumed_run_is_another_run_with_the_same_records(tmp_path: Path, identifiers: str) -> None:
    whole = run(tmp_path / "whole", items(4), identifiers=identifiers)
    run(tmp_path / "parts", items(2), identifiers=identifiers)
    parts = run(tmp_path / "parts", items(4), identifiers=identifiers, resume=True)
    assert [row["run"] for row in parts] == [1, 1, 2, 2]
    runs = json.loads((tmp_path / "parts" / "records.runs.json").read_text())
    assert [about["first"] for about in runs.values()] == [0, 2]
    records = [without_times(tmp_path / name / "records.jsonl") for name in ("whole", "parts")]
    if identifiers == "hashed":  # each folder has a key of its own
        assert all(a.pop("name") != b.pop("name") for a, b in zip(*records, strict=True))
    assert records[0] == records[1]
    assert len(whole) == 4


def test_run_without_an_image_is_not_noted_and_a_new_stream_forgets_earlier_runs(tmp_path: Path) -> None:
    run(tmp_path, items(2))
    run(tmp_path, items(2), resume=True)
    assert list(json.loads((tmp_path / "records.runs.json").read_text())) == ["1"]
    assert run(tmp_path, items(2))[0]["run"] == 1
    assert list(json.loads((tmp_path / "records.runs.json").read_text())) == ["1"]


def test_hashed_names_are_nowhere_in_what_is_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "Jo Doe"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype="uint8")).save(folder / "Ann_Lee_0.png")
    Image.fromarray(np.full((24, 24, 3), 9, dtype="uint8")).save(folder / "Ann_Lee_2.png")
    data = [{**item, "image": str(folder / f"Ann_Lee_{i}.png")} for i, item in enumerate(items(3))]
    load = Compose(
        [LoadImaged("image"), EnsureChannelFirstd("image"), ScaleIntensityd("image"), CheckImaged("image", 3, 2)]
    )
    rows = run(tmp_path / "out", data, load, identifiers="hashed")
    assert [row["status"] for row in rows] == ["ok", "failed", "failed"]
    assert len({row["name"] for row in rows}) == 3
    assert all(re.fullmatch(r"[0-9a-f]{16}", row["name"]) for row in rows)
    assert rows[1]["reason"] == f"image file {rows[1]['name']} does not exist"
    assert re.fullmatch(f"{rows[2]['name']}.*constant.*", rows[2]["reason"])
    for path in (tmp_path / "out").glob("records*"):
        assert not re.search("Ann|Lee|Jo|Doe", path.read_text()), path


def test_hashed_names_need_the_key(tmp_path: Path) -> None:
    run(tmp_path, items(2), identifiers="hashed")
    key = tmp_path / "records.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    names = [Pseudonyms(key).of(item["name"]) for item in items(2)]
    assert names == [row["name"] for row in RecordFile(tmp_path / "records.jsonl").read()]
    assert names != [Pseudonyms(tmp_path / "other.key").of(item["name"]) for item in items(2)]
    key.write_text("abc")
    with pytest.raises(ValueError, match=r"records.key holds no key"):
        Pseudonyms(key).of("A")


def test_resuming_tells_another_stream_and_other_identifiers(tmp_path: Path) -> None:
    run(tmp_path, items(2), identifiers="hashed")
    with pytest.raises(ValueError, match="started with identifiers='hashed'"):
        run(tmp_path, items(3), resume=True)
    with pytest.raises(ValueError, match="the stream has changed"):
        run(tmp_path, items(3)[::-1], resume=True, identifiers="hashed")
    assert len(run(tmp_path, items(3), resume=True, identifiers="hashed")) == 3


def test_unknown_identifiers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="identifiers must be one of names, hashed; got 'md5'"):
        AuditTrail(tmp_path / "records.jsonl", "md5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in/A/Ann Lee.nii.gz: has NaN", "##: has NaN"),
        ("cannot open 'in/A/Ann Lee.nii.gz'", "cannot open '##'"),
        ("Ann Lee has 2 channels", "## has 2 channels"),
        (r"C:\masks\other.png is absent", "## is absent"),
        ("no folder in/A, or no rights", "no folder ##, or no rights"),
        ("the image is constant: 12 pixels", "the image is constant: 12 pixels"),
    ],
)
def test_reasons_without_names(text: str, expected: str) -> None:
    assert without_names(text, ["in/A/Ann Lee.nii.gz"], "##") == expected
