# SPDX-License-Identifier: Apache-2.0
"""Networks that return a dict, a tuple or a list, and weights in other precisions."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.nets import HoVerNet
from torch import Tensor, nn

from mgipt_monai import (
    MGIPT,
    VPTTA,
    AdaptationMethod,
    BatchNormAdaptation,
    CoTTA,
    SiteCorrection,
    Source,
    Tent,
    measure_source_statistics,
)
from mgipt_monai.methods import Guard
from mgipt_monai.networks import AlignedNorms
from tests.conftest import identical, snapshot, stream, tiny_network

METHODS: list[Callable[..., AdaptationMethod]] = [
    lambda network, **kwargs: MGIPT(network, steps=1, **kwargs),
    lambda network, **kwargs: MGIPT(network, steps=1, guard=Guard(), **kwargs),
    lambda network, **kwargs: MGIPT.released(network, steps=1, **kwargs),
    VPTTA,
    SiteCorrection,
    BatchNormAdaptation,
    Source,
    Tent,
    CoTTA,
]


class Wrapped(nn.Module):
    """A network whose logits are one of its outputs."""

    def __init__(self, arrange: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.arrange = tiny_network(), arrange

    def forward(self, x: Tensor) -> Any:
        return self.arrange(self.inner(x))


ARRANGED = {
    "logits": lambda x: {"features": x[:, :1], "logits": x},
    "out": lambda x: OrderedDict(out=x, aux=x[..., ::2, ::2]),  # as the segmentation networks of torchvision
    1: lambda x: (x[..., ::2, ::2], x),
    0: lambda x: [x, x[..., ::2, ::2]],
    "function": lambda x: {"deep": [x, x[..., ::2, ::2]]},
}


@pytest.mark.parametrize("output", ARRANGED)
@pytest.mark.parametrize("make", METHODS)
def test_the_chosen_output_is_adapted_as_if_it_were_the_only_one(make: Callable, output: Any) -> None:
    image = stream(1)[0]
    expected = make(tiny_network())(image)
    chosen = (lambda outputs: outputs["deep"][0]) if output == "function" else output
    method = make(Wrapped(ARRANGED[output]), output=chosen)
    torch.testing.assert_close(method(image), expected)
    if make is not Tent:  # which predicts with a graph
        assert type(method.outputs) is type(ARRANGED[output](image))


@pytest.mark.parametrize(
    ("output", "named"),
    [("logits", "'features', 'logits' .*output='logits'"), (1, "a tuple of 2 entries"), (0, "a list of 2 entries")],
)
def test_without_a_choice_the_error_says_what_there_is(output: Any, named: str) -> None:
    for method in (MGIPT(Wrapped(ARRANGED[output])), Source(Wrapped(ARRANGED[output]))):
        with pytest.raises(TypeError, match=f"returns .*{named}"):
            method(stream(1)[0])
        assert method.images_seen == 0


def test_a_choice_that_is_not_there_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"output='mask' is not among .* 'features', 'logits'"):
        MGIPT(Wrapped(ARRANGED["logits"]), output="mask")(stream(1)[0])
    with pytest.raises(TypeError, match="output must be a key, an index or a function"):
        MGIPT(Wrapped(ARRANGED["logits"]), output=[1])


def test_hovernet_is_adapted_at_its_nuclei() -> None:
    torch.manual_seed(0)
    network = HoVerNet(mode="fast", in_channels=3, out_classes=3, np_out_channels=2).eval()
    method = BatchNormAdaptation(network, output="nucleus_prediction")  # one forward: it is a large network
    assert method(torch.rand(1, 3, 256, 256)).shape == (1, 2, 164, 164)
    assert {str(getattr(key, "value", key)) for key in method.outputs} >= {"nucleus_prediction", "horizontal_vertical"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", METHODS[:7])
def test_weights_in_another_precision_are_adapted_with_losses_in_float32(make: Callable, dtype: torch.dtype) -> None:
    network = tiny_network().to(dtype)
    before = snapshot(network)
    images = torch.cat(stream(2))
    method = make(network)
    logits = method(images)
    assert logits.dtype == torch.float32
    reference = make(tiny_network())
    torch.testing.assert_close(logits, reference(images), atol=0.5 if dtype != torch.float64 else 1e-3, rtol=0.1)
    assert identical(snapshot(network), before)
    if "loss_before" in method.last[0]:
        assert method.last[0]["loss_before"] == pytest.approx(reference.last[0]["loss_before"], rel=0.05)


def test_statistics_of_a_network_in_another_precision_are_float32() -> None:
    network = tiny_network().to(torch.bfloat16)
    statistics = measure_source_statistics(network, stream(2))
    assert {layer.mean.dtype for layer in statistics.layers.values()} == {torch.float32}
    assert torch.isfinite(MGIPT(network, statistics=statistics, steps=1)(stream(1)[0])).all()


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
def test_a_compiled_network_gives_the_same_bits_and_is_not_compiled_anew() -> None:
    compiled = []

    def count(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    network = torch.compile(tiny_network(), backend=count)
    image = stream(1)[0]
    for make in METHODS[:7]:
        assert torch.equal(make(network)(image), make(tiny_network())(image))
    assert not compiled
    network(image)  # outside it is what it was
    assert compiled


class Recomputed(torch.autograd.Function):
    """Activation checkpointing as on a GPU: the block runs again in a thread of autograd's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        (slope,) = torch.autograd.grad(y, x, gradient)
        return slope, None


class Checkpointed(nn.Module):
    """A network whose first block is recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_network()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = Recomputed.apply(x, layer) if isinstance(layer, nn.BatchNorm2d) else layer(x)
        return x


def test_layers_that_are_recomputed_in_another_threads_backward_pass_are_aligned() -> None:
    image = stream(1)[0]
    norms = AlignedNorms(Checkpointed().eval().requires_grad_(False))
    reference = AlignedNorms(tiny_network().eval().requires_grad_(False))
    slopes = []
    for each in (norms, reference):
        leaf = image.clone().requires_grad_()
        with each._using(leaf, "instance", None), torch.enable_grad():
            each.images = 1
            loss = each.network(leaf).square().sum()
            worker = threading.Thread(target=loss.backward)
            worker.start()
            worker.join()
        slopes.append(leaf.grad)
    torch.testing.assert_close(slopes[0], slopes[1])
