# SPDX-License-Identifier: Apache-2.0
"""Working ahead changes nothing but the time: outputs, records and state are bit-identical, whatever comes between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import IterationEvents, SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from torch import nn

from mgipt_monai import (
    MGIPT,
    VPTTA,
    AdaptationMethod,
    AdaptiveInferer,
    BatchNormAdaptation,
    CoTTA,
    GraTa,
    SiteCorrection,
    Source,
    StreamFailedError,
    StreamingAdaptationEvaluator,
    Tent,
    TestTimeAdaptationHandler,
)
from mgipt_monai.handlers import WorkAheadHandler
from mgipt_monai.methods import DyNo, Guard
from tests.conftest import identical, same_state, snapshot, stream, tiny_network, without_times

METHODS: dict[str, Callable[[nn.Module], AdaptationMethod]] = {
    "mgipt": lambda network: MGIPT(network, steps=2),
    "guarded": lambda network: MGIPT(network, steps=2, guard=Guard()),
    "released": lambda network: MGIPT.released(network, steps=1),
    "steady": SiteCorrection,
    "vptta": VPTTA,
    "bn": BatchNormAdaptation,
    "dyno": DyNo,
    "tent": lambda network: Tent(network, lr=0.01),
    "cotta": CoTTA,
    "grata": GraTa,
    "source": Source,
}


def data(count: int = 6) -> DataLoader:
    items = [{"image": image[0], "name": f"{i}", "site": "AB"[2 * i // count]} for i, image in enumerate(stream(count))]
    return DataLoader(Dataset(items), batch_size=1)


class Run:
    """One run over a stream: its outputs, records and state."""

    def __init__(
        self,
        folder: Path,
        method: AdaptationMethod,
        ahead: bool,
        loader: DataLoader | None = None,
        disturb: Callable[[Engine], None] = lambda engine: None,
        **settings: Any,
    ) -> None:
        self.method, self.outputs, self.failed = method, [], ""
        self.before = snapshot(method.network)
        handlers = [TestTimeAdaptationHandler(method, folder / "state.pt", folder / "records.jsonl", **settings)]
        engine = StreamingAdaptationEvaluator(
            "cpu",
            data() if loader is None else loader,
            method.network,
            inferer=AdaptiveInferer(method),
            val_handlers=[*handlers, *([WorkAheadHandler()] if ahead else [])],
            progress=False,
        )
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep)
        disturb(engine)
        try:
            engine.run()
        except StreamFailedError as error:
            self.failed = str(error)
        self.records = without_times(folder / "records.jsonl")
        self.inferer = engine.inferer

    def _keep(self, engine: Engine) -> None:
        self.outputs.append(engine.state.output[0]["pred"].clone())


def assert_alike(tmp_path: Path, name: str, **settings: Any) -> Run:
    """Run with and without working ahead; return the run that did."""
    plain, ahead = (
        Run(tmp_path / f"{name}{ahead}", METHODS[name](tiny_network()), ahead, **settings) for ahead in (False, True)
    )
    assert len(plain.outputs) == len(ahead.outputs) > 0
    assert all(torch.equal(one, other) for one, other in zip(plain.outputs, ahead.outputs, strict=True))
    assert plain.records == ahead.records
    assert plain.failed == ahead.failed
    assert same_state(plain.method.adaptation_state(), ahead.method.adaptation_state())
    assert identical(ahead.before, snapshot(ahead.method.network))
    assert not any("forward" in layer.__dict__ for layer in ahead.method.network.modules())
    return ahead


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_same(name: str, tmp_path: Path) -> None:
    assert_alike(tmp_path, name)


def threads_of(method: AdaptationMethod) -> list[str]:
    """Note the thread of each forward of the network."""
    names: list[str] = []
    method.network.register_forward_pre_hook(lambda *_: names.append(threading.current_thread().name))
    return names


def test_all_but_the_first_image_are_done_ahead(tmp_path: Path) -> None:
    method = METHODS["mgipt"](tiny_network())
    names = threads_of(method)
    run = Run(tmp_path, method, ahead=True)
    main = threading.main_thread().name
    first = names.count(main)
    assert names[:first] == [main] * first
    assert len(names) > 4 * first
    assert all(name.startswith("work_ahead") for name in names[first:])
    # no thread is left, and the evaluator has its own inferer back
    assert not any(thread.name.startswith("work_ahead") for thread in threading.enumerate())
    assert type(run.inferer) is AdaptiveInferer


def test_the_method_has_all_of_the_latest_image(tmp_path: Path) -> None:
    kept: dict[bool, list[Any]] = {False: [], True: []}
    for ahead in kept:
        method = METHODS["mgipt"](tiny_network())

        def keep(engine: Engine, method: AdaptationMethod = method, ahead: bool = ahead) -> None:
            image = engine.state.output[0]["image"][None]
            kept[ahead] += [method.adapted_input(image).clone(), method.uncertainty.clone(), method.last[0]["index"]]

        Run(
            tmp_path / f"{ahead}",
            method,
            ahead,
            disturb=lambda engine, keep=keep: engine.add_event_handler(Events.ITERATION_COMPLETED, keep),
        )
    assert same_state(kept[False], kept[True])


def test_an_image_that_fails_after_its_adaptation_takes_back_what_was_done_ahead(tmp_path: Path) -> None:
    def no_place(engine: Engine) -> None:
        def write(engine: Engine) -> None:
            if engine.state.iteration == 3:
                raise OSError("no space left on device")

        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, write)

    run = assert_alike(tmp_path, "mgipt", disturb=no_place)
    assert "no space left" in run.failed
    assert [row["status"] for row in run.records] == ["ok", "ok", "failed", "ok", "ok", "ok"]


def test_a_bad_image_fails_in_its_turn(tmp_path: Path) -> None:
    def spoilt() -> DataLoader:
        loader = data()
        loader.dataset.data[0]["image"] = torch.full((3, 24, 24), torch.nan)
        loader.dataset.data[3]["image"] = torch.zeros(3, 24, 24)
        loader.dataset.data[5] = {"name": "5", "site": "B", "failure": "cannot be read"}
        return loader

    run = assert_alike(tmp_path, "mgipt", loader=spoilt())
    assert [row["status"] for row in run.records] == ["failed", "ok", "ok", "failed", "ok", "failed"]


def test_reset_at_a_site_and_settings_that_change_on_the_way(tmp_path: Path) -> None:
    assert_alike(tmp_path, "mgipt", reset_at_site=True)

    def slower(engine: Engine) -> None:
        def change(engine: Engine) -> None:
            engine.inferer.method.global_prompts.lr = 0.01 * engine.state.iteration

        engine.add_event_handler(Events.ITERATION_COMPLETED, change)

    assert_alike(tmp_path / "lr", "mgipt", disturb=slower)


def test_resumed_stream_is_the_same(tmp_path: Path) -> None:
    def cut(engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate())

    whole = Run(tmp_path / "whole", METHODS["mgipt"](tiny_network()), ahead=False)
    Run(tmp_path / "parts", METHODS["mgipt"](tiny_network()), ahead=True, disturb=cut)
    rest = Run(tmp_path / "parts", METHODS["mgipt"](tiny_network()), ahead=True, resume=True)
    assert len(rest.outputs) == 3
    assert all(torch.equal(*pair) for pair in zip(whole.outputs[3:], rest.outputs, strict=True))
    assert rest.records == whole.records
    assert same_state(rest.method.adaptation_state(), whole.method.adaptation_state())


def test_existing_evaluator_with_windows_and_worker_processes() -> None:
    outputs: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for ahead, kept in outputs.items():
        network = tiny_network()
        loader = DataLoader(Dataset([{"image": image[0]} for image in stream(3)]), batch_size=1, num_workers=ahead)
        engine = SupervisedEvaluator("cpu", loader, network=network, inferer=SlidingWindowInferer(16, overlap=0))
        own = engine.inferer
        TestTimeAdaptationHandler(MGIPT(network, steps=1)).attach(engine)
        if ahead:
            WorkAheadHandler().attach(engine)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine, kept=kept: kept.append(engine.state.output[0]["pred"])
        )
        engine.run()
        engine.run()
        assert engine.inferer is own
    assert len(outputs[True]) == 6
    assert all(torch.equal(*pair) for pair in zip(outputs[False], outputs[True], strict=True))


def test_method_in_the_networks_place(tmp_path: Path) -> None:
    method = METHODS["mgipt"](tiny_network())
    names = threads_of(method)
    engine = SupervisedEvaluator("cpu", data(), network=method)
    TestTimeAdaptationHandler().attach(engine)
    WorkAheadHandler().attach(engine)
    engine.run()
    assert method.images_seen == 6
    assert any(name.startswith("work_ahead") for name in names)


def test_error_that_ends_the_run_leaves_no_thread(tmp_path: Path) -> None:
    def broken(engine: Engine) -> None:
        def stop(engine: Engine) -> None:
            raise ZeroDivisionError

        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), stop)

    with pytest.raises(ZeroDivisionError):
        Run(tmp_path, METHODS["mgipt"](tiny_network()), ahead=True, disturb=broken)
    assert not any(thread.name.startswith("work_ahead") for thread in threading.enumerate())


def test_without_adaptation_there_is_nothing_to_do_ahead(network: nn.Module) -> None:
    engine = SupervisedEvaluator("cpu", data(), network=network)
    WorkAheadHandler().attach(engine)
    with pytest.raises(TypeError, match="attach TestTimeAdaptationHandler first"):
        engine.run()
