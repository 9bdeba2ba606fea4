# SPDX-License-Identifier: Apache-2.0
"""How often a GPU would be waited for, counted on CPU tensors: as often for many steps and windows as for few."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mgipt_monai import MGIPT, AdaptationMethod, SiteCorrection
from tests.conftest import stream, tiny_network

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
"""Operations whose result the processor needs: it waits until the GPU is done."""


class Waits(TorchDispatchMode):
    """Counts operations that read a number of the device, but for Adam's step counts, which are never on it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, self.operations = 0, Counter[Any]()
        # on CPU tensors these dispatch nothing
        for name in ("cpu", "numpy", "tolist"):
            patch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def _counted(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return read(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        # without vectors: the list of a tuning's losses has one number per step
        self.operations[name, tuple(tuple(a.shape) for a in args if isinstance(a, Tensor) and a.ndim > 1)] += 1
        by_mask = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += (name in READS or by_mask) and not _in_adam()
        return func(*args, **(kwargs or {}))


def _in_adam() -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.replace("\\", "/").endswith("torch/optim/adam.py"):
            return True
        frame = frame.f_back
    return False


def watched(method: AdaptationMethod, image: Tensor, patch: pytest.MonkeyPatch) -> Waits:
    """Return what was dispatched for the second image of a stream."""
    method(image)
    with patch.context() as within, Waits(within) as found:
        method(0.9 * image)
    return found


def waits(method: AdaptationMethod, image: Tensor, patch: pytest.MonkeyPatch) -> int:
    """Return the number of waits for the second image of a stream."""
    return watched(method, image, patch).count


def test_reads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(4)
    with monkeypatch.context() as within, Waits(within) as found:
        values.sum().item()
        values[values > 0.5].cpu()
        values.tolist()
    assert found.count == 4


def test_each_step_of_tuning_dispatches_the_same_operations_with_the_same_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the capture of a step as a CUDA graph needs."""
    found = []
    for steps in (3, 4, 5):
        method = MGIPT(tiny_network(), steps=steps, instance_sizes=(1,), global_sizes=(3,))
        found.append(watched(method, stream(1)[0], monkeypatch).operations)
    fourth, fifth = found[1] - found[0], found[2] - found[1]
    assert fourth == fifth
    assert sum(fourth.values()) > 20


@pytest.mark.parametrize("sliding", [False, True])
def test_a_step_of_tuning_waits_for_nothing(sliding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for steps in (1, 5):
        method = MGIPT(tiny_network(), steps=steps, instance_sizes=(1,), global_sizes=(3,))
        if sliding:
            method.predict_through(SlidingWindowInferer(roi_size=(12, 12)))
        found.append(waits(method, stream(1)[0], monkeypatch))
    assert found[0] == found[1] > 0
    # what is read once per size, for the global prompts and for the memory and the record
    assert found[0] < 25


@pytest.mark.parametrize(
    "make", [lambda: MGIPT(tiny_network(), steps=1, instance_sizes=(1,)), lambda: SiteCorrection(tiny_network())]
)
def test_the_windows_of_a_prediction_wait_for_nothing(
    make: Callable[[], AdaptationMethod], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for overlap in (0.0, 0.75):
        method = make()
        method.predict_through(SlidingWindowInferer(roi_size=(12, 12), overlap=overlap))
        found.append(waits(method, stream(1)[0], monkeypatch))
    assert found[0] == found[1] > 0
