# SPDX-License-Identifier: Apache-2.0
"""The notebooks of `examples/` run from top to bottom, and hold nothing of the machine they were made on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# constants that a notebook sets in a line of their own, and what is enough to see that it runs
FASTER = {"COUNT": 2, "STEPS": 4}
FOLDERS = r"/(?:home|root|Users|tmp|var|mnt|opt|usr|work|content)/|[A-Za-z]:\\\\"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def faster(code: str) -> str:
    """Return a notebook's code with smaller sizes."""
    for name, value in FASTER.items():
        code = re.sub(rf"^{name} = \d+", f"{name} = {value}", code, flags=re.MULTILINE)
    return code


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["adapt_existing_pipeline", "compare_methods", "own_3d_network"]


@each_notebook
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    code = faster("\n\n".join("".join(cell["source"]) for cell in cells(path)))
    assert "COUNT = 2" in code
    script = tmp_path / f"{path.stem}.py"
    script.write_text(code, encoding="utf-8")
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "PYTHONPATH": search}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
        env={**os.environ, **settings},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@each_notebook
def test_notebook_is_small_and_whole(path: Path) -> None:
    assert path.stat().st_size < 300_000
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    # all cells were run, in order, or none
    counts = [cell["execution_count"] for cell in cells(path)]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))


@each_notebook
def test_notebook_names_no_folder_of_a_machine(path: Path) -> None:
    # pictures are long random letters, among which anything may stand
    text = re.sub(r'"image/png": ("[^"]*"|\[[^\]]*\])', "", path.read_text(encoding="utf-8"))
    assert re.findall(FOLDERS, text) == []
