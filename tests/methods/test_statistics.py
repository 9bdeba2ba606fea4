# SPDX-License-Identifier: Apache-2.0
"""MGIPT and VPTTA on a network that stores no source statistics, with a statistics file."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from mgipt_monai import MGIPT, VPTTA, AdaptationMethod, measure_source_statistics
from tests.conftest import MixedNet, identical, same_state, snapshot, stream, tiny_network

SETTINGS: dict[type[AdaptationMethod], dict] = {
    MGIPT: {"steps": 2, "instance_sizes": (1, 3)},
    VPTTA: {"memory_size": 2, "neighbours": 1},
}
both = pytest.mark.parametrize("kind", [MGIPT, VPTTA])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A statistics file of the mixed network."""
    measure_source_statistics(MixedNet(), stream(3)).save(tmp_path / "statistics.pt")
    return tmp_path / "statistics.pt"


def images() -> list[torch.Tensor]:
    return [0.6 * image + 0.4 for image in stream(3, seed=1)]


def build(kind: type[AdaptationMethod], path: Path, seed: int = 0) -> AdaptationMethod:
    return kind(MixedNet(seed), statistics=path, **SETTINGS[kind])


@both
def test_file_its_path_as_text_and_its_content_are_the_same(kind: type, path: Path) -> None:
    content = measure_source_statistics(MixedNet(), stream(3))
    outputs = [build(kind, given)(images()[0]) for given in (path, str(path), content)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@both
def test_stream_leaves_the_network_and_is_resumed_and_copied_alike(kind: type, path: Path) -> None:
    method = build(kind, path)
    before = snapshot(method.network)
    first, *rest = images()
    method(first)
    assert method.last[0]["loss_before"] > 0
    others = [copy.deepcopy(method), pickle.loads(pickle.dumps(method)), build(kind, path)]
    others[-1].load_adaptation_state(method.adaptation_state())
    for image in rest:
        expected = method(image)
        assert all(torch.equal(other(image), expected) for other in others)
    assert identical(before, snapshot(method.network))


@both
def test_adaptation_changes_the_prediction_and_lowers_the_loss(kind: type, path: Path) -> None:
    method, (image, *_) = build(kind, path), images()
    adapted = method(image)
    assert not torch.equal(adapted, method.network(image))
    if kind is MGIPT:
        assert method.last[0]["loss_after"] < method.last[0]["loss_before"]


@both
def test_weights_may_be_loaded_after_construction_and_are_checked_at_the_first_image(kind: type, path: Path) -> None:
    method, image = build(kind, path, seed=1), images()[0]
    fresh = method.adaptation_state()
    for _ in range(2):
        with torch.inference_mode(), pytest.raises(ValueError, match=r"made with other weights.*source-statistics"):
            method(image)
        assert same_state(method.adaptation_state(), fresh)
    method.network.load_state_dict(MixedNet().state_dict())
    assert torch.equal(method(image), build(kind, path)(image))


@both
def test_weights_are_checked_anew_after_bind_and_reset_alone(kind: type, path: Path) -> None:
    method, image = build(kind, path), images()[0]
    method(image)
    method.network.head.bias.data += 1
    method(image)  # hashing the weights at every image would cost too much
    state = method.adaptation_state()
    started_anew = copy.deepcopy(method)
    started_anew.reset()
    method.bind(method.network)
    for each in (started_anew, method):
        with pytest.raises(ValueError, match="made with other weights"):
            each(image)
    assert same_state(method.adaptation_state(), state)
    method.bind(MixedNet())
    method(image)


@both
def test_network_that_stores_nothing_is_refused_without_a_file(kind: type) -> None:
    with pytest.raises(ValueError, match=r"1 x InstanceNorm2d, 1 x GroupNorm, 1 x LayerNorm\): .*source-statistics"):
        kind(MixedNet())


@both
def test_absent_and_foreign_files_are_refused_at_construction(kind: type, path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        kind(MixedNet(), statistics=path.with_name("absent.pt"))
    with pytest.raises(ValueError, match="another network"):
        kind(tiny_network(), statistics=path)
    with pytest.raises(ValueError, match="'decoder' matches no layer of the statistics file"):
        kind(MixedNet(), statistics=path, aligned_layers="decoder")


def test_released_setting_takes_statistics_too(path: Path) -> None:
    mgipt = MGIPT.released(MixedNet(), statistics=path, steps=1)
    assert mgipt(images()[0]).shape == (1, 2, 24, 24)
    assert VPTTA.released(MixedNet(), statistics=path)(images()[0]).shape == (1, 2, 24, 24)
