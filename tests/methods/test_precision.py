# SPDX-License-Identifier: Apache-2.0
"""Networks in bfloat16: near the same logits, the same each time, and nothing changes for those who do not ask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from mgipt_monai import MGIPT, VPTTA, AdaptationMethod, AdaptiveInferer, SiteCorrection, Source
from tests.conftest import identical, same_state, snapshot, tiny_network

METHODS: dict[str, Callable[..., AdaptationMethod]] = {
    "mgipt": lambda network: MGIPT(network, steps=1, instance_sizes=(1,), global_sizes=(3,)),
    "steady": SiteCorrection,
    "vptta": lambda network: VPTTA(network, side=3),
    "source": Source,
}


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_is_near_float32_and_the_same_each_time(name: str, images: list[torch.Tensor]) -> None:
    exact, *twice = (METHODS[name](tiny_network()) for _ in range(3))
    before = snapshot(twice[0].network)
    for method in twice:
        method.compute_in("bfloat16")
    for image in images:
        expected, (one, other) = exact(image), (method(image) for method in twice)
        assert torch.equal(one, other)
        assert one.dtype == torch.float32
        assert not torch.equal(one, expected)
        assert (one - expected).abs().mean() < 0.05 * expected.std()
    assert same_state(twice[0].adaptation_state(), twice[1].adaptation_state())
    assert identical(before, snapshot(twice[0].network))


def test_what_is_measured_and_learnt_stays_in_float32(images: list[torch.Tensor]) -> None:
    for name in ("mgipt", "steady"):
        method, exact = METHODS[name](tiny_network()), METHODS[name](tiny_network())
        method.compute_in("bfloat16")
        for image in images:
            method(image), exact(image)
        tensors = _tensors(method.adaptation_state())
        assert tensors
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        # not rounded on the way: bfloat16 has 8 significant bits
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors)
        for tensor, expected in zip(tensors, _tensors(exact.adaptation_state()), strict=True):
            assert torch.allclose(tensor, expected, atol=0.1)


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    each = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for one in each for tensor in _tensors(one)]


def test_precision_is_a_setting_of_the_stream_only_where_it_is_asked_for() -> None:
    method = SiteCorrection(tiny_network())
    assert "precision" not in method.settings()
    sliding = SlidingWindowInferer(roi_size=(16, 16))
    AdaptiveInferer(method, sliding, precision="bfloat16")
    assert method.settings()["precision"] == "bfloat16"
    # inferers that say nothing of it leave it, as a handler's does
    AdaptiveInferer(method, sliding)
    assert AdaptiveInferer(method, sliding, precision="bfloat16").with_method(method.twin()).precision == "bfloat16"
    assert method.settings()["precision"] == "bfloat16"
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16; got 'half'"):
        AdaptiveInferer(method, precision="half")
