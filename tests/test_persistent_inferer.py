# SPDX-License-Identifier: Apache-2.0
"""A stream that outlives inferers, networks, threads and processes, called as servers call an inferer."""

from __future__ import annotations

import copy
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from mgipt_monai import MGIPT, AdaptiveInferer, PersistentInferer, RecordFile
from mgipt_monai.data import AdaptationResultd
from mgipt_monai.stream.state_file import read
from tests.conftest import identical, same_state, snapshot, stream, tiny_network


def mgipt(network: nn.Module | None = None, **settings) -> MGIPT:
    network = tiny_network() if network is None else network
    return MGIPT(network, **{"steps": 1, "instance_sizes": (1,), "global_sizes": (3,), **settings})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adaptation" / "stream.pt"


def one_request(path: Path, image: Tensor, network: nn.Module | None = None, **settings) -> Tensor:
    """A request to a server that keeps nothing but the file."""
    inferer = PersistentInferer(mgipt(), path, path.with_name("records.jsonl"), **settings)
    with torch.no_grad():
        return inferer(image, tiny_network() if network is None else network)


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.parent.iterdir()}


def test_monai_label_copies_loads_and_makes_the_inferer_anew_for_each_request(path: Path) -> None:
    weights, definition, images = tiny_network(seed=3).state_dict(), tiny_network(seed=1), stream(4)
    served = copy.deepcopy(definition)
    served.load_state_dict(weights, strict=False)
    served.eval()
    before = snapshot(served)
    outputs = []
    for image in images[:2]:  # the method is made anew as well, round the definition with its random weights
        inferer = PersistentInferer(mgipt(definition), path)
        with torch.no_grad():
            outputs.append(inferer(image, served))
    assert identical(before, snapshot(served))
    # the server is started again
    served = copy.deepcopy(tiny_network(seed=2))
    served.load_state_dict(weights, strict=False)
    outputs += [PersistentInferer(mgipt(tiny_network(seed=2)), path)(image, served.eval()) for image in images[2:]]

    direct = mgipt(tiny_network(seed=3))
    assert all(torch.equal(output, direct(image)) for output, image in zip(outputs, images, strict=True))
    content = read(path)
    assert same_state(content["adaptation"], direct.adaptation_state())
    assert content["position"] == 4


def test_monai_deploy_calls_by_keyword_and_loads_the_network_for_each_call(path: Path) -> None:
    inferer, direct = PersistentInferer(mgipt(tiny_network(seed=9)), path), mgipt()
    for image in stream(2):
        reloaded = tiny_network(seed=9)
        reloaded.load_state_dict(tiny_network().state_dict(), strict=True)
        assert torch.equal(inferer(inputs=image, network=reloaded), direct(image))
    assert inferer.last[0]["position"] == 2


def test_method_in_memory_counts_for_nothing_beside_the_file(path: Path) -> None:
    images, method = stream(2), mgipt()
    method(images[1])
    assert torch.equal(PersistentInferer(method, path)(images[0], method.network), mgipt()(images[0]))
    assert read(path)["position"] == 1


def test_without_adaptation_it_predicts_with_what_was_learnt_and_nothing_lasts(path: Path) -> None:
    images, direct = stream(2), mgipt()
    direct(images[0])
    one_request(path, images[0])
    before = files(path)
    inferer = PersistentInferer(mgipt(), path, path.with_name("records.jsonl"), adapt=False)
    expected = direct(images[1])
    for _ in range(2):
        assert torch.equal(inferer(images[1], tiny_network()), expected)
        assert same_state(inferer.method.adaptation_state(), read(path)["adaptation"])
        assert (inferer.last[0]["position"], inferer.last[0]["adapt"]) == (1, False)
    assert files(path) == before


def test_without_adaptation_no_stream_is_begun(path: Path) -> None:
    one_request(path, stream(1)[0], adapt=False)
    assert set(files(path)) == {"stream.pt.lock"}


def test_reset_begins_the_stream_anew(path: Path) -> None:
    images = stream(3)
    for image in images[:2]:
        one_request(path, image)
    before = files(path)
    # a look at how the image would do as the first one
    assert torch.equal(one_request(path, images[2], reset=True, adapt=False), mgipt()(images[2]))
    assert files(path) == before
    assert torch.equal(one_request(path, images[2], reset=True), mgipt()(images[2]))
    assert read(path)["position"] == 1
    rows = RecordFile(path.with_name("records.jsonl")).read()
    assert [(row["position"], row["reset"]) for row in rows] == [(1, False), (2, False), (1, True)]


