# SPDX-License-Identifier: Apache-2.0
"""What the documents say holds: their Python runs, their files exist, the demo runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundle.conftest import ONE_THREAD

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", ["README.md", "docs/existing-pipelines.md"])
def test_python_of_a_page_runs_in_one_go(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    linked = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(
        r"(?<![\w/])((?:bundle/configs|configs|mgipt_monai|tests|docs)/[\w/.-]+\.(?:yaml|py|md|json|png))", text
    )
    missing = [name for name in [*linked, *named] if not ((page.parent / name).exists() or (ROOT / name).exists())]
    assert not missing


def test_demo_prints_its_table_and_draws_its_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mgipt_monai.demo", "--folder", str(tmp_path), "--count", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(camera in done.stdout for camera in ("low_contrast", "warm_vignetted", "cold_noisy", "all"))
    assert (tmp_path / "demo.png").stat().st_size > 50_000
    assert len(list((tmp_path / "mgipt").rglob("*.png"))) == 3
