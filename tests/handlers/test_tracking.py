# SPDX-License-Identifier: Apache-2.0
"""What MONAI's tracking gets of a stream: each image's figures, those of all, settings and files, and no name."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.handlers import MetricsSaver, TensorBoardStatsHandler
from monai.metrics import DiceMetric
from monai.transforms import Activationsd, AsDiscreted, Compose

from mgipt_monai import MGIPT, RecordFile, StreamFailedError, StreamingAdaptationEvaluator, TestTimeAdaptationHandler
from mgipt_monai.data.dataset import FAILURE
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from mgipt_monai.handlers import StreamMLFlowHandler
from tests.bundle.conftest import BUNDLE, QUICK, ROOT
from tests.conftest import stream, tiny_network
from tests.module_runs import run_module

SMALL = [word for key, value in QUICK.items() for word in (f"--{key}", value)]


def evaluator(folder: Path, *handlers: Any, bad: int | None = 1) -> StreamingAdaptationEvaluator:
    """One over four labelled images, of which one fails."""
    mgipt = MGIPT(tiny_network(), steps=1)
    data = [
        {"image": image[0], "label": (image[0, :2] > 0.5).float(), "site": "A", "name": f"A/Ann_Lee_{i}"}
        for i, image in enumerate(stream(4))
    ]
    if bad is not None:
        data[bad] = {FAILURE: "A/Ann_Lee_1.png: broken", "name": "A/Ann_Lee_1", "site": "A"}
    return StreamingAdaptationEvaluator(
        "cpu",
        DataLoader(Dataset(data), batch_size=1),
        mgipt.network,
        image_metrics={"dsc": DiceMetric(reduction="none")},
        class_names=["disc", "cup (inner)"],
        postprocessing=Compose([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5)]),
        val_handlers=[TestTimeAdaptationHandler(mgipt, record_path=folder / "records.jsonl"), *handlers],
        progress=False,
        summary_path=folder / "summary.json",
    )


def image_means(folder: Path) -> list[float]:
    rows = RecordFile(folder / "records.jsonl").read()
    return [float(np.mean(list(row["metrics"]["dsc"].values()))) for row in rows if row["status"] == "ok"]


def test_metrics_are_there_when_other_handlers_look(tmp_path: Path) -> None:
    engine, seen = evaluator(tmp_path), {"images": [], "end": []}
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen["images"].append(dict(engine.state.metrics)))
    for event in (Events.EPOCH_COMPLETED, Events.COMPLETED):
        engine.add_event_handler(event, lambda: seen["end"].append(dict(engine.state.metrics)))
    with pytest.raises(StreamFailedError):
        engine.run()
    assert [metrics["dsc"] for metrics in seen["images"]] == pytest.approx(image_means(tmp_path))
    assert seen["end"] == [engine.state.metrics] * 2
    assert engine.state.metrics["dsc"] == pytest.approx(np.mean(image_means(tmp_path)))
    assert set(engine.state.metrics) == {"dsc", "dsc_disc", "dsc_cup__inner_", "dsc_worst_tenth"}
    engine.add_event_handler(Events.STARTED, lambda: seen.update(begun=dict(engine.state.metrics)))
    with pytest.raises(StreamFailedError):
        engine.run()
    assert seen["begun"] == {}, "a second run starts without the first one's metrics"


def test_tensorboard_has_each_image_and_the_end(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (settings,) = yaml.safe_load((ROOT / "configs" / "tensorboard.yaml").read_text())["+handlers"]
    transform = ConfigParser({"it": settings["output_transform"]}).get_parsed_content("it")
    handler = TensorBoardStatsHandler(log_dir=str(tmp_path / "board"), output_transform=transform)
    with pytest.raises(StreamFailedError):
        evaluator(tmp_path, handler).run()
    handler.close()
    board = events.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    images, (end,) = board.Scalars("image/dsc"), board.Scalars("dsc")
    assert [each.step for each in images] == [1, 3, 4]
    assert [each.value for each in images] == pytest.approx(image_means(tmp_path))
    assert end.value == pytest.approx(np.mean(image_means(tmp_path)))
    tags = {"dsc_disc", *(f"image/{name}" for name in ("loss_before", "loss_after", "forwards", "seconds"))}
    assert tags <= set(board.Tags()["scalars"])


def test_metrics_saver_writes_means_and_images(tmp_path: Path) -> None:
    saver = MetricsSaver(
        str(tmp_path / "csv"),
        metric_details="*",
        batch_transform=lambda batch: [{"filename_or_obj": item["name"]} for item in batch],
        summary_ops="*",
    )
    with pytest.raises(StreamFailedError):
        evaluator(tmp_path, saver).run()
    rows = [line.split(",") for line in (tmp_path / "csv" / "metrics.csv").read_text().splitlines()]
    assert float(dict(rows)["dsc"]) == pytest.approx(np.mean(image_means(tmp_path)))
    with (tmp_path / "csv" / "dsc_raw.csv").open() as file:
        raw = list(csv.DictReader(file))
    assert [row["filename"] for row in raw] == ["A/Ann_Lee_0", "A/Ann_Lee_2", "A/Ann_Lee_3"]
    assert [float(row["mean"]) for row in raw] == pytest.approx(image_means(tmp_path), rel=1e-3)
    assert (tmp_path / "csv" / "dsc_summary.csv").is_file()


def mlflow_runs(database: Path) -> list[Any]:
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    numbers = [experiment.experiment_id for experiment in client.search_experiments()]
    return [(client, run) for run in client.search_runs(numbers)]


def test_mlflow_keeps_a_failed_run_apart(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")

    def stop(_engine: Any) -> None:
        raise KeyboardInterrupt

    tracker = StreamMLFlowHandler(f"sqlite:///{tmp_path}/runs.db")
    engine = evaluator(tmp_path, tracker, bad=None)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), stop)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    other = StreamMLFlowHandler(f"sqlite:///{tmp_path}/runs.db", experiment_param={"method.seed": 7})
    evaluator(tmp_path, other, bad=None).run()
    (_, second), (_, first) = mlflow_runs(tmp_path / "runs.db")
    assert [first.info.status, second.info.status] == ["FAILED", "FINISHED"]
    assert second.data.params["method.seed"] == "7"
    assert second.data.metrics["all_images"] == 4
    assert second.data.metrics["all_dsc"] == pytest.approx(np.mean(image_means(tmp_path)))


@pytest.mark.parametrize("command", ["mgipt", "monai"])
def test_mlflow_from_the_command_line_has_all_but_names(command: str, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    write_demo_stream(tmp_path / "sites", [CAMERAS["cold_noisy"]], count=3, size=64)
    (tmp_path / "sites" / "cold_noisy" / "images" / "eye_001.png").write_text("none")
    keys = [*SMALL, "--identifiers", "hashed", "--experiment_name", "clinic"]
    if command == "mgipt":
        words = ["evaluate", str(tmp_path / "sites"), str(tmp_path / "out"), *keys, "--tracking", "mlflow"]
        done = run_module("mgipt_monai", words)
    else:
        configs = [str(BUNDLE / "configs" / f"{name}.yaml") for name in ("inference", "evaluate")]
        places = ["--dataset_dir", str(tmp_path / "sites"), "--output_dir", str(tmp_path / "out")]
        words = ["run", "--config_file", str(configs), "--bundle_root", str(BUNDLE), *places, *keys]
        done = run_module("monai.bundle", [*words, "--tracking", str(BUNDLE / "configs" / "tracking_mlflow.yaml")])
    assert "1 of 3 images failed" in done.stderr
    ((client, run),) = mlflow_runs(tmp_path / "out" / "mlruns.db")
    history = client.get_metric_history(run.info.run_id, "dsc")
    assert [each.step for each in history] == [1, 3]
    assert [each.value for each in history] == pytest.approx(image_means(tmp_path / "out"))
    assert run.data.metrics["all_dsc"] == pytest.approx(np.mean(image_means(tmp_path / "out")))
    assert run.data.metrics["failed_images"] == 1
    assert run.data.params["method.class"] == "MGIPT"
    assert run.info.status == "FINISHED"
    files = [each.path for each in client.list_artifacts(run.info.run_id)]
    assert files == ["records.jsonl", "records.runs.json", "summary.json"]
    kept = [path for path in (tmp_path / "out").rglob("*") if "mlruns" in str(path) and path.is_file()]
    assert len(kept) == 1 + len(files)
    assert not [path for path in kept if b"eye_00" in path.read_bytes()]


def test_tracking_that_cannot_be_is_refused(tmp_path: Path) -> None:
    done = run_module("mgipt_monai", ["benchmark", str(tmp_path), str(tmp_path / "out"), "--tracking", "mlflow"])
    assert "--tracking mlflow works with predict and evaluate" in done.stderr.splitlines()[-1]
    done = run_module("mgipt_monai", ["predict", str(tmp_path), str(tmp_path / "out"), "--tracking", "comet"])
    assert "there is no comet: write --tracking mlflow" in done.stderr.splitlines()[-1]