def test_other_weights_and_settings_are_refused_until_a_reset(path: Path) -> None:
    images = stream(2)
    one_request(path, images[0])
    before = files(path)
    other = tiny_network(seed=5)
    with pytest.raises(ValueError, match="other weights: start a new stream"):
        one_request(path, images[1], other)
    slower = PersistentInferer(mgipt(lr=0.01), path)
    with pytest.raises(ValueError, match=r"lr was 0\.05, is 0\.01; set them back, or start a new stream"):
        slower(images[1], tiny_network())
    assert files(path) == before
    one_request(path, images[1], other, reset=True)
    one_request(path, images[0], other)
    assert read(path)["position"] == 2


@pytest.mark.parametrize("name", ["adapt", "reset"])
def test_text_for_true_or_false_is_refused(path: Path, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be true or false, without quotation marks; got 'false'"):
        PersistentInferer(mgipt(), path, **{name: "false"})


@pytest.mark.parametrize("settings", [{}, {"reset": True}, {"adapt": False}])
def test_image_that_fails_leaves_no_trace(path: Path, settings: dict) -> None:
    images = stream(2)
    one_request(path, images[0])
    before = files(path)
    with pytest.raises(ValueError, match="the image is constant"):
        one_request(path, torch.ones(1, 3, 24, 24), **settings)
    batch = torch.cat([images[1], torch.full((1, 3, 24, 24), torch.nan)])
    with pytest.raises(ValueError, match="NaN"):
        one_request(path, batch, **settings)
    assert files(path) == before
    direct = mgipt()
    direct(images[0])
    assert torch.equal(one_request(path, images[1]), direct(images[1]))


def test_batch_counts_its_images_and_each_has_a_record(path: Path) -> None:
    names = ["clinic/eye_a.png", "clinic/eye_b.png"]
    batch = MetaTensor(torch.cat(stream(2)), meta={"filename_or_obj": names})
    logits = one_request(path, batch)
    rows = RecordFile(path.with_name("records.jsonl")).read()
    assert [(row["name"], row["position"], row["index"]) for row in rows] == [("eye_a.png", 1, 0), ("eye_b.png", 2, 1)]
    assert read(path)["position"] == 2
    assert logits.meta["adaptation"] == rows
    with pytest.raises(ValueError, match="records of 2 images, one is needed"):
        AdaptationResultd("pred")({"pred": logits})


def test_answer_without_a_record_is_an_error(mgipt: MGIPT) -> None:
    logits = AdaptiveInferer(mgipt)(MetaTensor(stream(1)[0]), mgipt.network)
    with pytest.raises(ValueError, match="records of 0 images, one is needed: predict with a PersistentInferer"):
        AdaptationResultd("pred")({"pred": logits[0]})


def test_answer_keeps_what_else_is_in_it(path: Path) -> None:
    logits = one_request(path, MetaTensor(stream(1)[0]))
    answer = AdaptationResultd("pred")({"pred": logits[0], "result": {"score": 1}})["result"]
    assert answer["score"] == 1
    assert answer["adaptation"]["position"] == 1


@pytest.mark.parametrize("shared", [True, False], ids=["one inferer", "an inferer each"])
def test_threads_take_turns_and_no_image_is_lost(path: Path, shared: bool) -> None:
    images = stream(6)
    # made here, since torch's global generator, which makes their weights, is one for all threads
    inferers = [PersistentInferer(mgipt(), path) for _ in images[: 1 if shared else None]] * (6 if shared else 1)
    networks = [inferer.method.network for inferer in inferers]
    outputs: dict[int, Tensor] = {}

    def work(i: int) -> None:
        image = MetaTensor(images[i], meta={"filename_or_obj": str(i)})
        outputs[i] = inferers[i](image, networks[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = sorted(outputs, key=lambda i: outputs[i].meta["adaptation"][0]["position"])
    assert [outputs[i].meta["adaptation"][0]["position"] for i in order] == [1, 2, 3, 4, 5, 6]
    assert [outputs[i].meta["adaptation"][0]["name"] for i in order] == [str(i) for i in order]
    direct = mgipt()
    for i in order:
        assert torch.equal(outputs[i].as_tensor(), direct(images[i]))
    assert same_state(read(path)["adaptation"], direct.adaptation_state())


def _refused(path: Path, answer: multiprocessing.Queue) -> None:
    try:
        PersistentInferer(mgipt(), path)(stream(1)[0], tiny_network())
    except RuntimeError as error:
        answer.put(str(error))


def test_other_processes_are_refused_while_this_one_lives(path: Path) -> None:
    one_request(path, stream(1)[0])
    context = multiprocessing.get_context("fork")  # a child that begins with all that its parent has in memory
    answer = context.Queue()
    other = context.Process(target=_refused, args=(path, answer))
    other.start()
    assert f"another process adapts with {path}" in answer.get(timeout=60)
    other.join()
    assert read(path)["position"] == 1
