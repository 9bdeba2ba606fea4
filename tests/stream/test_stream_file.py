# SPDX-License-Identifier: Apache-2.0
"""The state file of a stream: what it refuses, snapshots, one process at a time, and being killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from monai.data import DataLoader, Dataset

from mgipt_monai import (
    MGIPT,
    SAR,
    VPTTA,
    BatchNormAdaptation,
    CoTTA,
    GraTa,
    RecordFile,
    Source,
    StreamFile,
    StreamingAdaptationEvaluator,
    Tent,
    TestTimeAdaptationHandler,
)
from mgipt_monai.methods import DyNo, InTEnt
from mgipt_monai.stream import command as state
from mgipt_monai.stream.state_file import read
from tests.conftest import tiny_network


def mgipt(**settings) -> MGIPT:
    return MGIPT(tiny_network(), **{"steps": 1, "instance_sizes": (1,), "global_sizes": (3,), **settings})


def image(i: int) -> torch.Tensor:
    return torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(i))


def at(method: MGIPT, position: int, site: str = "A") -> dict:
    return {"adaptation": method.adaptation_state(), "position": position, "site": site}


def run(folder: Path, count: int, sites: str = "A", **settings) -> MGIPT:
    """One run over ``count`` images, resumed where an earlier one stopped."""
    items = [{"image": image(i), "name": f"{i}", "site": sites[i * len(sites) // count]} for i in range(count)]
    method = mgipt()
    settings = {"resume": True, "snapshot_every": 4, **settings}
    handler = TestTimeAdaptationHandler(method, folder / "stream.pt", folder / "records.jsonl", **settings)
    StreamingAdaptationEvaluator(
        "cpu", DataLoader(Dataset(items)), method.network, val_handlers=[handler], progress=False
    ).run()
    return method


@pytest.mark.parametrize("method", [MGIPT, SAR, VPTTA, BatchNormAdaptation, CoTTA, DyNo, GraTa, InTEnt, Source, Tent])
def test_settings_are_the_same_before_and_after_images(method: type) -> None:
    adapted = method(tiny_network())
    before = adapted.settings()
    adapted(image(0)[None])
    assert adapted.settings() == before
    assert before["class"] == method.__name__


def test_state_of_other_weights_settings_or_methods_is_refused_by_name(tmp_path: Path) -> None:
    method = mgipt()
    method(image(0)[None])
    StreamFile(tmp_path / "s.pt").save(method, at(method, 1))
    other = MGIPT(tiny_network(seed=7), steps=1, instance_sizes=(1,), global_sizes=(3,))
    for fresh, message in (
        (other, "other weights"),
        (mgipt(source_weight=0.5), r"other settings: source_weight was 0\.8, is 0\.5"),
        (mgipt(steps=2), r"instance_prompt\.steps was 1, is 2"),
        (Source(tiny_network()), "class was 'MGIPT', is 'Source'"),
    ):
        before = fresh.adaptation_state()
        with pytest.raises(ValueError, match=message):
            StreamFile(tmp_path / "s.pt").load(fresh)
        assert fresh.adaptation_state().keys() == before.keys()
        assert fresh.images_seen == 0


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"adaptation": {}, "position": 1}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"old\.pt is not a stream's state: remove it"):
        read(tmp_path / "old.pt")
    method = mgipt()
    StreamFile(tmp_path / "s.pt").save(method, at(method, 0))
    torch.save({**torch.load(tmp_path / "s.pt", weights_only=True), "version": 9}, tmp_path / "s.pt")
    with pytest.raises(ValueError, match="is of version 9, this mgipt_monai reads version 1"):
        read(tmp_path / "s.pt")
    for settings in ({"snapshot_every": 0}, {"snapshots": -1}):
        with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
            StreamFile(tmp_path / "s.pt", **settings)


def test_snapshots_are_made_at_intervals_and_sites_and_their_number_is_bounded(tmp_path: Path) -> None:
    run(tmp_path, 12, sites="AB", snapshots=10)
    assert [(s["position"], s["site"]) for s in read(tmp_path / "stream.pt")["snapshots"]] == [
        (4, "A"),
        (6, "A"),  # the state with which B began
        (10, "B"),
    ]
    run(tmp_path, 12, sites="AB", snapshots=2, resume=False)
    assert [s["position"] for s in read(tmp_path / "stream.pt")["snapshots"]] == [6, 10]
    run(tmp_path, 12, sites="AB", snapshots=0, resume=False)
    assert read(tmp_path / "stream.pt")["snapshots"] == []


def test_a_handler_that_runs_again_keeps_no_snapshot_or_weights_of_the_run_before(tmp_path: Path) -> None:
    method = mgipt()
    handler = TestTimeAdaptationHandler(method, tmp_path / "stream.pt", snapshot_every=2)
    for count in (6, 3):
        items = [{"image": image(i), "name": f"{i}", "site": "A"} for i in range(count)]
        StreamingAdaptationEvaluator(
            "cpu", DataLoader(Dataset(items)), method.network, val_handlers=[handler], progress=False
        ).run()
        assert [s["position"] for s in read(tmp_path / "stream.pt")["snapshots"]] == list(range(2, count + 1, 2))
        method.reset()
        method.network.load_state_dict(tiny_network(seed=5).state_dict())
    StreamFile(tmp_path / "stream.pt").load(
        MGIPT(tiny_network(seed=5), steps=1, instance_sizes=(1,), global_sizes=(3,))
    )


@pytest.mark.parametrize("site", ["clinic", 3, None])
def test_sites_may_be_named_or_numbered(tmp_path: Path, site: str | int | None) -> None:
    method = mgipt()
    StreamFile(tmp_path / "s.pt").save(method, at(method, 0, site))
    assert StreamFile(tmp_path / "s.pt").load(mgipt())["site"] == site


def test_rolled_back_stream_goes_on_as_it_did_then(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = run(tmp_path, 10).adaptation_state()
    before = read(tmp_path / "stream.pt")["snapshots"][0]["adaptation"]
    state.main(["rollback", str(tmp_path / "stream.pt"), "--to", "4"])
    assert "images done: 4" in capsys.readouterr().out
    assert torch.equal(read(tmp_path / "stream.pt")["adaptation"]["teachers"][0], before["teachers"][0])
    again = run(tmp_path, 10).adaptation_state()
    assert torch.equal(again["teachers"][0], whole["teachers"][0])
    assert len(RecordFile(tmp_path / "records.jsonl").read()) == 10


def test_commands_show_compare_and_refuse(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path / "one", 3)
    run(tmp_path / "other", 5)
    one, other = (str(tmp_path / name / "stream.pt") for name in ("one", "other"))
    state.main(["diff", one, one])
    assert capsys.readouterr().out == "no difference\n"
    state.main(["diff", one, other])
    printed = capsys.readouterr().out
    assert "position was 3, is 5" in printed
    assert "teachers: largest difference" in printed
    for arguments, message in (
        (["rollback", other, "--to", "3"], "no snapshot after 3 images; there are: 4"),
        (["show", str(tmp_path / "absent.pt")], "there is no adaptation state"),
    ):
        with pytest.raises(SystemExit):
            state.main(arguments)
        assert message in capsys.readouterr().err


def _hold(path: Path, ready: multiprocessing.Event) -> None:
    stream = StreamFile(path)
    stream.acquire()
    ready.set()
    time.sleep(60)


def test_second_process_gets_a_clear_error_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "stream.pt", ready))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(RuntimeError, match=r"another process adapts with .*stream\.pt"):
        run(tmp_path, 2)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert run(tmp_path, 2).images_seen == 2


def test_lock_is_let_go_after_a_run_and_after_a_refused_start(tmp_path: Path) -> None:
    run(tmp_path, 2)
    (tmp_path / "records.jsonl").unlink()
    with pytest.raises(ValueError, match="start a new stream"):
        run(tmp_path, 3)
    assert run(tmp_path, 3, resume=False).images_seen == 3


def test_size_and_content_do_not_depend_on_how_many_images_were_seen(tmp_path: Path) -> None:
    run(tmp_path / "few", 12, snapshots=2)
    run(tmp_path / "many", 60, snapshots=2)
    few, many = (read(tmp_path / name / "stream.pt") for name in ("few", "many"))
    shapes = [[tuple(t.shape) for t in content["adaptation"]["students"]] for content in (few, many)]
    assert shapes[0] == shapes[1] == [(1, 3, 3, 3)]
    assert set(few["adaptation"]) == set(many["adaptation"])
    sizes = [(tmp_path / name / "stream.pt").stat().st_size for name in ("few", "many")]
    assert abs(sizes[0] - sizes[1]) < 256


def _run_in_child(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    # by chance an image is hit twice, which by default would be put down to the image
    run(folder, count, sites="AB", attempts=None)


@pytest.mark.slow
def test_killed_at_any_moment_it_loads_resumes_and_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    count, kills = 60, 100 if os.environ.get("MGIPT_ATTACK") == "full" else 40
    run(tmp_path / "whole", count, sites="AB")
    context, chance = multiprocessing.get_context("fork"), random.Random(0)
    folder, done, reached = tmp_path / "killed", 0, 0
    while done < kills:
        child = context.Process(target=_run_in_child, args=(folder, count))
        child.start()
        child.join(chance.uniform(0.0, 0.25))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        done += 1
        if (folder / "stream.pt").exists():
            content = read(folder / "stream.pt")
            # what was saved is never lost
            assert content["position"] >= reached
            reached = content["position"]
            if reached == count:
                reached = content["snapshots"][0]["position"]
                state.main(["rollback", str(folder / "stream.pt"), "--to", str(reached)])
    run(folder, count, sites="AB", attempts=None)
    ends = [read(tmp_path / name / "stream.pt") for name in ("whole", "killed")]
    for role in ("students", "teachers"):
        assert torch.equal(ends[0]["adaptation"][role][0], ends[1]["adaptation"][role][0])
    assert ends[0]["position"] == ends[1]["position"] == count
    records = [RecordFile(tmp_path / name / "records.jsonl").read() for name in ("whole", "killed")]
    assert [row["name"] for row in records[0]] == [row["name"] for row in records[1]]
    assert [row["loss_after"] for row in records[0]] == [row["loss_after"] for row in records[1]]
