# SPDX-License-Identifier: Apache-2.0
"""A longer stream in one process: what it holds does not grow. 5,000 images: ``python benchmarks/soak.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import load_benchmark


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's figures from /proc")
def test_descriptors_and_state_stay_and_memory_stays_near(tmp_path: Path) -> None:
    usages = load_benchmark("soak").soak(300, tmp_path)
    assert [usage.images for usage in usages] == list(range(30, 301, 30))
    # the first thirds warm up: libraries load, allocators fill, snapshots come
    warm = usages[3:]
    assert len({usage.descriptors for usage in warm}) == 1
    sizes = [usage.state_size for usage in warm]
    assert max(sizes) - min(sizes) < 256  # digits and names of sites
    # 1 MiB of leak every ten images would be seen
    assert warm[-1].resident - warm[0].resident < 16
