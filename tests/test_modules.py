# SPDX-License-Identifier: Apache-2.0
"""Every public module can be moved, cast, copied and pickled."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mgipt_monai import methods, networks
from mgipt_monai.methods import AdaptationMethod, Guard, Guarded
from tests.conftest import stream, tiny_network


def public_modules() -> list[type[nn.Module]]:
    found = {
        cls
        for package in (methods, networks)
        for cls in (getattr(package, name) for name in package.__all__)
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and not inspect.isabstract(cls)
    }
    return sorted(found, key=lambda cls: cls.__name__)


SPECIAL: dict[str, Callable[[], nn.Module]] = {
    "FrequencyPrompt": lambda: networks.FrequencyPrompt(2, 3, 3),
    "MGIPT": lambda: methods.MGIPT(tiny_network(), steps=1),
    "Guarded": lambda: Guarded(methods.MGIPT(tiny_network(), steps=1), Guard()),
    "ResUNet": lambda: networks.ResUNet(backbone="resnet34"),
}


def made(cls: type[nn.Module]) -> nn.Module:
    if cls.__name__ in SPECIAL:
        return SPECIAL[cls.__name__]()
    return cls(tiny_network()) if issubclass(cls, AdaptationMethod) else cls()


# they need files that belong to a network's weights, which stay the same here in single precision alone
BOUND = ("Commissioned", "TTN")


@pytest.mark.parametrize("cls", [c for c in public_modules() if c.__name__ not in BOUND], ids=lambda c: c.__name__)
def test_a_public_module_is_moved_cast_copied_and_pickled(cls: type[nn.Module]) -> None:
    module = made(cls)
    adapts, image = isinstance(module, AdaptationMethod), stream(1)[0]
    if adapts:
        module(image)
    for change in (
        lambda m: m.to("cpu"),
        lambda m: m.cpu(),
        lambda m: m.float(),
        lambda m: m.to(torch.float32),
        lambda m: m.requires_grad_(False),
        lambda m: m.eval(),
        lambda m: m.apply(lambda _: None),
    ):
        assert change(module) is module
    for twin in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        if adapts:
            assert twin.images_seen == 1
    if adapts:
        expected = copy.deepcopy(module)(image)
        assert torch.equal(pickle.loads(pickle.dumps(module))(image), expected)
    assert module.double() is module
    if adapts:
        module.reset()
        assert torch.isfinite(module(image)).all()


def test_the_loop_finds_the_modules_that_people_use() -> None:
    names = {cls.__name__ for cls in public_modules()}
    assert names >= {
        "MGIPT",
        "VPTTA",
        "Source",
        "Guarded",
        "GlobalPrompts",
        "InstancePrompt",
        "FrequencyPrompt",
        "PraNet",
    }
