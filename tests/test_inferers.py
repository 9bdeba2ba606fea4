# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from mgipt_monai import MGIPT, AdaptiveInferer, Source
from tests.conftest import identical, same_state, snapshot, stream, tiny_network


def test_inferer_adapts_under_no_grad_and_keeps_meta_data(mgipt: MGIPT) -> None:
    image = MetaTensor(stream(1)[0], meta={"filename_or_obj": "eye.png"})
    expected = MGIPT(tiny_network(), steps=2)(image)
    with torch.no_grad():
        logits = AdaptiveInferer(mgipt)(inputs=image, network=mgipt.network)  # by keyword, as MONAI Deploy calls
    assert torch.equal(logits, expected)
    assert logits.meta["filename_or_obj"] == "eye.png"
    assert mgipt.images_seen == 1


def test_method_as_the_network_is_adapted_once(mgipt: MGIPT) -> None:
    AdaptiveInferer(mgipt)(stream(1)[0], mgipt)
    assert mgipt.images_seen == 1


def test_other_method_as_the_network_is_an_error(mgipt: MGIPT) -> None:
    with pytest.raises(RuntimeError, match="adapted to twice"):
        AdaptiveInferer(mgipt)(stream(1)[0], Source(tiny_network()))
    assert mgipt.images_seen == 0


def test_something_that_does_not_adapt_is_refused(network: nn.Module) -> None:
    with pytest.raises(TypeError, match="got Sequential"):
        AdaptiveInferer(network)


def test_further_arguments_to_the_network_are_refused(mgipt: MGIPT) -> None:
    with pytest.raises(TypeError, match="passes only images"):
        AdaptiveInferer(mgipt)(stream(1)[0], mgipt.network, torch.zeros(1))


def test_server_contract_copy_load_eval_no_grad_and_a_new_inferer_per_request() -> None:
    # what MONAI Label does: it copies the network, loads weights non-strictly, and may build the inferer anew
    weights = tiny_network(seed=3).state_dict()
    images = stream(3)
    definition = tiny_network(seed=1)
    mgipt = MGIPT(definition, steps=2)
    served = copy.deepcopy(definition)
    served.load_state_dict(weights, strict=False)
    served.eval()
    before = snapshot(served)
    outputs = []
    with torch.no_grad():
        for image in images:
            outputs.append(AdaptiveInferer(mgipt)(image, served))
    direct = MGIPT(tiny_network(seed=3), steps=2)
    assert all(torch.equal(output, direct(image)) for output, image in zip(outputs, images, strict=True))
    assert same_state(mgipt.adaptation_state(), direct.adaptation_state())
    assert identical(before, snapshot(served))


def test_reloaded_network_keeps_the_stream() -> None:
    # what MONAI Deploy does: the network is loaded again for every call, strictly
    mgipt = MGIPT(tiny_network(), steps=2)
    direct = MGIPT(tiny_network(), steps=2)
    for image in stream(2):
        reloaded = tiny_network(seed=9)
        reloaded.load_state_dict(tiny_network().state_dict(), strict=True)
        assert torch.equal(AdaptiveInferer(mgipt)(inputs=image, network=reloaded), direct(image))
