# SPDX-License-Identifier: Apache-2.0
"""The benchmark of speed runs its methods on the same weights and image. No time is asserted."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.conftest import load_benchmark, tiny_network


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    return load_benchmark("speed")


def test_every_method_has_its_turns_and_both_ways_agree(speed: ModuleType) -> None:
    size = speed.Size(tiny_network, 3, (24, 24))
    times, agreement = speed.turns(size, speed.weights(size), repeats=2, device="cpu")
    assert list(times) == list(speed.METHODS)
    # the logits are of size 1
    assert float(agreement.split("differ by at most ")[1].split(",")[0]) < 1e-4
    first, second = agreement.split("chosen sizes ")[1].split(".")[0].split(" and ")
    assert first == second


def test_weights_and_images_are_the_same_each_time(speed: ModuleType) -> None:
    size = speed.Size(tiny_network, 3, (24, 24))
    one, other = speed.weights(size), speed.weights(size)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(speed.synthetic(size, 0), speed.synthetic(size, 0))
    # what the batch norms store is what the images give
    assert (one["1.running_mean"] - tiny_network()[1].running_mean).abs().max() > 0.01


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's figures from /proc")
def test_peak_is_at_least_what_was_held_before(speed: ModuleType, tmp_path: Path) -> None:
    speed.NETWORKS["tiny"] = size = speed.Size(tiny_network, 3, (24, 24))
    torch.save(speed.weights(size), tmp_path / "weights.pt")
    most, before = speed.peak("tiny", speed.PLAIN, str(tmp_path / "weights.pt"), "cpu")
    assert most >= before > 50
