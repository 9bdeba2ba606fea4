# SPDX-License-Identifier: Apache-2.0
"""The handler that forgets the stream at each site: equal to a run of each site alone, whatever happens between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator

from mgipt_monai import (
    MGIPT,
    AdaptationMethod,
    StreamFailedError,
    StreamingAdaptationEvaluator,
    Tent,
    TestTimeAdaptationHandler,
    load_state,
)
from mgipt_monai.data.dataset import FAILURE
from tests.conftest import same_state, stream, tiny_network


def items(sites: str) -> list[dict]:
    return [
        {"image": image[0], "site": site, "name": f"{site}/{i}"}
        for i, (image, site) in enumerate(zip(stream(len(sites)), sites, strict=True))
    ]


def method(kind: str = "mgipt") -> AdaptationMethod:
    return MGIPT(tiny_network(), steps=2) if kind == "mgipt" else Tent(tiny_network())


def evaluator(data: list[dict], streaming: bool = True, batch_size: int = 1, **settings) -> tuple[Engine, list]:
    """An evaluator with the handler, and the list that gets each image's prediction."""
    settings = {"method": method(), "reset_at_site": True} | settings
    loader = DataLoader(Dataset(data), batch_size=batch_size)
    kind = StreamingAdaptationEvaluator if streaming else SupervisedEvaluator
    engine = kind("cpu", loader, settings["method"].network, val_handlers=[TestTimeAdaptationHandler(**settings)])
    return engine, collect(engine)


def collect(engine: Engine) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.extend(o["pred"] for o in e.state.output))
    return outputs


def alone(data: list[dict], kind: str = "mgipt") -> list[torch.Tensor]:
    """Predictions of a fresh method on these images."""
    fresh = method(kind)
    return [fresh(item["image"][None])[0] for item in data]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["mgipt", "tent"])
@pytest.mark.parametrize("streaming", [False, True])
def test_reset_at_each_site_equals_a_run_of_each_site_alone(streaming: bool, kind: str) -> None:
    data = items("AABBA")  # coming back to a site is a border too
    engine, outputs = evaluator(data, streaming, method=method(kind))
    engine.run()
    assert same(outputs, alone(data[:2], kind) + alone(data[2:4], kind) + alone(data[4:], kind))


def test_without_it_the_adaptation_goes_on_over_the_border() -> None:
    data = items("AABB")
    engine, outputs = evaluator(data, reset_at_site=False)
    engine.run()
    assert same(outputs, alone(data))
    assert not torch.equal(outputs[2], alone(data[2:])[0])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_resuming_at_the_border_or_inside_a_site_equals_not_stopping(
    after: int, streaming: bool, tmp_path: Path
) -> None:
    data = items("AABBA")
    engine, whole = evaluator(data, streaming, state_path=tmp_path / "whole.pt")
    engine.run()
    first, before = evaluator(data, streaming, state_path=tmp_path / "parts.pt")
    first.add_event_handler(Events.ITERATION_COMPLETED(once=after), Engine.terminate)
    first.run()
    saved = load_state(tmp_path / "parts.pt")
    assert (saved["position"], saved["site"]) == (after, data[after - 1]["site"])
    second, rest = evaluator(data, streaming, state_path=tmp_path / "parts.pt", resume=True)
    second.run()
    assert same(before + rest, whole)
    one, other = (load_state(tmp_path / name) for name in ("whole.pt", "parts.pt"))
    assert same_state(one["adaptation"], other["adaptation"])
    assert (one["position"], one["site"]) == (other["position"], other["site"]) == (5, "A")


def bad(kind: str, site: str) -> dict:
    """An image that cannot be read, cannot be adapted to, or fails when it is adapted to already."""
    item = {"image": stream(1, seed=9)[0][0], "site": site, "name": f"{site}/bad"}
    if kind == "unreadable":
        return {"site": site, "name": item["name"], FAILURE: "broken"}
    if kind == "nan":
        return {**item, "image": torch.full((3, 24, 24), float("nan"))}
    return {**item, "label": torch.zeros(1, 9, 9)}


@pytest.mark.parametrize("kind", ["unreadable", "nan", "late"])
def test_image_that_fails_right_after_the_border_neither_undoes_nor_doubles_the_reset(kind: str) -> None:
    data = items("AABB")
    engine, outputs = evaluator([*data[:2], bad(kind, "B"), data[2], bad(kind, "B"), data[3]])
    with pytest.raises(StreamFailedError, match="2 of 6"):
        engine.run()
    assert same(outputs, alone(data[:2]) + alone(data[2:]))


