# SPDX-License-Identifier: Apache-2.0
"""The package does without what only the benchmark, its report and the demo need."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = ("matplotlib", "jinja2", "scipy", "py_sod_metrics")


def test_package_is_imported_without_the_extras() -> None:
    # None in sys.modules: Python then takes the package for absent
    block = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{block}; import mgipt_monai.data.published"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
