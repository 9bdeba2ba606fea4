# SPDX-License-Identifier: Apache-2.0
"""The examples run from top to bottom; notebooks hold nothing of the machine they were made on."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mgipt_monai import MGIPT, AdaptiveInferer, Source
from tests.conftest import identical, snapshot, stream, tiny_network

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# constants that a notebook sets in a line of their own, and what is enough to see that it runs
FASTER = {"COUNT": 2, "STEPS": 4}
FOLDERS = r"/(?:home|root|Users|tmp|var|mnt|opt|usr|work|content)/|[A-Za-z]:\\\\"

# scripts, the package that each is about, and its last line
SCRIPTS = {
    "plain_pytorch": ("torch", "3 masks of (48, 64) pixels"),
    "smp_unet": ("segmentation_models_pytorch", "masks of (64, 64) pixels"),
    "torchio_grid": ("torchio", "volume 1: one image, mask of (20, 28, 16) voxels"),
}
# beside a torch for the CPU, a torchvision for CUDA lacks its operators, and fails where it describes them to the
# compiler; networks of segmentation_models_pytorch use none of them
WITHOUT_OPERATORS = """
import torch
describe = torch.library.register_fake
torch.library.register_fake = lambda name, *args, **kwargs: (
    (lambda function: function) if str(name).startswith("torchvision::") else describe(name, *args, **kwargs)
)
"""

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


def run_script(code: str, folder: Path) -> str:
    """Run Python code in a process of its own in a folder; return what it prints."""
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "PYTHONPATH": search}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=600,
        env={**os.environ, **settings},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@each_notebook
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    code = faster("\n\n".join("".join(cell["source"]) for cell in cells(path)))
    assert "COUNT = 2" in code
    run_script(code, tmp_path)


def test_every_script_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == SCRIPTS.keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs(name: str, tmp_path: Path) -> None:
    package, last = SCRIPTS[name]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    shown = run_script(WITHOUT_OPERATORS + (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"), tmp_path)
    assert shown.splitlines()[-1] == last


def test_torchio_joins_the_patches_of_one_adapted_volume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("torchio")
    grid = runpy.run_path(str(ROOT / "examples" / "torchio_grid.py"))["GridInferer"]((12, 12, 12), 4, batch_size=3)
    volume, network = stream(1, size=20, channels=1, dims=3)[0], tiny_network(3, 1).eval()
    with torch.no_grad():
        plain = grid(volume, network)
        torch.testing.assert_close(plain, network(volume), rtol=0, atol=float("inf"))  # of the same shape
    assert torch.equal(AdaptiveInferer(Source(network), grid)(volume, network), plain)

    before, method = snapshot(network), MGIPT(network, steps=1)
    adapted = AdaptiveInferer(method, grid)(volume, network)
    assert method.images_seen == 1
    assert not torch.equal(adapted, plain)
    assert identical(before, snapshot(network))


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
