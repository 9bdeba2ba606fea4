# SPDX-License-Identifier: Apache-2.0
"""The prediction without adaptation beside the adapted one: the same adaptation, at a stated cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from mgipt_monai import (
    MGIPT,
    SAR,
    VPTTA,
    AdaptationMethod,
    AdaptiveInferer,
    BatchNormAdaptation,
    CoTTA,
    GraTa,
    SiteCorrection,
    Source,
    Tent,
)
from mgipt_monai.data import AddUnadaptedd
from mgipt_monai.methods import Commissioned, DyNo, Guard, Guarded, InTEnt
from mgipt_monai.methods.commissioned import SiteSetting
from mgipt_monai.networks.correction import Correction
from mgipt_monai.utils.provenance import fingerprint
from tests.conftest import assert_batch_equals_one_by_one, same_state, stream, tiny_network


def quick(network: nn.Module, **settings: object) -> MGIPT:
    return MGIPT(network, steps=1, instance_sizes=[1, 3], global_sizes=[3], **settings)


def commissioned(network: nn.Module) -> Commissioned:
    offset = Correction(offset=torch.tensor([2.0, -1.0]))
    return Commissioned(Source(network), SiteSetting(fingerprint(network), {"class": "Source"}, offset))


METHODS: dict[str, tuple[Callable[[nn.Module], AdaptationMethod], int]] = {
    "source": (Source, 0),
    "steady": (SiteCorrection, 0),
    "intent": (InTEnt, 0),
    "dyno": (DyNo, 1),
    "guarded": (lambda network: Guarded(quick(network), Guard()), 0),
    "commissioned": (commissioned, 0),
    "mgipt": (quick, 1),
    "bn": (BatchNormAdaptation, 1),
    "vptta": (VPTTA, 1),
    "tent": (Tent, 1),
    "sar": (SAR, 1),
    "cotta": (CoTTA, 1),
    "grata": (GraTa, 1),
}


@pytest.mark.parametrize("name", METHODS)
def test_adaptation_is_the_same_and_costs_what_is_said(name: str) -> None:
    make, cost = METHODS[name]
    network = tiny_network()
    plain, compared = make(tiny_network()), make(network)
    compared.compare()
    for image in stream(3):
        assert torch.equal(plain(image), compared(image))
        assert plain.unadapted is None
        assert torch.allclose(compared.unadapted, network(image), atol=1e-6)
        assert compared.last[0]["forwards"] == plain.last[0]["forwards"] + cost
        assert compared.last[0]["backwards"] == plain.last[0]["backwards"]
    assert same_state(plain.adaptation_state(), compared.adaptation_state())
    assert plain.settings() == compared.settings()
    compared.reset()
    assert compared.unadapted is None


def test_a_batch_has_the_predictions_of_its_images() -> None:
    def make() -> AdaptationMethod:
        method = quick(tiny_network())
        method.compare()
        return method

    assert_batch_equals_one_by_one(make, stream(3))
    method = make()
    method(torch.cat(stream(3)))
    assert torch.allclose(method.unadapted, method.network(torch.cat(stream(3))), atol=1e-6)


@pytest.mark.parametrize("limit", [12, 2])
def test_a_limit_on_forwards_holds(limit: int) -> None:
    method = quick(tiny_network(), max_forwards=limit)
    method.compare()
    for image in stream(2):
        method(image)
        assert method.last[0]["forwards"] + method.last[0]["backwards"] <= limit


def test_a_limit_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 .* without adaptation"):
        AdaptiveInferer(quick(tiny_network(), max_forwards=1), side_by_side=True)


def test_through_windows_and_slices() -> None:
    network, image = tiny_network(), stream(1, size=32)[0]
    windows = SlidingWindowInferer((24, 24), overlap=0.5)
    inferer = AdaptiveInferer(quick(network), windows, side_by_side=True)
    inferer(image, network)
    assert torch.allclose(inferer.method.unadapted, windows(image, network), atol=1e-5)


def test_transform_needs_both_predictions() -> None:
    network = tiny_network()
    with pytest.raises(ValueError, match="side_by_side=True"):
        AddUnadaptedd(AdaptiveInferer(Source(network)))
    with pytest.raises(RuntimeError, match="predict the image"):
        AddUnadaptedd(AdaptiveInferer(Source(network), side_by_side=True))({"pred": torch.zeros(2, 8, 8)})
