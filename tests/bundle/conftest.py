# SPDX-License-Identifier: Apache-2.0
"""Runs of the bundle on small image files, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from tests.module_runs import ONE_THREAD, ROOT, run_module

BUNDLE = ROOT / "bundle"
CONFIGS = BUNDLE / "configs"
collect_ignore = ["submission"]  # runs in the model zoo's layout, which test_zoo_submission.py makes
# few steps and small images: these tests ask whether configs run, not how well
QUICK = {"spatial_size": "[64,64]", "instance_prompt#steps": "1"}


def run_bundle(
    configs: Sequence[str | Path],
    check: bool = True,
    launcher: Sequence[str] = (),
    run_id: str = "run",
    bundle_root: Path = BUNDLE,
    **settings: object,
) -> subprocess.CompletedProcess:
    """Run ``python -m monai.bundle run`` with config files laid over each other and settings overridden."""
    files = ",".join(f"'{config if Path(config).is_absolute() else ROOT / config}'" for config in configs)
    settings = {"config_file": f"[{files}]", "bundle_root": bundle_root, **settings}
    overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    if launcher:
        command = [sys.executable, *launcher, "-m", "monai.bundle", "run", run_id, *overrides]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=ONE_THREAD)
    else:
        done = run_module("monai.bundle", ["run", run_id, *overrides])
    if check and done.returncode:
        raise AssertionError(done.stdout[-3000:] + done.stderr[-3000:])
    return done


@pytest.fixture(scope="session")
def demo_sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of three photographs of 64 px each, with masks."""
    folder = tmp_path_factory.mktemp("sites")
    write_demo_stream(folder, [CAMERAS["warm_vignetted"], CAMERAS["cold_noisy"]], count=3, size=64)
    return folder
