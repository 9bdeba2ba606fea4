# SPDX-License-Identifier: Apache-2.0
"""The bundle as the model zoo would get it: its files, keys, metadata, exports, and the unit tests beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ckpt_export

from mgipt_monai.installed import copy_folder
from tests.bundle.conftest import BUNDLE, ONE_THREAD, ROOT

NAME = "fundus_disc_cup_segmentation"
UNIT_TESTS = Path(__file__).parent / "submission" / f"test_{NAME}.py"
LARGEST = 25_000_000
"""In bytes: larger files are to be listed in large_files.yml with their address."""
SECTIONS = (
    *("Authors", "Tags", "Model Description", "Data", "Preprocessing", "Performance", "MONAI Bundle Commands"),
    *("System Configuration", "Limitations", "Citation Info", "References"),
)


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle's folder in a copy of the zoo's layout."""
    folder = tmp_path_factory.mktemp("zoo") / "models" / NAME
    folder.parent.mkdir()
    copy_folder(BUNDLE, folder)
    return folder


def test_necessary_files_are_there_and_none_is_too_large(submitted: Path) -> None:
    for name in ("LICENSE", "configs/metadata.json", "configs/inference.yaml", "models/model.pt", "docs/README.md"):
        assert (submitted / name).is_file(), name
    assert max(path.stat().st_size for path in submitted.rglob("*") if path.is_file()) <= LARGEST
    assert not list(submitted.glob("large_files.*"))  # nothing to list
    assert not list(submitted.rglob("*.py"))  # which the zoo's style checks would look at


def test_data_have_a_licence(submitted: Path) -> None:
    text = (submitted / "docs" / "data_license.txt").read_text()
    assert "Apache License" in text
    source = json.loads((submitted / "configs" / "metadata.json").read_text())["data_source"]
    assert re.search(r"mgipt_monai[\w.]+", source)[0] in text


def test_metadata_name_the_version_its_changes_and_packages_that_exist(submitted: Path) -> None:
    metadata = json.loads((submitted / "configs" / "metadata.json").read_text())
    assert metadata["schema"].endswith("/meta_schema_20240725.json")
    assert next(iter(metadata["changelog"])) == metadata["version"]
    assert all(metadata["changelog"].values())
    assert {"name", "intended_use", "data_type", "copyright", "references"} <= metadata.keys()
    packages = {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"]}
    for package in {**packages, **metadata["required_packages_version"]}:
        assert version(package)
    # the schema of 2024 has them under this name, older ones as optional_packages_version
    assert "optional_packages_version" not in metadata


def test_configs_have_the_zoos_keys_and_nobodys_folders(submitted: Path) -> None:
    inference, train = (
        yaml.safe_load((submitted / "configs" / f"{name}.yaml").read_text()) for name in ("inference", "train")
    )
    assert {"bundle_root", "device", "network_def", "inferer", "output_dir", "dataset_dir"} <= inference.keys()
    assert {"trainer", "dataset", "preprocessing", "inferer", "handlers"} <= train["train"].keys()
    assert {"evaluator", "handlers", "dataset", "postprocessing", "key_metric"} <= train["validate"].keys()
    assert "val_interval" in train
    for path in (submitted / "configs").iterdir():
        assert not re.search(r"/(home|root|Users|tmp|mnt)/", path.read_text()), path


def test_readme_has_the_sections_of_the_template(submitted: Path) -> None:
    headings = re.findall(r"^#+ +\**([^*\n]+)\**$", (submitted / "docs" / "README.md").read_text(), flags=re.MULTILINE)
    assert [name for name in headings if name in SECTIONS] == list(SECTIONS)


def test_weights_export_to_torchscript(submitted: Path, tmp_path: Path) -> None:
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(submitted / "models" / "model.pt"),
        meta_file=str(submitted / "configs" / "metadata.json"),
        config_file=str(submitted / "configs" / "inference.yaml"),
        bundle_root=str(submitted),
    )
    assert torch.jit.load(tmp_path / "model.ts")(torch.rand(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def test_unit_tests_beside_it_pass(submitted: Path) -> None:
    zoo = submitted.parents[1]
    (zoo / "ci" / "unit_tests").mkdir(parents=True)
    copied = shutil.copy(UNIT_TESTS, zoo / "ci" / "unit_tests")
    environment = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "unittest", str(Path(copied).relative_to(zoo))]
    done = subprocess.run(command, cwd=zoo, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    assert "Ran 3 tests" in done.stderr
    assert (submitted / "models" / "model.pt").read_bytes() == (BUNDLE / "models" / "model.pt").read_bytes()
