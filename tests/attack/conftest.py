# SPDX-License-Identifier: Apache-2.0
"""The attack suite: short in every run of the tests, in full with ``make attack``."""

from __future__ import annotations

import os

import pytest

from tests.bundle.conftest import demo_sites

__all__ = ["demo_sites"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the kill at every few lines to the full suite: it takes minutes."""
    if os.environ.get("MGIPT_ATTACK") == "full":
        return
    for item in items:
        if "attack" in item.path.parts and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="MGIPT_ATTACK=full runs it (make attack)"))
