# SPDX-License-Identifier: Apache-2.0
"""The exact method is the method as published, computed in another way."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from mgipt_monai import MGIPT
from tests import golden_inputs
from tests.conftest import identical, load_benchmark, snapshot, stream, tiny_network

MAKE = {"instance": MGIPT, "released": MGIPT.released}


@pytest.fixture(scope="module")
def yardstick() -> ModuleType:
    return load_benchmark("yardstick")


@pytest.mark.parametrize("tuning", MAKE)
@pytest.mark.parametrize(("dims", "classes"), [(1, 2), (2, 2), (2, 1), (3, 2)])
def test_exact_method_is_the_yardstick(yardstick: ModuleType, tuning: str, dims: int, classes: int) -> None:
    network = tiny_network(dims, out_channels=classes).eval()
    measured, mgipt = yardstick.Yardstick(network, tuning), MAKE[tuning](tiny_network(dims, out_channels=classes))
    for image in stream(3, size=13, dims=dims):
        torch.testing.assert_close(mgipt(image), measured(image), atol=1e-4, rtol=1e-4)
        assert mgipt.last[0]["instance_size"] == measured.instance_size
        for one, other in zip(mgipt.global_prompts.teachers, measured.teachers, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_yardstick_gives_the_released_outputs(yardstick: ModuleType) -> None:
    golden = np.load(Path(__file__).parent / "golden" / "mgipt_seed1.npz")
    measured = yardstick.Yardstick(golden_inputs.network(1), "released", jitter=golden_inputs.jitter)
    for i in range(2):
        probability = measured(golden_inputs.image(1000 + i)).sigmoid()[0]
        assert abs(probability[:, ::8, ::8] - torch.from_numpy(golden[f"out{i}"])).max() < 1e-4


def test_yardstick_leaves_the_network_alone(yardstick: ModuleType) -> None:
    network = tiny_network()
    before = snapshot(network)
    yardstick.Yardstick(network, steps=1)(stream(1)[0])
    assert identical(before, snapshot(network))
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("side", [1, 3])
def test_full_transform_multiplies_the_amplitudes_of_the_lowest_frequencies(
    yardstick: ModuleType, side: int, centred: bool
) -> None:
    image, prompt = stream(1, size=15)[0], torch.rand(1, 3, side, side) + 0.5
    first = -(side // 2) if centred else -((side + 1) // 2)
    factors = torch.roll(pad(prompt, [0, 15 - side] * 2, value=1.0), (first, first), dims=(2, 3))
    expected = torch.fft.ifft2(torch.fft.fft2(image) * factors).real
    torch.testing.assert_close(yardstick._prompted(image, prompt, centred), expected, atol=1e-5, rtol=0)
