# SPDX-License-Identifier: Apache-2.0
"""Evaluators that people have: volumes in sliding windows, networks without batch norm, ignite without MONAI."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import create_supervised_evaluator
from ignite.metrics import Loss
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointLoader, StatsHandler
from monai.inferers import SliceInferer, SlidingWindowInferer, sliding_window_inference
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mgipt_monai import (
    MGIPT,
    AdaptiveInferer,
    RecordFile,
    Source,
    SourceStatistics,
    SourceStatisticsHandler,
    TestTimeAdaptationHandler,
    load_state,
    measure_source_statistics,
    save_state,
)
from tests.conftest import identical, same_state, snapshot, stream, tiny_network

SLIDING = SlidingWindowInferer(roi_size=(12, 12, 12), sw_batch_size=3, overlap=0.5, mode="gaussian")


def instance_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    norm = nn.InstanceNorm3d(4, affine=True)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv3d(4, 3, 1)).eval()


def volumes(count: int = 2) -> list[Tensor]:
    return [image[..., :14] for image in stream(count, size=20, channels=1, dims=3)]


def volume_loader(images: list[Tensor]) -> DataLoader:
    meta = [{"filename_or_obj": f"in/volume_{i}.nii.gz"} for i in range(len(images))]
    items = [{"image": MetaTensor(image[0], meta=each)} for image, each in zip(images, meta, strict=True)]
    return DataLoader(Dataset(items), batch_size=1)


def test_volumes_without_batch_norm_are_measured_and_adapted_in_the_pipelines_own_windows(tmp_path: Path) -> None:
    weights, path = tmp_path / "model.pt", tmp_path / "statistics.pt"
    torch.save(instance_network().state_dict(), weights)

    def evaluator(network: nn.Module, handler: object) -> SupervisedEvaluator:
        loading = CheckpointLoader(str(weights), {"model": network})
        handlers = [loading, StatsHandler(iteration_log=False), handler]
        return SupervisedEvaluator("cpu", volume_loader(volumes()), network, inferer=SLIDING, val_handlers=handlers)

    # weights of its own until the run starts
    network = instance_network(seed=5)
    evaluator(network, SourceStatisticsHandler(path, windows=3)).run()
    statistics, expected = (
        SourceStatistics.load(path),
        measure_source_statistics(instance_network(), volumes(), inferer=SLIDING, windows=3),
    )
    assert (statistics.images, statistics.fingerprint) == (2, expected.fingerprint)
    assert identical(vars(statistics.layers["1"]), vars(expected.layers["1"]))

    network = instance_network(seed=5)
    mgipt = MGIPT(network, statistics=path, head="softmax", steps=1)
    records = tmp_path / "records.jsonl"
    engine = evaluator(network, TestTimeAdaptationHandler(mgipt, record_path=records, windows=3))
    engine.run()
    rows = RecordFile(records).read()
    assert [(row["name"], row["status"]) for row in rows] == [(f"in/volume_{i}.nii.gz", "ok") for i in range(2)]
    assert all(row["backwards"] == 3 * (3 + len(row["consistency"])) for row in rows)
    assert engine.state.output[0]["pred"].shape == (3, 20, 20, 14)
    assert identical(snapshot(network), snapshot(instance_network()))


def test_measuring_takes_the_place_of_the_run(tmp_path: Path) -> None:
    network, seen = instance_network(), []
    engine = SupervisedEvaluator("cpu", volume_loader(volumes()), network, inferer=SLIDING, postprocessing=seen.append)
    SourceStatisticsHandler(tmp_path / "statistics.pt", layers="^1$").attach(engine)
    engine.run()
    assert (tmp_path / "statistics.pt").is_file()
    assert not seen
    assert engine.state.iteration == 0


def test_bad_volume_is_named_in_the_log_and_leaves_no_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, images = instance_network(), volumes(3)
    mgipt = MGIPT(network, statistics=measure_source_statistics(network, images), steps=1)
    handler = TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", windows=1)
    alone = MGIPT(network, statistics=mgipt.statistics, steps=1)
    SupervisedEvaluator(
        "cpu",
        volume_loader(images[:1]),
        network,
        inferer=SLIDING,
        val_handlers=[TestTimeAdaptationHandler(alone, windows=1)],
    ).run()
    images[1] = images[1][..., :5, :5]
    engine = SupervisedEvaluator("cpu", volume_loader(images), network, inferer=SLIDING, val_handlers=[handler])
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="20x5x5 is smaller than a prompt of side 7"):
        engine.run()
    assert caplog.messages[-1] == "the stream stopped after 1 images, at in/volume_1.nii.gz"  # the error says why
    assert same_state(load_state(tmp_path / "state.pt")["adaptation"], alone.adaptation_state())


def test_file_that_a_failing_loader_could_not_read_is_not_mixed_up_with_the_one_before(
    network: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    def images():
        yield {"image": MetaTensor(stream(1)[0], meta={"filename_or_obj": ["good.png"]})}
        raise OSError("bad.png is broken")

    engine = SupervisedEvaluator(
        "cpu", images(), network, val_handlers=[TestTimeAdaptationHandler(MGIPT(network, steps=1))]
    )
    with caplog.at_level(logging.ERROR), pytest.raises(OSError, match=r"bad\.png"):
        engine.run()
    assert caplog.messages[-1] == "the stream stopped after 1 images"


def test_method_stands_where_the_network_stood_in_an_evaluator_of_ignite(tmp_path: Path, network: nn.Module) -> None:
    images = stream(3)
    data = [(image, (image.mean(dim=1) > 0.5).long()) for image in images]
    mgipt, alone = (MGIPT(network, head="softmax", steps=1) for _ in range(2))
    expected = [alone(image) for image in images]
    evaluator = create_supervised_evaluator(mgipt, metrics={"loss": Loss(cross_entropy)})
    loss = evaluator.run(data[:2]).metrics["loss"]
    assert torch.equal(evaluator.state.output[0], expected[1])
    assert loss == pytest.approx(sum(cross_entropy(expected[i], data[i][1]).item() for i in range(2)) / 2)
    # a later process takes the stream up where this one left it
    save_state(mgipt.adaptation_state(), tmp_path / "state.pt")
    later = MGIPT(network, head="softmax", steps=1)
    later.load_adaptation_state(load_state(tmp_path / "state.pt"))
    assert torch.equal(later(images[2]), expected[2])


@pytest.mark.parametrize("make", [TestTimeAdaptationHandler, lambda: SourceStatisticsHandler("statistics.pt")])
def test_handlers_refuse_engines_that_they_cannot_work_with(make, network: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"not with a Engine: .*create_supervised_evaluator\(MGIPT\(network\)\)"):
        make().attach(create_supervised_evaluator(network))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    trainer = SupervisedTrainer("cpu", 1, [], network, optimizer, cross_entropy)
    with pytest.raises(TypeError, match="not with a SupervisedTrainer"):
        make().attach(trainer)


def test_windows_passed_as_images_are_refused_with_the_right_way() -> None:
    volume = volumes(1)[0]
    volume[..., :12, :12, :12] = 0.0  # an empty window
    mgipt = MGIPT(tiny_network(3, 1), steps=1)
    with pytest.raises(RuntimeError, match=r"AdaptiveInferer\(method, SlidingWindowInferer"):
        sliding_window_inference(volume, (12, 12, 12), 2, mgipt)
    engine = SupervisedEvaluator("cpu", volume_loader([volume]), mgipt, inferer=SLIDING)
    with pytest.raises(RuntimeError, match="attach TestTimeAdaptationHandler"):
        engine.run()
    assert mgipt.images_seen == 0

    logits = AdaptiveInferer(mgipt, SLIDING)(volume, mgipt)
    assert logits.shape[2:] == volume.shape[2:]
    assert mgipt.images_seen == 1
    TestTimeAdaptationHandler(mgipt).attach(engine)
    engine.run()
    assert mgipt.images_seen == 1  # of the handler's new stream


@pytest.mark.parametrize("roi_size", [(16, 16), (12, 24), (20, -1)])
def test_slices_on_their_own_are_cut_and_padded_as_the_pipeline_does(roi_size: tuple[int, int]) -> None:
    volume, network = volumes(1)[0], tiny_network(2, 1).eval()
    volume[..., 3] = 0.5  # a constant slice too
    slices = SliceInferer(roi_size=roi_size, sw_batch_size=2, spatial_dim=2, overlap=0.5, mode="gaussian")
    with torch.no_grad():
        expected = slices(volume, network)
    source = Source(network)
    torch.testing.assert_close(AdaptiveInferer(source, slices, slices="own")(volume, network), expected)
    adapted = AdaptiveInferer(MGIPT(network, steps=1), slices, slices="own")
    assert adapted(volume, network).shape == expected.shape
    assert adapted.method.last[0]["adapted_slices"] == volume.shape[-1] - 1


def test_the_slices_of_a_volume_can_have_prompts_of_their_own_in_any_evaluator(tmp_path: Path) -> None:
    network, path = tiny_network(2, 1), tmp_path / "records.jsonl"
    inferer = SliceInferer(roi_size=(20, 20), spatial_dim=2)
    engine = SupervisedEvaluator("cpu", volume_loader([volumes(1)[0][..., :4]]), network, inferer=inferer)
    handler = TestTimeAdaptationHandler(MGIPT(network, steps=1), record_path=path, slices="own")
    handler.attach(engine)
    engine.run()
    assert RecordFile(path).read()[0]["adapted_slices"] == 4
    assert handler.method.prompt_maps().keys() == {"3 x 3", "5 x 5", "7 x 7"}


def plain_files(folder: Path, count: int) -> DataLoader:
    """A pipeline that drops the metadata, and with it the names."""
    for i, image in enumerate(stream(count)):
        torch.save(image[0], folder / f"eye_{i}.pt")
    items = [{"image": str(folder / f"eye_{i}.pt")} for i in range(count)]
    return DataLoader(Dataset(items, lambda item: {"image": torch.load(item["image"])}), batch_size=1)


def test_records_are_named_by_the_files_where_a_pipeline_drops_the_metadata(tmp_path: Path, network: nn.Module) -> None:
    engine = SupervisedEvaluator("cpu", plain_files(tmp_path, 2), network)
    TestTimeAdaptationHandler(MGIPT(network, steps=1), record_path=tmp_path / "records.jsonl").attach(engine)
    engine.run()
    names = [row["name"] for row in RecordFile(tmp_path / "records.jsonl").read()]
    assert names == [str(tmp_path / f"eye_{i}.pt") for i in range(2)]


def test_a_second_run_goes_on_adapting_and_keeps_the_records_of_the_first(tmp_path: Path, network: nn.Module) -> None:
    path, state = tmp_path / "records.jsonl", tmp_path / "state.pt"
    mgipt = MGIPT(network, steps=1)
    engine = SupervisedEvaluator("cpu", plain_files(tmp_path, 2), network)
    handler = TestTimeAdaptationHandler(mgipt, state, path)
    handler.attach(engine)
    for run in range(3):
        engine.run()
        assert mgipt.images_seen == 2 * run + 2
    assert [row["index"] for row in RecordFile(path).read()] == [4, 5]
    for run in (1, 2):
        rows = RecordFile(tmp_path / f"records.{run}.jsonl").read()
        assert [row["index"] for row in rows] == [2 * run - 2, 2 * run - 1]
        assert (tmp_path / f"records.{run}.runs.json").exists()
    assert load_state(state)["adaptation"]["images_seen"] == 6
