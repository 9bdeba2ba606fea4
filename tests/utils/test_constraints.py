# SPDX-License-Identifier: Apache-2.0
"""Every direct dependency is pinned, for each version of Python that is supported."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def requirements(text: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_direct_dependency_is_pinned_to_one_version_that_is_allowed(python: str) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    direct = requirements(config["options"]["install_requires"])
    for text in config["options.extras_require"].values():
        direct += requirements(text)
    pins: dict[str, list[str]] = {}
    for pin in requirements((ROOT / "constraints.txt").read_text()):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            (version,) = pin.specifier
            assert version.operator == "=="
            pins.setdefault(canonicalize_name(pin.name), []).append(version.version)
    for requirement in direct:
        (version,) = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version)
