# SPDX-License-Identifier: Apache-2.0
"""Several streams at once: each gives exactly the answers that it gives alone, or is refused in plain words."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.inferers import SliceInferer
from torch import Tensor, nn

from mgipt_monai import (
    MGIPT,
    VPTTA,
    AdaptationMethod,
    AdaptiveInferer,
    BatchNormAdaptation,
    PersistentInferer,
    SiteCorrection,
    Source,
    StreamingAdaptationEvaluator,
    Tent,
    TestTimeAdaptationHandler,
)
from mgipt_monai.handlers import WorkAheadHandler
from mgipt_monai.methods import Guard
from mgipt_monai.stream.state_file import read
from tests.conftest import identical, same_state, snapshot, stream, tiny_network

METHODS: dict[str, Callable[[nn.Module], AdaptationMethod]] = {
    "mgipt": lambda network: MGIPT(network, steps=2),
    "guarded": lambda network: MGIPT(network, steps=2, guard=Guard()),
    "steady": SiteCorrection,
    "vptta": VPTTA,
    "bn": BatchNormAdaptation,
    "tent": lambda network: Tent(network, lr=0.01),
    "source": Source,
}
PAIRS = [
    ("mgipt", "mgipt"),
    ("mgipt", "steady"),
    ("guarded", "vptta"),
    ("guarded", "guarded"),
    ("mgipt", "source"),
    ("bn", "tent"),
]
STREAMS = [stream(8, seed=seed) for seed in (1, 2)]


def together(*works: Callable[[], None]) -> None:
    """Do all of it at the same time, in a thread each; an error or a deadlock of one is an error here."""
    errors: list[BaseException] = []
    ready = threading.Barrier(len(works))

    def do(work: Callable[[], None]) -> None:
        ready.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=do, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    if errors:
        raise errors[0]


def alone(names: Sequence[str]) -> list[list[Tensor]]:
    found = []
    for name, images in zip(names, STREAMS, strict=True):
        method = METHODS[name](tiny_network())
        found.append([method(image) for image in images])
    return found


def assert_equal(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        assert [torch.equal(*pair) for pair in zip(one, other, strict=True)] == [True] * len(one)


@pytest.mark.parametrize("names", PAIRS)
def test_two_methods_on_one_network_from_two_threads_answer_as_each_alone(names: tuple[str, str]) -> None:
    network = tiny_network()
    before, methods = snapshot(network), [METHODS[name](network) for name in names]
    found: list[list[Tensor]] = [[], []]

    def work(i: int) -> Callable[[], None]:
        return lambda: found[i].extend(methods[i](image) for image in STREAMS[i])

    together(work(0), work(1))
    assert_equal(found, alone(names))
    assert identical(before, snapshot(network))
    assert not any("forward" in layer.__dict__ for layer in network.modules())


@pytest.mark.parametrize("names", PAIRS)
def test_two_methods_on_one_network_in_turn_answer_as_each_alone(names: tuple[str, str]) -> None:
    network = tiny_network()
    methods = [METHODS[name](network) for name in names]
    found: list[list[Tensor]] = [[], []]
    for pair in zip(*STREAMS, strict=True):
        for i, image in enumerate(pair):
            found[i].append(methods[i](image))
    assert_equal(found, alone(names))


def test_networks_that_share_layers_take_turns_as_well() -> None:
    network = tiny_network()
    methods = [METHODS["mgipt"](network), METHODS["mgipt"](nn.Sequential(nn.Identity(), network))]
    found: list[list[Tensor]] = [[], []]

    def work(i: int) -> Callable[[], None]:
        return lambda: found[i].extend(methods[i](image) for image in STREAMS[i])

    together(work(0), work(1))
    assert_equal(found, alone(("mgipt", "mgipt")))


@pytest.mark.parametrize("name", ["mgipt", "guarded"])
@pytest.mark.parametrize("shared", [False, True], ids=["a method each", "one method"])
def test_persistent_inferers_of_two_streams_share_a_network(tmp_path: Path, name: str, shared: bool) -> None:
    network = tiny_network()
    one = METHODS[name](network)
    methods = [one, one if shared else METHODS[name](network)]
    inferers = [
        PersistentInferer(method, tmp_path / f"{i}.pt", tmp_path / f"{i}.jsonl") for i, method in enumerate(methods)
    ]
    found: list[list[Tensor]] = [[], []]

    def work(i: int) -> Callable[[], None]:
        return lambda: found[i].extend(inferers[i](image, network) for image in STREAMS[i])

    together(work(0), work(1))
    assert_equal(found, alone((name, name)))
    assert [read(tmp_path / f"{i}.pt")["position"] for i in (0, 1)] == [8, 8]


class Run:
    """A run of an evaluator over one of the streams."""

    def __init__(self, folder: Path, method: AdaptationMethod | None, network: nn.Module, images: list[Tensor]) -> None:
        self.outputs: list[Tensor] = []
        items = [{"image": image[0], "name": f"{i}", "site": "A"} for i, image in enumerate(images)]
        handlers = [] if method is None else [TestTimeAdaptationHandler(method, folder / "s.pt", folder / "r.jsonl")]
        self.engine = StreamingAdaptationEvaluator(
            "cpu",
            DataLoader(Dataset(items)),
            network,
            val_handlers=handlers,
            progress=False,
            postprocessing=self._keep,
        )

    def _keep(self, output: dict) -> dict:
        self.outputs.append(output["pred"][None].clone())
        return output

    def __call__(self) -> None:
        self.engine.run()


@pytest.mark.parametrize("ahead", [False, True], ids=["plain", "ahead"])
def test_two_evaluators_on_one_network_give_what_each_gives_alone(tmp_path: Path, ahead: bool) -> None:
    network = tiny_network()
    names = ("mgipt", "guarded")
    runs = [
        Run(tmp_path / name, METHODS[name](network), network, images)
        for name, images in zip(names, STREAMS, strict=True)
    ]
    if ahead:
        for run in runs:
            WorkAheadHandler().attach(run.engine)
    together(*runs)
    assert_equal([run.outputs for run in runs], alone(names))


def test_evaluator_without_adaptation_is_not_disturbed_by_one_that_adapts(tmp_path: Path) -> None:
    network = tiny_network()
    runs = [
        Run(tmp_path / "a", METHODS["mgipt"](network), network, STREAMS[0]),
        Run(tmp_path / "b", None, network, STREAMS[1]),
    ]
    together(*runs)
    assert_equal([run.outputs for run in runs], alone(("mgipt", "source")))


@pytest.mark.parametrize("name", METHODS)
def test_plain_call_of_the_network_beside_a_thread_that_adapts_is_the_networks_own(name: str) -> None:
    network = tiny_network().eval().requires_grad_(False)
    method, image = METHODS[name](network), STREAMS[1][0]
    expected, own = network(image), threading.get_ident()
    found: list[Tensor] = []
    inside, go_on = threading.Event(), threading.Semaphore(0)

    def wait(*_: object) -> None:
        if threading.get_ident() != own:  # in the middle of each forward, in whatever way its layers normalise
            inside.set()
            go_on.acquire(timeout=60)

    outputs: list[Tensor] = []
    hook = method.network[3].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: outputs.extend(method(one) for one in STREAMS[0][:2]))
    thread.start()
    while thread.is_alive():
        if inside.wait(0.01):
            inside.clear()
            found.append(network(image))
            go_on.release()
    hook.remove()
    assert found
    assert all(torch.equal(one, expected) for one in found)
    assert_equal([outputs], [alone((name, "source"))[0][:2]])


def test_one_method_in_two_runs_at_once_is_refused(tmp_path: Path) -> None:
    method = METHODS["mgipt"](tiny_network())
    first = Run(tmp_path / "a", method, method.network, STREAMS[0])
    second = Run(tmp_path / "b", method, method.network, STREAMS[1])
    refused: list[str] = []

    def other(_engine: object) -> None:
        def run() -> None:
            try:
                second()
            except RuntimeError as error:
                refused.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)

    first.engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), other)
    first()
    assert len(refused) == 1
    assert "adapts in another run at the same time" in refused[0]
    assert_equal([first.outputs], alone(("mgipt", "mgipt"))[:1])
    assert not (tmp_path / "b" / "s.pt").exists()
    Run(tmp_path / "b", method, method.network, STREAMS[1])()  # afterwards it may


def test_slices_as_images_of_their_own_from_two_threads() -> None:
    volumes = [torch.stack([image[0] for image in images[:3]], dim=-1)[None] for images in STREAMS]
    volumes[1][..., 1] = 0.5  # a constant slice runs the network itself

    def inferer(network: nn.Module) -> AdaptiveInferer:
        slices = SliceInferer(roi_size=(24, 24), spatial_dim=2)
        return AdaptiveInferer(MGIPT(network, steps=2), slices, slices="own")

    expected = [[inferer(network := tiny_network())(volume, network)] for volume in volumes]
    network = tiny_network()
    inferers = [inferer(network), inferer(network)]
    found: list[list[Tensor]] = [[], []]

    def work(i: int) -> Callable[[], None]:
        return lambda: found[i].append(inferers[i](volumes[i], network))

    together(work(0), work(1))
    assert_equal(found, expected)


def test_methods_are_copied_and_pickled_as_before() -> None:
    method = METHODS["guarded"](tiny_network())
    method(STREAMS[0][0])
    expected = [copy.deepcopy(method)(STREAMS[0][1]), pickle.loads(pickle.dumps(method))(STREAMS[0][1])]
    assert torch.equal(*expected)
    assert torch.equal(method(STREAMS[0][1]), expected[0])
    assert not same_state(method.adaptation_state(), METHODS["guarded"](tiny_network()).adaptation_state())


def _adapt(method: AdaptationMethod, done: multiprocessing.Event) -> None:
    method(STREAMS[0][0])
    done.set()


def test_process_forked_while_a_thread_adapts_does_not_wait_for_it_for_ever() -> None:
    method = METHODS["mgipt"](tiny_network())
    context = multiprocessing.get_context("fork")
    done = context.Event()
    child = context.Process(target=_adapt, args=(METHODS["mgipt"](method.network), done))
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait(60)

    hook = method.network.register_forward_pre_hook(wait)
    thread = threading.Thread(target=method, args=(STREAMS[0][0],))
    thread.start()
    assert inside.wait(60)
    hook.remove()
    child.start()
    child.join(60)
    go_on.set()
    thread.join(60)
    assert done.is_set()
