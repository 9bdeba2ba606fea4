# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanDice, from_engine
from monai.metrics import DiceMetric
from monai.transforms import Activationsd, AsDiscreted, Compose
from torch import nn

from mgipt_monai import (
    MGIPT,
    AdaptiveInferer,
    RecordFile,
    Source,
    StreamFailedError,
    StreamingAdaptationEvaluator,
    TestTimeAdaptationHandler,
)
from mgipt_monai.data import CheckLogitsd
from mgipt_monai.data.dataset import FAILURE
from mgipt_monai.methods.base import Prediction
from tests.conftest import same_state, stream, tiny_network, without_times

BAD = {FAILURE: "A/bad.png: broken", "name": "A/bad", "site": "A"}


def items(count: int = 4) -> list[dict]:
    sites = ["A"] * (count - 1) + ["B"]
    return [
        {"image": image[0], "label": (image[0, :2] > 0.5).float(), "site": site, "name": f"{site}/{i}"}
        for i, (image, site) in enumerate(zip(stream(count), sites, strict=True))
    ]


def build(data: list[dict], tmp_path: Path | None = None, resume: bool = False, **kwargs):
    mgipt = MGIPT(tiny_network(), steps=2)
    handlers = []
    if tmp_path is not None:
        handlers = [TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", tmp_path / "records.jsonl", resume)]
    evaluator = StreamingAdaptationEvaluator(
        "cpu",
        DataLoader(Dataset(data), batch_size=1),
        mgipt.network,
        AdaptiveInferer(mgipt),
        image_metrics={"dsc": DiceMetric(reduction="none")},
        class_names=["disc", "cup"],
        postprocessing=Compose([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5)]),
        val_handlers=handlers,
        **kwargs,
    )
    return mgipt, evaluator


def test_it_is_a_supervised_evaluator() -> None:
    # other parts of MONAI (federated learning) ask for the class
    assert issubclass(StreamingAdaptationEvaluator, SupervisedEvaluator)


def test_figures_per_site_and_overall_are_the_means_of_the_images(tmp_path: Path) -> None:
    _, evaluator = build(items(), tmp_path, summary_path=tmp_path / "summary.json")
    evaluator.run()
    rows = RecordFile(tmp_path / "records.jsonl").read()
    assert [row["name"] for row in rows] == ["A/0", "A/1", "A/2", "B/3"]
    disc = [row["metrics"]["dsc"]["disc"] for row in rows]
    figures = evaluator.state.summary.figures()
    assert list(figures) == ["A", "B", "all"]
    assert figures["A"]["metrics"]["dsc"]["disc"] == pytest.approx(sum(disc[:3]) / 3)
    assert figures["all"]["metrics"]["dsc"]["disc"] == pytest.approx(sum(disc) / 4)
    assert evaluator.state.metrics["dsc"] == figures["all"]["metrics"]["dsc"]["mean"]
    assert json.loads((tmp_path / "summary.json").read_text()) == figures


class Watched(Source):
    """The source network with a drift monitor that raises its alarm at the third image."""

    def _adapt_and_predict(self, image: torch.Tensor) -> Prediction:
        prediction = super()._adapt_and_predict(image)
        monitor = {"alarm": self.images_seen >= 2, "signal": "brightness"}
        return Prediction(prediction.logits, {**prediction.record, "monitor": monitor})


def test_alarm_for_drift_is_said_once_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(tiny_network())
    StreamingAdaptationEvaluator(
        "cpu", DataLoader(Dataset(items(5)[:4]), batch_size=1), watched.network, AdaptiveInferer(watched)
    ).run()
    (said,) = (record for record in caplog.records if "certificate" in record.message)
    assert said.levelname == "WARNING"
    assert "the images of A have changed (brightness), at A/2 at the latest" in said.message


