# SPDX-License-Identifier: Apache-2.0
"""Two processes with a stream each: one summary, averaged prompts, and no process that waits in vain."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.metrics import DiceMetric
from monai.transforms import Activationsd, AsDiscreted, Compose

from mgipt_monai import (
    MGIPT,
    VPTTA,
    AdaptationEvents,
    RecordFile,
    StreamFailedError,
    StreamingAdaptationEvaluator,
    StreamSummary,
    TestTimeAdaptationHandler,
    load_state,
)
from mgipt_monai.data.dataset import FAILURE
from mgipt_monai.handlers import AveragePromptsHandler
from tests.conftest import same_state, stream, tiny_network

LENGTHS = (4, 7)
EVERY = 2
FAILED = 2
"""Place of the image of the second process that fails."""


class States:
    """Keeps the method's state after each image, as the handlers attached before it have left it."""

    def __init__(self, method: MGIPT) -> None:
        self.method, self.seen = method, []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep)
        engine.add_event_handler(AdaptationEvents.IMAGE_FAILED, self._keep)

    def _keep(self, _engine: Engine) -> None:
        self.seen.append(self.method.adaptation_state())


def items(rank: int) -> list[dict]:
    site = "AB"[rank]
    images = stream(LENGTHS[rank], seed=rank + 1)
    data = [
        {"image": image[0], "label": (image[0, :2] > 0.5).float(), "site": site, "name": f"{site}/{i}"}
        for i, image in enumerate(images)
    ]
    if rank == 1:
        data[FAILED] = {FAILURE: "B/2.png: broken", "name": "B/2", "site": "B"}
    return data


class Run:
    """One run of this process's stream; what came of it."""

    def __init__(self, folder: Path, every: int | None = EVERY, resume: bool = False) -> None:
        rank = idist.get_rank()
        self.mgipt = MGIPT(tiny_network(), steps=1)
        self.before, self.after = States(self.mgipt), States(self.mgipt)
        files = folder / f"state_{rank}.pt", folder / f"records_{rank}.jsonl"
        averaging = [] if every is None else [AveragePromptsHandler(self.mgipt, every)]
        adapting = TestTimeAdaptationHandler(self.mgipt, *files, resume=resume)
        self.evaluator = StreamingAdaptationEvaluator(
            "cpu",
            DataLoader(Dataset(items(rank)), batch_size=1),
            self.mgipt.network,
            image_metrics={"dsc": DiceMetric(reduction="none")},
            class_names=["disc", "cup"],
            postprocessing=Compose([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5)]),
            val_handlers=[self.before, *averaging, self.after, adapting],
            progress=False,
            summary_path=folder / "summary.json",
        )

    def result(self) -> dict:
        error = ""
        try:
            self.evaluator.run()
        except (StreamFailedError, KeyboardInterrupt) as raised:
            error = str(raised)
        return {
            "error": error,
            "before": self.before.seen,
            "after": self.after.seen,
            "final": self.mgipt.adaptation_state(),
            "figures": self.evaluator.state.summary.figures(),
            "metrics": self.evaluator.state.metrics,
        }


def interrupt(_engine: Engine) -> None:
    raise KeyboardInterrupt


def process(rank: int, folder: str) -> None:
    """Everything that needs two processes, one after the other, in one launch."""
    root, results = Path(folder), {}
    results["whole"] = Run(root / "whole").result()

    # both stop between the same two averagings, at other images
    run = Run(root / "parts")
    run.evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=(3, 2)[rank]), interrupt)
    run.result()
    results["resumed"] = Run(root / "parts", resume=True).result()

    # the first one stops before an averaging, the second one after it
    run = Run(root / "apart", every=None)
    run.evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=(1, 2)[rank]), interrupt)
    run.result()
    results["apart"] = Run(root / "apart", resume=True).result()

    # the second one ends early by itself; then the first one has nothing left to do
    run = Run(root / "early")
    if rank == 1:
        run.evaluator.add_event_handler(AdaptationEvents.IMAGE_FAILED, Engine.terminate)
    results["early"] = run.result()
    results["rest"] = Run(root / "early", resume=True).result()
    torch.save(results, root / f"results_{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    # one that waits in vain ends by the time limit, with an error
    options = {"init_method": f"file://{root}/group", "timeout": timedelta(seconds=60)}
    idist.spawn("gloo", process, (str(root),), nproc_per_node=2, **options)
    return root


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict]:
    return [torch.load(folder / f"results_{rank}.pt", weights_only=True) for rank in (0, 1)]


def prompts(state: dict) -> list[torch.Tensor]:
    return [*state["students"], *state["teachers"]]


def test_after_an_averaging_both_hold_the_mean_of_what_they_had(results: list[dict]) -> None:
    runs = [result["whole"] for result in results]
    for place in (1, 3):
        had = [prompts(run["before"][place]) for run in runs]
        assert not torch.equal(had[0][0], had[1][0])
        for run in runs:
            for mean, one, other in zip(prompts(run["after"][place]), *had, strict=True):
                assert torch.equal(mean, (one + other) / 2)


