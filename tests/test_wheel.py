# SPDX-License-Identifier: Apache-2.0
"""The package as it is installed: built from the sdist, and used where there is no clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.networks.nets import UNet
from PIL import Image

from mgipt_monai import RecordFile
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from mgipt_monai.installed import FILES
from tests.module_runs import ONE_THREAD, ROOT

ENVIRONMENT = {key: value for key, value in ONE_THREAD.items() if key != "PYTHONPATH"}
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
VOLUMES = """
spatial_dims: 3
in_channels: 1
class_names: [bright]
mask_values: [1]
spatial_size: [16, 16, 16]
network_def:
  _target_: UNet
  spatial_dims: 3
  in_channels: 1
  out_channels: 1
  channels: [4, 8]
  strides: [2]
  norm: batch
"""


def run(command: Sequence[str | Path], folder: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def source_tree(folder: Path) -> Path:
    """A copy of the project, as building writes into it, with files of a user in the bundle."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info", "outputs")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    for name in ("outputs/eye.png", "models/source_statistics.pt"):
        (folder / "bundle" / name).parent.mkdir(exist_ok=True)
        (folder / "bundle" / name).touch()
    return folder


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it."""
    source = source_tree(folder / "source")
    isolated = find_spec("setuptools") is None or int(version("setuptools").partition(".")[0]) < 77
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if isolated:
        source_dist = source
    else:
        run([sys.executable, "-c", BUILD_SDIST, folder], source)
        (source_dist,) = folder.glob("*.tar.gz")
    run([*pip, "wheel", "--quiet", "--no-deps", *["--no-build-isolation"] * (not isolated), source_dist], folder)
    (wheel,) = folder.glob("*.whl")
    return source_dist, wheel


def virtual_environment(folder: Path, wheel: Path) -> Path:
    """An environment with the wheel that borrows all other packages; return its folder of commands."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    (own,) = folder.rglob("site-packages")
    # the .pth files in there, such as that of an editable install, are not read from here
    (own / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", commands / "python"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel], folder)
    return commands


def expected(root: Path = ROOT) -> set[str]:
    return {
        path.relative_to(root).as_posix()
        for folder, patterns in FILES.items()
        for pattern in patterns
        for path in (root / folder).glob(pattern)
    }


def check_content(source_dist: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        infos = {name: archive.getinfo(name) for name in names}
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(about))
        alias = archive.read("mgipt_monai/bundle/configs/calibrate.yaml")
    data = {
        name.removeprefix("mgipt_monai/")
        for name in names
        if name.startswith(("mgipt_monai/bundle/", "mgipt_monai/configs/"))
    }
    assert data == expected()
    assert {"bundle/models/model.pt", "configs/guard.yaml", "configs/methods/bn.yaml"} <= data
    assert alias == (ROOT / "bundle" / "configs" / "source_statistics.yaml").read_bytes()
    assert not [name for name, info in infos.items() if info.external_attr >> 28 == 0xA], "no links"
    assert {"mgipt_monai/py.typed", "mgipt_monai/report/report.html.j2"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"mgipt_monai"}
    assert {"benchmark", "demo", "label", "test"} <= set(metadata.get_all("Provides-Extra"))
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    if source_dist.is_file():
        with tarfile.open(source_dist) as archive:
            members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        assert {"CHANGELOG.md", "docs/index.md", "setup.py", *expected()} <= members.keys()
        assert members["configs/existing_calibrate.yaml"].isfile()
        assert not [
            name for name in members if name.startswith("tests") or "outputs/" in name or "source_statistics.pt" in name
        ]


def test_wheel_is_whole_and_works_without_a_clone(tmp_path: Path) -> None:
    source_dist, wheel = build(tmp_path)
    check_content(source_dist, wheel)
    commands = virtual_environment(tmp_path / "venv", wheel)
    work = tmp_path / "elsewhere"
    work.mkdir()
    mgipt, python = commands / "mgipt", commands / "python"
    bundle = Path(run([mgipt, "path"], work).strip())
    assert bundle.is_relative_to(tmp_path / "venv")

    write_demo_stream(work / "sites", [CAMERAS["cold_noisy"]], count=2, size=64)
    photographs = work / "sites" / "cold_noisy" / "images"
    (work / "volumes").mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        nib.save(nib.Nifti1Image(rng.random((20, 18, 16), "float32"), np.eye(4)), work / "volumes" / f"{name}.nii.gz")
    (work / "volumes.yaml").write_text(VOLUMES)
    torch.manual_seed(0)
    torch.save(UNet(3, 1, 1, (4, 8), (2,), norm="batch").state_dict(), work / "volumes.pt")
    small = ["--spatial_size", "[64,64]", "--instance_prompt#steps", "1"]
    monai = [python, "-m", "monai.bundle", "run", "--config_file", bundle / "configs" / "inference.yaml"]
    jobs = [
        [mgipt, "demo", "--count", "1", "--folder", "demo"],
        [mgipt, "predict", photographs, "masks", "--config", "guard", *small],
        [mgipt, "predict", "volumes", "segmented", "--weights", "volumes.pt", "--config", "volumes.yaml"],
        [*monai, "--bundle_root", bundle, "--dataset_dir", photographs, "--output_dir", "same", *small],
    ]
    with ThreadPoolExecutor(2) as pool:
        printed, *_ = pool.map(lambda job: run(job, work), jobs)

    assert "warm_vignetted" in printed
    assert (work / "demo" / "demo.png").stat().st_size > 50_000
    assert Image.open(work / "masks" / "eye_000.png").size == (64, 64)
    assert "decision" in RecordFile(work / "masks" / "records.jsonl").read()[0]
    assert nib.load(work / "segmented" / "b.nii.gz").shape[:3] == (20, 18, 16)
    assert len(RecordFile(work / "same" / "records.jsonl").read()) == 2
    # nothing is written into the package
    assert {
        path.relative_to(bundle.parent).as_posix()
        for f in FILES
        for path in (bundle.parent / f).rglob("*")
        if path.is_file()
    } == expected()
