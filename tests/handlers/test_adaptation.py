# SPDX-License-Identifier: Apache-2.0
"""The handler on evaluators as users have them, and the traps of MONAI's engines."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor, NumpyReader
from monai.engines import SupervisedEvaluator
from monai.handlers import CheckpointLoader, CheckpointSaver, StatsHandler
from monai.inferers import PatchInferer
from monai.transforms import Compose, LoadImaged
from monai.transforms.io import array as readers_of
from torch import nn

from mgipt_monai import MGIPT, AdaptiveInferer, RecordFile, Source, TestTimeAdaptationHandler, load_state
from tests.conftest import identical, same_state, snapshot, stream, tiny_network


def loader(count: int = 3, size: int = 24) -> DataLoader:
    return DataLoader(Dataset([{"image": image[0]} for image in stream(count, size)]), batch_size=1)


def evaluator(network: nn.Module, data=None, **kwargs) -> SupervisedEvaluator:
    return SupervisedEvaluator("cpu", loader() if data is None else data, network=network, **kwargs)


def expected_outputs(count: int = 3) -> list[torch.Tensor]:
    mgipt = MGIPT(tiny_network(), steps=2)
    return [mgipt(image)[0] for image in stream(count)]


def collect(engine: Engine) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output[0]["pred"]))
    return outputs


def test_one_line_adapts_an_existing_evaluator_and_puts_it_back(network: nn.Module) -> None:
    engine = evaluator(network)
    outputs, before, inferer = collect(engine), snapshot(network), engine.inferer
    mgipt = MGIPT(network, steps=2)
    TestTimeAdaptationHandler(mgipt).attach(engine)
    engine.run()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected_outputs(), strict=True))
    assert engine.inferer is inferer
    assert mgipt.images_seen == 3
    assert identical(before, snapshot(network))


def test_inferer_with_the_method_and_its_handler_adapt_once(mgipt: MGIPT) -> None:
    engine = evaluator(mgipt.network, inferer=AdaptiveInferer(mgipt), val_handlers=[TestTimeAdaptationHandler(mgipt)])
    engine.run()
    assert mgipt.images_seen == 3


def test_method_as_the_network_with_its_handler_adapts_once(mgipt: MGIPT) -> None:
    engine = evaluator(mgipt)
    TestTimeAdaptationHandler().attach(engine)
    engine.run()
    assert mgipt.images_seen == 3


def test_two_handlers_are_an_error(mgipt: MGIPT) -> None:
    engine = evaluator(mgipt.network)
    TestTimeAdaptationHandler(mgipt).attach(engine)
    with pytest.raises(RuntimeError, match="twice"):
        TestTimeAdaptationHandler(mgipt).attach(engine)


def test_another_method_than_the_evaluators_is_an_error(mgipt: MGIPT) -> None:
    engine = evaluator(mgipt.network, inferer=AdaptiveInferer(mgipt))
    with pytest.raises(RuntimeError, match="its own MGIPT, the handler with another Source"):
        TestTimeAdaptationHandler(Source(mgipt.network)).attach(engine)
    late = evaluator(
        mgipt.network,
        inferer=AdaptiveInferer(mgipt),
        val_handlers=[TestTimeAdaptationHandler(Source(mgipt.network))],
    )
    with pytest.raises(RuntimeError, match="adapted to twice"):
        late.run()


def test_handler_without_any_method_says_so(network: nn.Module) -> None:
    with pytest.raises(TypeError, match="no method to adapt with"):
        TestTimeAdaptationHandler().attach(evaluator(network))


def test_inferer_that_cannot_be_replaced_is_an_error(mgipt: MGIPT) -> None:
    engine = evaluator(mgipt.network, inferer=PatchInferer(splitter=None))
    with pytest.raises(TypeError, match="PatchInferer"):
        TestTimeAdaptationHandler(mgipt).attach(engine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resume": True}, "state_path"),
        ({"resume": True, "state_path": "a.pt", "start_from": "b.pt"}, "set only one of them"),
        ({"save_every": 0}, "got 0"),
    ],
)
def test_wrong_settings_fail_at_construction(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TestTimeAdaptationHandler(**settings)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm_buffers_stay_whatever_mode_the_evaluator_sets(mode: str) -> None:
    network = tiny_network().train()
    before = snapshot(network)
    engine = evaluator(network, mode=mode)
    outputs = collect(engine)
    TestTimeAdaptationHandler(MGIPT(network, steps=2)).attach(engine)
    network.train()  # a pipeline that builds its network in training mode
    engine.run()
    assert identical(before, snapshot(network))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected_outputs(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_amp_on_the_cpu_changes_nothing(network: nn.Module) -> None:
    engine = evaluator(network, amp=True)
    outputs = collect(engine)
    TestTimeAdaptationHandler(MGIPT(network, steps=2)).attach(engine)
    engine.run()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected_outputs(), strict=True))


def test_checkpoint_loader_among_the_handlers_keeps_the_adaptation(tmp_path: Path) -> None:
    # it loads the network's weights at the start of every run
    torch.save({"model": tiny_network().state_dict()}, tmp_path / "model.pt")
    network = tiny_network(seed=8)
    mgipt = MGIPT(network, steps=2)
    loading = CheckpointLoader(str(tmp_path / "model.pt"), {"model": network})
    engine = evaluator(network, val_handlers=[loading, TestTimeAdaptationHandler(mgipt)])
    outputs = collect(engine)
    engine.run()
    engine.run()
    assert mgipt.images_seen == 6
    assert all(torch.equal(a, b) for a, b in zip(outputs[:3], expected_outputs(), strict=True))
    assert not torch.equal(outputs[0], outputs[3])


def test_checkpoint_saver_takes_the_method_like_any_module(tmp_path: Path, mgipt: MGIPT) -> None:
    saver = CheckpointSaver(str(tmp_path), {"model": mgipt.network}, save_final=True, final_filename="final.pt")
    evaluator(mgipt.network, val_handlers=[saver, TestTimeAdaptationHandler(mgipt)]).run()
    state = torch.load(tmp_path / "final.pt", weights_only=True)
    assert identical(state, snapshot(tiny_network()))


def test_generator_without_length_works(mgipt: MGIPT) -> None:
    engine = evaluator(mgipt.network, data=({"image": image} for image in stream(3)))
    TestTimeAdaptationHandler(mgipt).attach(engine)
    engine.run()
    assert mgipt.images_seen == 3


def test_state_and_records_are_written(tmp_path: Path, mgipt: MGIPT) -> None:
    handler = TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", tmp_path / "records.jsonl")
    evaluator(mgipt.network, val_handlers=[handler]).run()
    assert same_state(load_state(tmp_path / "state.pt")["adaptation"], mgipt.adaptation_state())
    rows = RecordFile(tmp_path / "records.jsonl").read()
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert rows[0]["seconds"] > 0


class StopError(RuntimeError):
    pass


def interrupted_run(tmp_path: Path, after: int, save_every: int = 1, resume: bool = False, error=StopError) -> list:
    mgipt = MGIPT(tiny_network(), steps=2)
    handler = TestTimeAdaptationHandler(
        mgipt, tmp_path / "state.pt", tmp_path / "records.jsonl", resume=resume, save_every=save_every
    )
    engine = evaluator(mgipt.network, data=loader(5), val_handlers=[handler])
    outputs = collect(engine)

    @engine.on(Events.ITERATION_COMPLETED(once=after))
    def stop(_engine: Engine) -> None:
        raise error

    with pytest.raises(error):
        engine.run()
    return outputs


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("save_every", [1, 3])
def test_resuming_equals_not_stopping(tmp_path: Path, save_every: int, error: type) -> None:
    interrupted_run(tmp_path, after=2, save_every=save_every, error=error)
    interrupted_run(tmp_path, after=4, save_every=save_every, resume=True, error=error)
    mgipt = MGIPT(tiny_network(), steps=2)
    handler = TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", tmp_path / "records.jsonl", resume=True)
    engine = evaluator(mgipt.network, data=loader(5), val_handlers=[handler])
    outputs = collect(engine)
    engine.run()
    assert torch.equal(outputs[-1], expected_outputs(5)[-1])
    indices = [row["index"] for row in RecordFile(tmp_path / "records.jsonl").read()]
    assert indices == [0, 1, 2, 3, 4]
    assert mgipt.images_seen == 5
    assert engine.state.iteration == 5


def test_batches_are_recorded_image_by_image_and_resumed(tmp_path: Path) -> None:
    data = DataLoader(Dataset([{"image": image[0]} for image in stream(5)]), batch_size=2)
    whole = MGIPT(tiny_network(), steps=2)
    evaluator(whole.network, data, val_handlers=[TestTimeAdaptationHandler(whole)]).run()
    for resume in (False, True):
        mgipt = MGIPT(tiny_network(), steps=2)
        handler = TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", tmp_path / "records.jsonl", resume)
        engine = evaluator(mgipt.network, data, val_handlers=[handler])
        if not resume:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), Engine.terminate)
        engine.run()
    assert [row["index"] for row in RecordFile(tmp_path / "records.jsonl").read()] == [0, 1, 2, 3, 4]
    assert same_state(mgipt.adaptation_state(), whole.adaptation_state())


def test_records_name_the_images_files(tmp_path: Path, mgipt: MGIPT) -> None:
    images = [{"image": MetaTensor(stream(1)[0][0], meta={"filename_or_obj": "in/eye.png"})}]
    handler = TestTimeAdaptationHandler(mgipt, record_path=tmp_path / "records.jsonl")
    evaluator(mgipt.network, DataLoader(Dataset(images), batch_size=1), val_handlers=[handler]).run()
    assert RecordFile(tmp_path / "records.jsonl").read()[0]["name"] == "in/eye.png"


def test_image_cut_off_half_way_leaves_no_trace(tmp_path: Path) -> None:
    mgipt = MGIPT(tiny_network(), steps=2)
    handler = TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", save_every=2)

    def postprocessing(data: dict) -> dict:
        if mgipt.images_seen == 2:
            raise StopError
        return data

    engine = evaluator(mgipt.network, postprocessing=postprocessing, val_handlers=[handler])
    with pytest.raises(RuntimeError):
        engine.run()
    assert mgipt.images_seen == 1
    assert load_state(tmp_path / "state.pt")["position"] == 1


def test_resuming_a_finished_stream_does_nothing(tmp_path: Path) -> None:
    for resume in (False, True):
        mgipt = MGIPT(tiny_network(), steps=2)
        handler = TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", resume=resume)
        evaluator(mgipt.network, val_handlers=[handler]).run()
        assert mgipt.images_seen == 3


def test_stream_that_has_become_shorter_is_not_resumed(tmp_path: Path) -> None:
    for count, error in ((3, None), (2, "the stream has changed since it was interrupted (3 done of 2)")):
        mgipt = MGIPT(tiny_network(), steps=2)
        handler = TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", resume=error is not None)
        engine = evaluator(mgipt.network, loader(count), val_handlers=[handler])
        with nullcontext() if error is None else pytest.raises(ValueError, match=re.escape(error)):
            engine.run()


def test_stream_can_start_from_an_earlier_ones_state(tmp_path: Path) -> None:
    first = MGIPT(tiny_network(), steps=2)
    evaluator(first.network, val_handlers=[TestTimeAdaptationHandler(first, tmp_path / "a.pt")]).run()
    second = MGIPT(tiny_network(), steps=2)
    handler = TestTimeAdaptationHandler(second, tmp_path / "b.pt", start_from=tmp_path / "a.pt")
    evaluator(second.network, val_handlers=[handler]).run()
    assert second.images_seen == 6
    assert load_state(tmp_path / "b.pt")["position"] == 3


def test_broken_state_file_is_named(tmp_path: Path, mgipt: MGIPT) -> None:
    (tmp_path / "state.pt").write_bytes(b"not a state")
    handler = TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", resume=True)
    engine = evaluator(mgipt.network, val_handlers=[handler])
    with pytest.raises(ValueError, match=r"state.pt is not a readable adaptation state"):
        engine.run()
    assert not isinstance(engine.inferer, AdaptiveInferer)


@pytest.mark.parametrize("first", [True, False])
def test_failure_is_heard_of_beside_a_stats_handler_which_raises_it_anew(
    first: bool, mgipt: MGIPT, tmp_path: Path
) -> None:
    data = [{"image": image} for image in [stream(1)[0], torch.full((1, 3, 24, 24), float("nan"))]]
    handlers = [TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", save_every=5), StatsHandler()]
    engine = evaluator(mgipt.network, data=data, val_handlers=handlers if first else handlers[::-1])
    inferer = engine.inferer
    with pytest.raises(ValueError, match="NaN"):
        engine.run()
    assert engine.inferer is inferer
    assert load_state(tmp_path / "state.pt")["position"] == mgipt.images_seen == 1


@pytest.mark.parametrize("reader", [None, "NibabelReader"])
def test_stream_goes_on_where_another_package_has_brought_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str | None
) -> None:
    for i, image in enumerate(stream(2)):
        np.save(tmp_path / f"{i}.npy", image[0].numpy())

    def run(count: int, **given: object) -> int:
        mgipt = MGIPT(tiny_network(), steps=1)
        items = [{"image": str(tmp_path / f"{i}.npy")} for i in range(count)]
        load = Compose([LoadImaged("image", **{"reader": reader, **given})])
        engine = evaluator(mgipt.network, DataLoader(Dataset(items, load), batch_size=1))
        TestTimeAdaptationHandler(mgipt, tmp_path / "state.pt", resume=count == 2).attach(engine)
        engine.run()
        return mgipt.images_seen

    installed = readers_of.SUPPORTED_READERS
    least = {name: installed[name] for name in installed if name in ("numpyreader", "pilreader", "nibabelreader")}
    with monkeypatch.context() as patched:
        patched.setattr(readers_of, "SUPPORTED_READERS", least)
        run(1)
    monkeypatch.setattr(readers_of, "SUPPORTED_READERS", {"newreader": NewReader, **least})
    with pytest.raises(ValueError, match=r"readers\.given\.0 was .*is 'NumpyReader'"):
        run(2, reader="NumpyReader")
    assert run(2) == 2


class NewReader(NumpyReader):
    """A reader of a package that was installed meanwhile."""