def test_nothing_is_averaged_elsewhere_nor_after_the_shortest_stream(results: list[dict]) -> None:
    for result, count in zip(results, LENGTHS, strict=True):
        run = result["whole"]
        assert len(run["after"]) == count
        for place in set(range(count)) - {1, 3}:
            assert same_state(run["before"][place], run["after"][place])


def test_failed_image_counts_and_does_not_undo_the_averaging(results: list[dict]) -> None:
    after = results[1]["whole"]["after"]
    assert same_state(after[FAILED], after[FAILED - 1])


def test_averaged_prompts_are_what_is_saved(folder: Path, results: list[dict]) -> None:
    # the last thing that the first process does is an averaging
    state = load_state(folder / "whole" / "state_0.pt")
    assert state["position"] == 4
    assert same_state(state["adaptation"], results[0]["whole"]["after"][3])


def test_summary_of_both_is_that_of_all_records(folder: Path, results: list[dict]) -> None:
    summary = StreamSummary()
    for rank in (0, 1):
        for row in RecordFile(folder / "whole" / f"records_{rank}.jsonl").read():
            summary.add(row)
    figures = summary.figures()
    assert figures["all"]["images"] + figures["all"]["failed"] == sum(LENGTHS)
    assert json.loads((folder / "whole" / "summary.json").read_text()) == figures
    for result in results:
        assert result["whole"]["figures"] == figures
        means = figures["all"]["metrics"]["dsc"]
        assert result["whole"]["metrics"] == {"dsc" if key == "mean" else f"dsc_{key}": means[key] for key in means}


def test_failed_image_ends_both_with_its_name(results: list[dict]) -> None:
    for result in results:
        assert result["whole"]["error"] == "1 of 11 images failed, the others are done:\n  B/2: B/2.png: broken"


def test_resuming_between_two_averagings_equals_one_go(results: list[dict]) -> None:
    for result in results:
        assert same_state(result["resumed"]["final"], result["whole"]["final"])


def test_averaging_that_only_one_process_has_behind_it_is_left_out(results: list[dict]) -> None:
    changed = [
        [place for place, states in enumerate(zip(run["before"], run["after"], strict=True)) if not same_state(*states)]
        for run in (result["apart"] for result in results)
    ]
    # resumed after one and two images, both average once, at their fourth
    assert changed == [[2], [1]]
    one, other = (prompts(result["apart"]["after"][place]) for result, place in zip(results, (2, 1), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_stream_that_ends_early_or_has_ended_keeps_nobody_waiting(results: list[dict]) -> None:
    assert [len(result["early"]["after"]) for result in results] == [4, 3]
    assert [len(result["rest"]["after"]) for result in results] == [0, 4]
    # where the second one ended, it stood in for its own fourth image
    for mean, one, other in zip(
        *(prompts(results[rank]["early"][when][-1]) for rank, when in ((0, "after"), (0, "before"), (1, "after"))),
        strict=True,
    ):
        assert torch.equal(mean, (one + other) / 2)


def test_alone_averaging_changes_nothing() -> None:
    finals = []
    for every in (None, 1):
        mgipt = MGIPT(tiny_network(), steps=1)
        averaging = [] if every is None else [AveragePromptsHandler(mgipt, every)]
        StreamingAdaptationEvaluator(
            "cpu",
            DataLoader(Dataset(items(0)), batch_size=1),
            mgipt.network,
            val_handlers=[*averaging, TestTimeAdaptationHandler(mgipt)],
            progress=False,
        ).run()
        finals.append(mgipt.adaptation_state())
    assert same_state(*finals)


def test_methods_without_prompts_that_last_are_refused() -> None:
    with pytest.raises(TypeError, match="VPTTA has no prompts to average: use MGIPT with global prompts"):
        AveragePromptsHandler(VPTTA(tiny_network()), 2)
    with pytest.raises(TypeError, match="MGIPT has no prompts to average"):
        AveragePromptsHandler(MGIPT(tiny_network(), global_sizes=()), 2)


def test_wrong_interval_order_and_stream_are_refused(mgipt: MGIPT) -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        AveragePromptsHandler(mgipt, 0)
    handlers = [TestTimeAdaptationHandler(mgipt), AveragePromptsHandler(mgipt, 2)]
    images = ({"image": image, "name": "a", "site": "A"} for image in stream(2))
    with pytest.raises(RuntimeError, match="attach AveragePromptsHandler first"):
        StreamingAdaptationEvaluator("cpu", images, mgipt.network, val_handlers=handlers)
    with pytest.raises(ValueError, match="the length of the stream must be known"):
        StreamingAdaptationEvaluator("cpu", images, mgipt.network, val_handlers=handlers[::-1]).run()