def test_method_is_reset_at_the_border_even_if_no_image_of_the_site_can_be_read() -> None:
    reset = method()
    engine, _ = evaluator([*items("AA"), bad("late", "B")], method=reset)
    with pytest.raises(StreamFailedError, match="1 of 3"):
        engine.run()
    assert same_state(reset.adaptation_state(), method().adaptation_state())


@pytest.mark.parametrize("streaming", [False, True])
def test_run_that_ends_right_after_the_border_leaves_and_resumes_what_was_before_it(
    streaming: bool, tmp_path: Path
) -> None:
    data = items("AABB")
    before = method()
    for item in data[:2]:
        before(item["image"][None])
    stopped = method()
    first, _ = evaluator([*data[:2], bad("nan", "B")], streaming, method=stopped, state_path=tmp_path / "state.pt")
    first.stop_on_failure = True
    with pytest.raises(ValueError, match="NaN"):
        first.run()
    assert same_state(stopped.adaptation_state(), before.adaptation_state())
    assert load_state(tmp_path / "state.pt")["site"] == "A"
    second, outputs = evaluator(data, streaming, state_path=tmp_path / "state.pt", resume=True)
    second.run()
    assert same(outputs, alone(data[2:]))


def test_handler_whose_run_ended_at_the_border_is_reset_there_in_its_next_run() -> None:
    data = items("AABB")
    stopped, _ = evaluator([*data[:2], bad("nan", "B")], streaming=False)
    with pytest.raises(ValueError, match="NaN"):
        stopped.run()
    engine = SupervisedEvaluator("cpu", DataLoader(Dataset(data[2:]), batch_size=1), stopped.network)
    stopped.adaptation_handler.attach(engine)
    outputs = collect(engine)
    engine.run()
    assert same(outputs, alone(data[2:]))


def test_next_run_and_start_from_know_the_latest_site(tmp_path: Path) -> None:
    data = items("AB")
    engine, outputs = evaluator(data, state_path=tmp_path / "earlier.pt")
    engine.run()
    engine.run()
    assert same(outputs, [*alone(data[:1]), *alone(data[1:])] * 2)
    for site, expected in (("A", alone(data[:1])), ("B", alone([data[1], data[0]])[1:])):
        again = [{**data[0], "site": site}]
        engine, outputs = evaluator(again, start_from=tmp_path / "earlier.pt")
        engine.run()
        assert same(outputs, expected)


def test_the_latest_site_is_known_after_a_run_without_resets_too(tmp_path: Path) -> None:
    data = items("AB")
    evaluator(data[:1], state_path=tmp_path / "a.pt")[0].run()
    evaluator(data[1:], state_path=tmp_path / "b.pt", start_from=tmp_path / "a.pt", reset_at_site=False)[0].run()
    assert load_state(tmp_path / "a.pt")["site"] == "A"
    assert load_state(tmp_path / "b.pt")["site"] == "B"


def test_adaptation_whose_site_is_not_known_goes_on_at_the_first_image() -> None:
    data = items("ABA")
    adapted = method()
    adapted(data[0]["image"][None])
    engine, outputs = evaluator(data[1:], method=adapted)
    engine.run()
    assert same(outputs, alone(data[:2])[1:] + alone(data[2:]))


def test_batches_of_one_site_are_reset_and_mixed_ones_refused() -> None:
    data = items("AABB")
    engine, outputs = evaluator(data, streaming=False, batch_size=2)
    engine.run()
    assert same(outputs, alone(data[:2]) + alone(data[2:]))
    untouched = method()
    engine, outputs = evaluator(data[1:3], streaming=False, batch_size=2, method=untouched)
    with pytest.raises(ValueError, match=r"needs batch size 1: a batch has images of the sites \['A', 'B'\]"):
        engine.run()
    assert not outputs
    assert untouched.images_seen == 0


def test_sites_may_be_numbers(tmp_path: Path) -> None:
    data = [{**item, "site": int(item["site"] == "B")} for item in items("AB")]
    engine, outputs = evaluator(data, streaming=False, state_path=tmp_path / "state.pt")
    engine.run()
    assert same(outputs, alone(data[:1]) + alone(data[1:]))
    assert load_state(tmp_path / "state.pt")["site"] == 1


def test_images_without_a_site_are_an_error() -> None:
    engine, _ = evaluator([{"image": stream(1)[0][0]}], streaming=False)
    with pytest.raises(ValueError, match="reset_at_site needs each image's site"):
        engine.run()
