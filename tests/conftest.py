# SPDX-License-Identifier: Apache-2.0
"""Small networks and images that many tests share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.utils import set_determinism
from torch import nn

from mgipt_monai import MGIPT, AdaptationMethod, RecordFile

# tiny tensors: more threads only get into each other's way
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws at random is the same on every machine and in every order of the tests."""
    set_determinism(seed=0, use_deterministic_algorithms=None)


def load_benchmark(name: str) -> ModuleType:
    """Import a script of `benchmarks/`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a NamedTuple looks its module up
    spec.loader.exec_module(module)
    return module


def tiny_network(spatial_dims: int = 2, in_channels: int = 3, out_channels: int = 2, seed: int = 0) -> nn.Module:
    """Two convolutions with batch norm whose stored statistics are far from what random images give."""
    torch.manual_seed(seed)
    conv, norm = {
        1: (nn.Conv1d, nn.BatchNorm1d),
        2: (nn.Conv2d, nn.BatchNorm2d),
        3: (nn.Conv3d, nn.BatchNorm3d),
    }[spatial_dims]
    network = nn.Sequential(
        conv(in_channels, 6, 3, padding=1), norm(6), nn.ReLU(),
        conv(6, 6, 3, padding=1), norm(6), nn.ReLU(), nn.Dropout(0.5),
        conv(6, out_channels, 1),
    )  # fmt: skip
    for layer in (network[1], network[4]):
        layer.running_mean.normal_(0, 0.3)
        layer.running_var.uniform_(0.05, 0.5)
    # a head whose channels are of either sign, so that masks are neither empty nor full
    nn.init.normal_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    network[-1].weight.data -= network[-1].weight.data.mean(dim=1, keepdim=True)
    return network


class MixedNet(nn.Module):
    """One instance, one group and one layer norm, which store no statistics, behind a convolution each."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)])
        self.instance, self.group, self.layer = nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.instance(self.convs[0](x)).relu()
        x = self.group(self.convs[1](x)).relu()
        x = self.layer(self.convs[2](x).movedim(1, -1)).movedim(-1, 1)
        return self.head(x)

    def norm_inputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What goes into each norm layer, (B, 4, H, W)."""
        taken = {"instance": self.convs[0](x)}
        taken["group"] = self.convs[1](self.instance(taken["instance"]).relu())
        taken["layer"] = self.convs[2](self.group(taken["group"]).relu())
        return taken


def stream(count: int, size: int = 24, channels: int = 3, dims: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Smooth random images (1, channels, size, ...) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
    images = []
    for _ in range(count):
        coarse = torch.rand(1, channels, *[6] * dims, generator=generator)
        fine = 0.1 * torch.rand(1, channels, *[size] * dims, generator=generator)
        images.append((nn.functional.interpolate(coarse, size=[size] * dims, mode=mode) * 0.9 + fine).clamp(0, 1))
    return images


def snapshot(network: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    return {key: value.clone() for key, value in network.state_dict().items()}


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def assert_batch_equals_one_by_one(make: Callable[[], AdaptationMethod], images: Sequence[torch.Tensor]) -> None:
    """Give the images to one method as a batch and to another one by one: outputs, records and states are alike."""
    batched, single = make(), make()
    together = batched(torch.cat(list(images)))
    apart, records = [], []
    for image in images:
        apart.append(single(image))
        records += single.last
    assert torch.equal(together, torch.cat(apart))
    assert batched.last == records
    assert same_state(batched.adaptation_state(), single.adaptation_state())


def same_state(one: Any, other: Any) -> bool:
    """Whether two adaptation states, or parts of them, are bit-identical."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_state, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def without_times(path: Path) -> list[dict]:
    """Return a file's records without what differs from run to run."""
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "time", "run")}
        for row in RecordFile(path).read()
    ]


@pytest.fixture
def network() -> nn.Module:
    return tiny_network()


@pytest.fixture
def mgipt(network: nn.Module) -> MGIPT:
    return MGIPT(network, steps=2)


@pytest.fixture
def images() -> list[torch.Tensor]:
    return stream(4)


def labelled_square(spacing: float) -> MetaTensor:
    """Return a square of 8 x 8 pixels in an image of 32 x 32 with the given spacing in its affine."""
    mask = torch.zeros(1, 32, 32)
    mask[:, 4:12, 4:12] = 1
    return MetaTensor(mask, affine=torch.diag(torch.tensor([spacing, spacing, 1.0, 1.0])))
