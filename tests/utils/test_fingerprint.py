# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mgipt_monai.utils.provenance import fingerprint
from tests.conftest import tiny_network


class Holder(nn.Module):
    """A network with tensors of any data type."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def test_it_is_of_the_weights_alone() -> None:
    network = tiny_network()
    before = fingerprint(network)
    assert len(before) == 64
    assert int(before, 16) >= 0
    assert fingerprint(copy.deepcopy(network).eval().requires_grad_(False)) == before
    reloaded = tiny_network(seed=1)
    assert fingerprint(reloaded) != before
    reloaded.load_state_dict(network.state_dict())
    assert fingerprint(reloaded) == before


@pytest.mark.parametrize("key", list(tiny_network().state_dict()))
def test_every_tensor_counts(key: str) -> None:
    network = tiny_network()
    before = fingerprint(network)
    network.state_dict()[key].flatten()[-1:].add_(1)
    assert fingerprint(network) != before


def test_it_never_changes() -> None:
    # existing files must remain valid
    network = Holder(b=torch.arange(3), a=torch.tensor([[1.5]]))
    assert fingerprint(network) == "0ce425501010abc52e0d3c4bdbfec6731dc0fe2d120f0553610f9961bb86ae5b"


def test_order_of_the_layers_does_not_count_but_their_names_do() -> None:
    one, other = torch.ones(2), torch.zeros(2)
    assert fingerprint(Holder(a=one, b=other)) == fingerprint(Holder(b=other, a=one))
    assert fingerprint(Holder(a=one, b=other)) != fingerprint(Holder(a=other, b=one))


def test_shape_and_type_count() -> None:
    values = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, 1), torch.zeros(2).double(), torch.zeros(4).int()]
    assert len({fingerprint(Holder(a=value)) for value in values}) == len(values)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool]
)
def test_every_bit_of_every_type_counts(dtype: torch.dtype) -> None:
    bits = torch.zeros(16, dtype=torch.uint8)
    zero = fingerprint(Holder(a=bits.view(dtype)))
    bits[-1] = 1
    assert fingerprint(Holder(a=bits.view(dtype))) != zero


def test_sign_of_zero_counts_and_memory_layout_does_not() -> None:
    assert fingerprint(Holder(a=torch.tensor([0.0]))) != fingerprint(Holder(a=torch.tensor([-0.0])))
    tensor = torch.arange(6.0).view(2, 3)
    assert fingerprint(Holder(a=tensor)) == fingerprint(Holder(a=tensor.t().contiguous().t()))


def test_scalars_and_empty_tensors_are_taken() -> None:
    assert fingerprint(Holder(a=torch.tensor(1))) != fingerprint(Holder(a=torch.tensor(2)))
    assert fingerprint(Holder(a=torch.zeros(0, 3))) != fingerprint(Holder(a=torch.zeros(0, 4)))
