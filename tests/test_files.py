# SPDX-License-Identifier: Apache-2.0
"""State files, record files, summaries and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mgipt_monai import (
    MGIPT,
    RecordFile,
    StreamSummary,
    load_encoder_weights,
    load_source_weights,
    load_state,
    save_state,
)
from mgipt_monai.stream.terminal import in_words
from mgipt_monai.utils.files import atomic_path, root_cause
from tests.conftest import identical, snapshot, tiny_network


def test_state_file_round_trip(tmp_path: Path) -> None:
    state = {"version": 1, "students": [torch.rand(2, 3)], "position": 4}
    save_state(state, tmp_path / "new" / "state.pt")
    loaded = load_state(tmp_path / "new" / "state.pt")
    assert torch.equal(loaded["students"][0], state["students"][0])
    assert loaded["position"] == 4


def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_unreadable_state_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state.pt is not a readable adaptation state"):
        load_state(tmp_path / "state.pt")
    with pytest.raises(FileNotFoundError, match=r"absent.pt"):
        load_state(tmp_path / "absent.pt")


def test_state_with_code_is_refused(tmp_path: Path) -> None:
    torch.save(tiny_network(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match="not a readable adaptation state"):
        load_state(tmp_path / "state.pt")


def test_records_survive_a_line_cut_off(tmp_path: Path) -> None:
    records = RecordFile(tmp_path / "records.jsonl")
    for i in range(3):
        records.append({"name": f"{i}", "status": "ok", "seconds": 0.1, "loss": float("nan") if i == 0 else 0.1})
    with records.path.open("a") as file:
        file.write('{"name": "cut')
    assert [row["name"] for row in records.read()] == ["0", "1", "2"]
    assert records.read()[0]["loss"] is None
    assert [row["name"] for row in records.keep(2)] == ["0", "1"]
    records.append({"name": "new", "status": "ok", "seconds": 0.1})
    assert [row["name"] for row in records.read()] == ["0", "1", "new"]
    with pytest.raises(ValueError, match="3 of the 9"):
        records.keep(9)


def test_log_line_says_why_an_image_fell_back() -> None:
    row = {"name": "eye", "status": "ok", "seconds": 0.5, "forwards": 43, "decision": "adapted", "reasons": ["far"]}
    assert in_words(row) == "eye: 43 forward passes, 0.50 s"
    refused = {**row, "decision": "unadapted", "reasons": ["the mask is empty", "far"]}
    assert in_words(refused) == "eye: predicted without adaptation since the mask is empty, 43 forward passes, 0.50 s"


def row(site: str, disc: float | None, cup: float | None, status: str = "ok") -> dict:
    return {"site": site, "status": status, "seconds": 2.0, "metrics": {"dsc": {"disc": disc, "cup": cup}}}


def test_summary_by_hand() -> None:
    summary = StreamSummary()
    for i in range(20):
        summary.add(row("A", i / 20, 1.0))
    summary.add(row("B", 0.5, None))  # an absent class
    summary.add({"site": "B", "status": "failed", "seconds": 0.1, "name": "B/2", "reason": "empty"})
    figures = summary.figures()
    dsc = figures["A"]["metrics"]["dsc"]
    assert dsc["disc"] == pytest.approx(0.475)
    assert dsc["cup"] == 1
    assert dsc["mean"] == pytest.approx(0.7375)
    assert dsc["worst_tenth"] == pytest.approx((0.5 + 0.525) / 2)
    assert figures["B"]["metrics"]["dsc"] == {"disc": 0.5, "mean": 0.5, "worst_tenth": 0.5}
    assert (figures["B"]["images"], figures["B"]["failed"], summary.failures) == (1, 1, ["B/2: empty"])
    assert figures["all"]["metrics"]["dsc"]["disc"] == pytest.approx((20 * 0.475 + 0.5) / 21)
    assert figures["all"]["seconds_per_image"] == 2
    assert summary.means["dsc"] == pytest.approx(figures["all"]["metrics"]["dsc"]["mean"])


def test_table_has_a_line_per_site_in_the_order_of_the_stream() -> None:
    summary = StreamSummary()
    for site in ("north", "east"):
        summary.add(row(site, 0.9, 0.8))
    lines = summary.table().splitlines()
    assert [line.split()[0] for line in lines] == ["site", "north", "east", "all"]
    assert lines[1].split()[3:6] == ["90.00", "80.00", "85.00"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}, "stats": [0.5]},
        lambda s: {"network_weights": s, "trainer_name": "nnUNetTrainer"},
        lambda s: {f"module.{key}": value for key, value in s.items()},
        lambda s: {"model": {f"module.{key}": value for key, value in s.items()}},
    ],
)
def test_checkpoints_of_the_usual_layouts_load(tmp_path: Path, wrap) -> None:
    torch.save(wrap(tiny_network(seed=4).state_dict()), tmp_path / "w.pt")
    network = tiny_network(seed=5)
    load_source_weights(network, tmp_path / "w.pt")
    assert identical(snapshot(network), snapshot(tiny_network(seed=4)))


def test_checkpoint_that_does_not_fit_is_named_with_the_keys_and_changes_nothing(tmp_path: Path) -> None:
    state = tiny_network(in_channels=1).state_dict()
    state["extra.weight"] = state.pop("7.bias")
    torch.save(state, tmp_path / "w.pt")
    network = tiny_network()
    before = snapshot(network)
    with pytest.raises(
        ValueError, match=r"w.pt does not fit.*missing: 7.bias; unknown: extra.weight; .*shape: 0.weight"
    ):
        load_source_weights(network, tmp_path / "w.pt")
    assert identical(before, snapshot(network))


def test_prefix_of_a_parallel_network_stays_where_it_belongs_and_is_no_excuse(tmp_path: Path) -> None:
    wrapped = nn.DataParallel(tiny_network(seed=4))
    torch.save(wrapped.state_dict(), tmp_path / "w.pt")
    other = nn.DataParallel(tiny_network(seed=5))
    load_source_weights(other, tmp_path / "w.pt")
    assert identical(snapshot(other), snapshot(wrapped))
    state = wrapped.state_dict()
    state["7.bias"] = state.pop("module.7.bias")  # a prefix on only some keys is not a DataParallel checkpoint
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"missing: 0.weight, .*unknown: module.0.weight"):
        load_source_weights(tiny_network(), tmp_path / "w.pt")


def test_checkpoint_that_is_absent_or_unreadable_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent.pt: set ckpt_path"):
        load_source_weights(tiny_network(), tmp_path / "absent.pt")
    (tmp_path / "w.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"w.pt cannot be read"):
        load_source_weights(tiny_network(), tmp_path / "w.pt")
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds a list"):
        load_source_weights(tiny_network(), tmp_path / "w.pt")


def test_encoder_weights_of_before_batches_were_counted_load_and_others_are_named(tmp_path: Path) -> None:
    state = {k: v for k, v in tiny_network(seed=4).state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "e.pt")
    encoder = tiny_network(seed=5)
    load_encoder_weights(encoder, tmp_path / "e.pt")
    assert identical(snapshot(encoder), snapshot(tiny_network(seed=4)))
    torch.save({"fc.weight": torch.zeros(1), **state}, tmp_path / "e.pt")
    with pytest.raises(
        ValueError, match=r"e\.pt does not fit.*unknown: fc\.weight.*set encoder_path to weights of this"
    ):
        load_encoder_weights(encoder, tmp_path / "e.pt")
    with pytest.raises(FileNotFoundError, match=r"no file at .*none\.pt: set encoder_path"):
        load_encoder_weights(encoder, tmp_path / "none.pt")


def test_message_of_this_package_reaches_the_user_as_it_is(tmp_path: Path) -> None:
    """Neither what was behind it takes its place, nor is it taken for one of Python's own."""
    (tmp_path / "state.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is not a readable") as damaged:
        load_state(tmp_path / "state.pt")
    assert damaged.value.__cause__ is not None
    with pytest.raises(TypeError, match="output must be") as unfit:
        MGIPT(tiny_network(), output=[1])
    for caught in (damaged, unfit):
        wrapped = RuntimeError("applying transform")
        wrapped.__cause__ = caught.value
        assert root_cause(wrapped) == str(caught.value)


def test_message_of_python_itself_becomes_a_sentence() -> None:
    with pytest.raises(TypeError) as caught:
        load_state(3)  # type: ignore[arg-type]
    assert "not of a kind that can be processed (TypeError: " in root_cause(caught.value)