def test_metrics_are_those_of_the_written_prediction() -> None:
    mgipt, evaluator = build(items(1))
    outputs = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output[0]))
    evaluator.run()
    pred, label = outputs[0]["pred"], outputs[0]["label"]
    disc = 2 * (pred[0] * label[0]).sum() / (pred[0].sum() + label[0].sum())
    assert evaluator.state.record["metrics"]["dsc"]["disc"] == pytest.approx(disc.item())
    assert evaluator.state.record["instance_size"] == mgipt.last[0]["instance_size"]


class TwoOutputs(nn.Module):
    """A network that returns its logits in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_network()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": x, "logits": self.inner(x)}


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (None, "TwoOutputs returns a dict with the keys 'features', 'logits' instead of logits: name the logits, "),
        ("mask", "output='mask' is not among the network's outputs, which are a dict with the keys 'features', "),
        ("features", "the network returns 3 channels, class_names and head need 2 "),
    ],
)
def test_network_whose_output_fits_no_image_ends_the_run_in_its_own_words(
    output: str | None, said: str, tmp_path: Path
) -> None:
    mgipt = MGIPT(TwoOutputs(), output=output, steps=1)
    evaluator = StreamingAdaptationEvaluator(
        "cpu",
        DataLoader(Dataset(items(2)), batch_size=1),
        mgipt.network,
        AdaptiveInferer(mgipt),
        postprocessing=Compose([CheckLogitsd("pred", channels=2)]),
        val_handlers=[TestTimeAdaptationHandler(mgipt, record_path=tmp_path / "records.jsonl")],
    )
    with pytest.raises(TypeError, match="^" + re.escape(said)):
        evaluator.run()
    assert mgipt.images_seen == 0
    assert not (tmp_path / "records.jsonl").exists() or not RecordFile(tmp_path / "records.jsonl").read()


def test_bad_image_is_recorded_leaves_the_state_and_the_run_goes_on(tmp_path: Path) -> None:
    good = items(3)
    clean, evaluator = build(good)
    evaluator.run()
    nan = {**good[0], "image": torch.full((3, 24, 24), float("nan")), "name": "A/nan"}
    mgipt, evaluator = build([good[0], BAD, nan, *good[1:]], tmp_path)
    with pytest.raises(StreamFailedError, match=r"2 of 5 images failed") as error:
        evaluator.run()
    assert "A/bad.png: broken" in str(error.value)
    assert "A/nan: the image has 1728 NaN" in str(error.value)
    assert same_state(mgipt.adaptation_state(), clean.adaptation_state())
    rows = RecordFile(tmp_path / "records.jsonl").read()
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok", "ok"]
    assert "broken" in rows[1]["reason"]
    assert evaluator.state.summary.figures()["all"]["failed"] == 2
    assert evaluator.state.summary.figures()["all"]["images"] == 3


def test_records_have_the_round_of_images_that_have_one(tmp_path: Path) -> None:
    rounds = [{**item, "round": i + 1} for i, item in enumerate([*items(2), BAD])]
    _, evaluator = build([*rounds, items(1)[0]], tmp_path)
    with pytest.raises(StreamFailedError, match="1 of 4"):
        evaluator.run()
    rows = RecordFile(tmp_path / "records.jsonl").read()
    assert [row.get("round") for row in rows] == [1, 2, 3, None]
    assert list(rows[2])[:4] == ["name", "site", "round", "status"]


def test_failure_after_the_adaptation_undoes_it(tmp_path: Path) -> None:
    good = items(2)
    clean, evaluator = build(good)
    evaluator.run()
    unsaved = {**good[0], "label": torch.zeros(2, 9, 9), "name": "A/label"}  # the metric cannot take it
    mgipt, evaluator = build([good[0], unsaved, good[1]])
    with pytest.raises(StreamFailedError, match="1 of 3"):
        evaluator.run()
    assert same_state(mgipt.adaptation_state(), clean.adaptation_state())


def test_other_metrics_and_handlers_do_not_see_a_failed_image() -> None:
    good = items(3)
    metric = {"mean_dice": MeanDice(output_transform=from_engine(["pred", "label"]))}
    _, clean = build(good, key_val_metric=metric)
    clean.run()
    expected = clean.state.metrics["mean_dice"]
    _, evaluator = build([good[0], BAD, *good[1:]], key_val_metric=metric)
    with pytest.raises(StreamFailedError):
        evaluator.run()
    assert evaluator.state.metrics["mean_dice"] == expected


def test_stop_on_failure_ends_at_the_first_bad_image(tmp_path: Path) -> None:
    good = items(3)
    mgipt, evaluator = build([good[0], BAD, *good[1:]], tmp_path, stop_on_failure=True)
    with pytest.raises(ValueError, match="broken"):
        evaluator.run()
    assert mgipt.images_seen == 1


def test_resume_after_failures_and_an_interruption_equals_one_go(tmp_path: Path) -> None:
    good = items(4)
    data = [good[0], BAD, *good[1:]]
    whole, one_go = build(data, tmp_path / "whole")
    with pytest.raises(StreamFailedError):
        one_go.run()
    _, first = build(data, tmp_path / "parts")
    first.add_event_handler(Events.ITERATION_COMPLETED(once=3), _interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    mgipt, second = build(data, tmp_path / "parts", resume=True)
    with pytest.raises(StreamFailedError, match="1 of 5"):
        second.run()
    assert same_state(mgipt.adaptation_state(), whole.adaptation_state())
    assert without_times(tmp_path / "parts" / "records.jsonl") == without_times(tmp_path / "whole" / "records.jsonl")
    one, other = (e.state.summary.figures()["all"] for e in (one_go, second))
    assert one["metrics"] == other["metrics"]
    assert one["failed"] == other["failed"]


def _interrupt(_engine) -> None:
    raise KeyboardInterrupt


def test_changed_stream_is_not_resumed(tmp_path: Path) -> None:
    _, first = build(items(3), tmp_path)
    first.run()
    _, second = build(items(3)[1:], tmp_path, resume=True)
    with pytest.raises(ValueError, match="the stream has changed"):
        second.run()


def test_stream_that_shrank_is_run_once_not_repeatedly() -> None:
    # MONAI takes the number of iterations when it is built
    mgipt, evaluator = build(items(4))
    del evaluator.data_loader.dataset.data[1:]
    evaluator.run()
    assert mgipt.images_seen == 1


def test_several_runs_go_on_with_the_adaptation() -> None:
    mgipt, evaluator = build(items(2))
    evaluator.run()
    evaluator.run()
    assert mgipt.images_seen == 4
    assert evaluator.state.summary.figures()["all"]["images"] == 2


def test_unlabelled_stream_has_no_metrics() -> None:
    data = [{key: value for key, value in item.items() if key != "label"} for item in items(2)]
    _, evaluator = build(data)
    evaluator.run()
    assert evaluator.state.record["metrics"] == {}


def test_batches_of_several_images_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=1, got 2"):
        StreamingAdaptationEvaluator("cpu", DataLoader(Dataset(items(2)), batch_size=2), tiny_network())


def test_empty_stream_is_an_error() -> None:
    _, evaluator = build(items(1))
    evaluator.data_loader.dataset.data.clear()
    with pytest.raises(ValueError, match="no images"):
        evaluator.run()


def test_generator_that_is_used_up_is_an_error() -> None:
    mgipt = MGIPT(tiny_network(), steps=1)
    images = ({"image": image, "name": "a", "site": "A"} for image in stream(2))
    evaluator = StreamingAdaptationEvaluator("cpu", images, mgipt.network, AdaptiveInferer(mgipt), progress=False)
    evaluator.run()
    assert mgipt.images_seen == 2
    with pytest.raises(ValueError, match="only once"):
        evaluator.run()


def test_progress_bar_shows_site_dsc_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", shown)
    _, evaluator = build(items(2))
    evaluator.run()
    assert all(word in shown.getvalue() for word in ("0/2", "2/2", "site=B", "DSC=0.", "size=", "s/image="))
