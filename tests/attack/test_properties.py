# SPDX-License-Identifier: Apache-2.0
"""What holds for anything that somebody may write into a list, a record, a state, a name, a table or a config."""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as some

from mgipt_monai import MGIPT, RecordFile, StreamFile
from mgipt_monai.data import check_outputs, find_stream, order_stream
from mgipt_monai.data.datalists import write_datalist
from mgipt_monai.data.order import ORDERS
from mgipt_monai.data.outputs import check_names
from mgipt_monai.data.streams import read_csv
from mgipt_monai.methods import Guard
from mgipt_monai.methods.guard.guard import THRESHOLDS
from mgipt_monai.report.record_summary import alerts, read_records, record_table
from mgipt_monai.stream.records import json_types
from mgipt_monai.stream.state_file import read
from mgipt_monai.utils.files import FORMULA, plain_cell, save_state, write_csv
from mgipt_monai.utils.outputs import OutputFolder, normal_name
from tests.conftest import stream, tiny_network

# what it keeps between runs would lie in the tree, and make two runs differ
configuration.set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis-"))

FULL = os.environ.get("MGIPT_ATTACK") == "full"


def examples(short: int, full: int) -> settings:
    """The same examples in each run, many of them in the full suite."""
    return settings(
        max_examples=full if FULL else short,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


HUGE = 10**400
"""A number that JSON can write and that no computation takes."""

scalars = some.none() | some.booleans() | some.integers() | some.just(HUGE) | some.floats() | some.text(max_size=8)
anything = some.recursive(
    scalars, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3)
)
parts = some.sampled_from([".", "..", "", "a", "A", "a.png", "x_uncertainty", "é", "é", "CON", " ", ".mgipt_written"])
names = some.lists(parts | some.text(max_size=6), min_size=1, max_size=4).map("/".join)
texts = some.text(max_size=12) | some.text(alphabet="=+-@\t\r\n'\"|, a1", max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties")


def fresh(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


def _says(error: Exception, what: str = "") -> None:
    """A refusal is a sentence, which names what it refuses."""
    assert len(str(error).split()) > 2
    assert what in str(error)


# lists of images

entries = some.fixed_dictionaries(
    {},
    optional={
        "image": anything | names,
        "label": anything | names,
        "site": anything | names,
        "name": anything | names,
        "round": anything | some.integers(-1, 3),
        "weight": anything,
    },
)


@examples(60, 2000)
@given(content=some.lists(entries | anything, max_size=4) | anything, rounds=some.integers(1, 3))
def test_datalist_of_anything_gives_items_or_is_refused(folder: Path, content: Any, rounds: int) -> None:
    path = fresh(folder) / "list.json"
    path.write_text(json.dumps({"testing": content}))
    try:
        items = find_stream(path)
        order_stream(items, "shuffled", rounds)
        check_outputs(items, path.parent / "out", files=["records.jsonl"])
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        _says(error)
        return
    assert len(items) == len(content)
    assert all(isinstance(item[key], str) for item in items for key in ("site", "name"))
    assert all(_lies_in(path.parent / "out", path.parent / "out" / item["name"]) for item in items)


@examples(60, 2000)
@given(rows=some.lists(some.lists(texts | names, max_size=5), max_size=4), heads=some.permutations(["image", "site"]))
def test_table_of_anything_gives_items_or_is_refused(folder: Path, rows: list[list[str]], heads: list[str]) -> None:
    path = fresh(folder) / "list.csv"
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        csv.writer(file).writerows([[*heads, "name"], *rows])
    try:
        items = read_csv(str(path))
        found = find_stream(path)
    except (ValueError, FileNotFoundError) as error:
        _says(error)
        return
    assert len(found) == len(items)
    assert all(isinstance(item["name"], str) and isinstance(item["site"], str) for item in found)


@examples(60, 2000)
@given(
    data=some.lists(some.tuples(names, some.text(max_size=4)), min_size=1, max_size=6),
    order=some.sampled_from(ORDERS),
    rounds=some.integers(1, 3),
    seed=some.integers(0, 2**32),
)
def test_any_order_has_each_image_once_per_round_and_outputs_of_its_own(
    folder: Path, data: list[tuple[str, str]], order: str, rounds: int, seed: int
) -> None:
    items = [{"image": f"/in/{i}.png", "name": name, "site": site} for i, (name, site) in enumerate(data)]
    try:
        found = order_stream(items, order, rounds, seed)
    except ValueError as error:
        _says(error)
        return
    for number in range(1, rounds + 1):
        images = [item["image"] for item in found if item["round"] == number]
        assert sorted(images) == sorted(item["image"] for item in items)
    assert len({normal_name(item["name"]) for item in found}) == len(found)
    assert found == order_stream(items, order, rounds, seed)
    path = fresh(folder) / "list.json"
    write_datalist(found, path)
    assert find_stream(path) == found


# records

rows = some.dictionaries(some.text(max_size=5), anything, max_size=4)
record = some.fixed_dictionaries(
    {"status": some.sampled_from(["ok", "failed"]), "name": some.text(max_size=5)},
    optional={
        "site": some.text(max_size=3) | scalars,
        "reason": some.text(max_size=5) | scalars,
        "seconds": scalars,
        "time": some.datetimes().map(lambda time: f"{time.isoformat()}+00:00") | scalars,
        "metrics": anything,
        "forwards": scalars,
        "decision": scalars,
        "reasons": anything,
        "learned": scalars,
        "prompt_norm": scalars,
        "loss_before": scalars,
    },
)


@examples(80, 3000)
@given(written=some.lists(rows, max_size=4), cut=some.integers(0, 40), last=rows)
def test_records_read_what_was_appended_also_behind_a_line_cut_off(
    folder: Path, written: list[dict], cut: int, last: dict
) -> None:
    records = RecordFile(fresh(folder) / "records.jsonl")
    for row in written:
        records.append(row)
    expected = [json_types(row) for row in written]
    assert records.read() == expected
    if written and cut:
        whole = records.path.read_bytes()
        line = len(json.dumps(expected[-1]).encode()) + 1
        records.path.write_bytes(whole[: len(whole) - min(cut, line)])
        expected = expected[:-1]
    records.append(last)
    assert records.read() == [*expected, json_types(last)]


@examples(80, 3000)
@given(
    lines=some.lists(record | rows | anything, max_size=5),
    noise=some.binary(max_size=20),
    place=some.integers(0, 200),
    count=some.integers(0, 6),
)
def test_damaged_records_are_kept_as_they_were_or_refused(
    folder: Path, lines: list, noise: bytes, place: int, count: int
) -> None:
    path = fresh(folder) / "records.jsonl"
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    path.write_bytes(text[:place] + noise + text[place:])
    before = path.read_bytes()
    try:
        kept = RecordFile(path).keep(count)
    except ValueError as error:
        _says(error, str(path))
        assert path.read_bytes() == before
        return
    assert len(kept) == count
    assert all(row["status"] in ("ok", "failed") and isinstance(row["name"], str) for row in kept)
    # a number that is none differs from itself
    assert json.dumps(RecordFile(path).read()) == json.dumps(kept)


@examples(120, 4000)
@given(lines=some.lists(record, max_size=8), noise=some.binary(max_size=20), place=some.integers(0, 400))
def test_summary_of_any_record_file_is_made(folder: Path, lines: list, noise: bytes, place: int) -> None:
    path = fresh(folder) / "records.jsonl"
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    path.write_bytes(text[:place] + noise + text[place:])
    found, skipped = read_records([path])
    assert len(found) + skipped <= len(lines) + 1 + noise.count(b"\n")
    table = record_table(found)
    assert all(isinstance(cell, str) for line in table for cell in line)
    assert all(isinstance(alert, str) for alert in alerts(found))


# states


def _paths(value: Any, at: tuple = ()) -> list[tuple]:
    """Where something lies in nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in inner for path in _paths(item, (*at, key)))]


def _put(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _put(copy[path[0]], path[1:], new)
    return copy


def _method() -> MGIPT:
    return MGIPT(tiny_network(), steps=1, instance_sizes=(1,), global_sizes=(3,), guard=Guard())


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    method, file = _method(), StreamFile(folder / "whole.pt", snapshot_every=1)
    for position, image in enumerate(stream(3), start=1):
        method(image)
        state = {"adaptation": method.adaptation_state(), "position": position, "site": "A", "pipeline": {"a": [1]}}
        file.snapshot(state)
        file.save(method, {**state, "postponed": {"base": 3, "images": [1]}})
    return read(folder / "whole.pt")


tensors = some.sampled_from(
    [torch.zeros(0), torch.zeros(3, 3), torch.tensor(math.nan), torch.zeros(2, dtype=torch.int64), torch.ones(1, 1, 1)]
)


@examples(60, 1500)
@given(data=some.data())
def test_state_with_anything_in_it_is_refused_or_can_be_adapted_with(
    folder: Path, whole: dict[str, Any], data: some.DataObject
) -> None:
    changed = whole
    for _ in range(data.draw(some.integers(1, 2))):
        path = data.draw(some.sampled_from(_paths(changed)[1:]))
        changed = _put(changed, path, data.draw(anything | tensors))
        if not isinstance(changed, dict):
            return
    path = fresh(folder) / "state.pt"
    save_state(changed, path)
    method = _method()
    before = method.adaptation_state()
    try:
        content = StreamFile(path).load(method)
    except ValueError as error:
        _says(error, str(path))
        assert str(method.adaptation_state()) == str(before)
        return
    assert content["position"] >= 0
    assert torch.isfinite(method(stream(1)[0])).all()
    StreamFile(path).save(method, {"adaptation": method.adaptation_state(), "position": 4, "site": "A"})


@examples(60, 3000)
@given(place=some.floats(0, 1, exclude_max=True), bit=some.integers(0, 7), cut=some.booleans())
def test_state_with_a_bit_flipped_or_its_end_cut_off_is_refused_or_the_same(
    folder: Path, whole: dict[str, Any], place: float, bit: int, cut: bool
) -> None:
    content = bytearray((folder / "whole.pt").read_bytes())
    at = int(place * len(content))
    content[at] ^= 1 << bit
    path = fresh(folder) / "state.pt"
    path.write_bytes(content[:at] if cut else content)
    try:
        found = read(path)
    except ValueError as error:
        _says(error, str(path))
        return
    assert not cut
    assert str(found) == str(whole)


# paths


def _lies_in(folder: Path, path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


@examples(150, 5000)
@given(wanted=some.lists(names, min_size=1, max_size=5), ending=some.sampled_from(["", "_uncertainty"]))
def test_outputs_of_any_names_have_files_of_their_own_below_the_folder(
    folder: Path, wanted: list[str], ending: str
) -> None:
    root = fresh(folder)
    output = OutputFolder(root / "out", durable=False)
    items = [{"image": f"{i}.png", "name": name} for i, name in enumerate(wanted)]
    try:
        check_names(items, ["", "_uncertainty"])
    except ValueError as error:
        _says(error)
        for name in wanted:  # whoever writes without that check
            _write_or_refuse(output, name)
    else:
        for item in items:
            with output.writing(f"{item['name']}{ending}.png") as part:
                part.write_text(item["image"])
        for item in items:
            assert output.file(f"{item['name']}{ending}.png").read_text() == item["image"]
    assert {path.name for path in root.iterdir()} <= {"out"}
    assert all(_lies_in(root / "out", path) for path in root.rglob("*"))


def _write_or_refuse(output: OutputFolder, name: str) -> None:
    try:
        with output.writing(name) as part:
            part.write_text("mask")
    except (ValueError, FileExistsError, IsADirectoryError):
        return
    assert output.file(name).read_text() == "mask"


# tables


@examples(100, 4000)
@given(cells=some.lists(some.dictionaries(texts, texts | scalars, min_size=1, max_size=3), min_size=1, max_size=3))
def test_no_cell_of_a_table_is_a_formula_and_each_is_read_as_written(folder: Path, cells: list[dict]) -> None:
    path = fresh(folder) / "table.csv"
    write_csv(path, cells)
    with path.open(newline="", encoding="utf-8") as file:
        head, *lines = list(csv.reader(file))
    columns = list(dict.fromkeys(key for row in cells for key in row))
    assert head == [plain_cell(column) for column in columns]
    for line, row in zip(lines, cells, strict=True):
        for found, column in zip(line, columns, strict=True):
            value = row.get(column)
            assert found == ("" if value is None else str(plain_cell(value)))
            assert not (isinstance(value, str) and found.startswith(FORMULA))


# what was found with them


@pytest.mark.parametrize(
    "line",
    [
        {"status": "ok", "metrics": {"dsc": None}},
        {"status": "ok", "metrics": {"dsc": {"disc": "high"}}},
        {"status": "ok", "metrics": {"dsc": {"disc": HUGE}}},
        {"status": "ok", "seconds": HUGE},
        {"status": "ok", "seconds": True},
    ],
)
def test_summary_skips_a_record_with_values_that_are_no_numbers(tmp_path: Path, line: dict) -> None:
    good = {"status": "ok", "name": "a", "site": "A", "metrics": {"dsc": {"disc": 0.5, "cup": None}}}
    (tmp_path / "records.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(good)}\n" + "[" * 10_000)
    rows, skipped = read_records([tmp_path / "records.jsonl"])
    assert (rows, skipped) == ([{**good, "metrics": {"dsc": {"disc": 0.5, "cup": None}}}], 2)
    assert record_table(rows)[1][-1] == "50.00"


@pytest.mark.parametrize("line", [{"seconds": HUGE}, {"seconds": 0.5, "metrics": {"dsc": {"disc": HUGE}}}])
def test_stream_is_not_resumed_over_a_record_whose_number_is_none(tmp_path: Path, line: dict) -> None:
    records = RecordFile(tmp_path / "records.jsonl")
    records.append({"status": "ok", "name": "a", **line})
    with pytest.raises(ValueError, match=r"line 1 of .*records\.jsonl is damaged"):
        records.keep(1)


@pytest.mark.parametrize("value", ["0.9", True, HUGE, math.nan, [0.9]])
def test_guard_names_a_setting_that_is_no_number(value: Any) -> None:
    for name in ("min_agreement", "max_prompt", "warm_up"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            Guard(**{name: value if (name, value) != ("warm_up", HUGE) else "10"})


# the guard's config


@examples(150, 5000)
@given(
    given_settings=some.dictionaries(
        some.sampled_from([*THRESHOLDS, "warm_up"]), scalars | some.floats(0, 2) | some.integers(0, 5), max_size=4
    ),
    signals=some.dictionaries(
        some.sampled_from([threshold.signal for threshold in THRESHOLDS.values()]), some.floats(), max_size=7
    ),
)
def test_guard_with_any_settings_judges_or_is_refused(given_settings: dict[str, Any], signals: dict) -> None:
    try:
        guard = Guard(**given_settings)
    except ValueError as error:
        _says(error, next(name for name in [*THRESHOLDS, "warm_up"] if name in str(error)))
        return
    verdict = guard.judge({"finite": 1.0, "repeated": 0.0, **signals})
    assert verdict.learn == (not verdict.reasons)
    assert verdict.accept or verdict.reasons


def test_nothing_is_kept_between_runs_in_the_tree() -> None:
    assert not (Path(__file__).parents[2] / ".hypothesis").exists()
