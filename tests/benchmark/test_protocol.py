# SPDX-License-Identifier: Apache-2.0
"""The protocol command: both published protocols on miniature sites, and its errors if something is missing."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from torch import nn

from mgipt_monai import MGIPT, VPTTA
from mgipt_monai.benchmark.protocol import run_protocol
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from mgipt_monai.networks import PraNet, ResUNet
from tests.bundle.conftest import BUNDLE, CONFIGS, ROOT
from tests.conftest import without_times
from tests.module_runs import run_module

PROTOCOLS = {name: ROOT / "configs" / "protocols" / f"{name}.yaml" for name in ("odoc", "polyp")}
NETWORKS = {"odoc": ResUNet, "polyp": PraNet}
SITES = {name: yaml.safe_load(path.read_text())["sites"] for name, path in PROTOCOLS.items()}


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one site of two photographs of 64 px with masks."""
    folder = tmp_path_factory.mktemp("camera")
    write_demo_stream(folder, [CAMERAS["cold_noisy"]], count=2, size=64)
    return folder / "cold_noisy"


def write_sites(folder: Path, camera: Path, names: list[str]) -> Path:
    for name in names:
        shutil.copytree(camera, folder / name)
    return folder


def write_checkpoints(folder: Path, names: list[str], network: nn.Module) -> Path:
    folder.mkdir()
    for name in names:
        torch.save(network.state_dict(), folder / f"{name}.pt")
    return folder


def command(*arguments: object, **settings: object) -> subprocess.CompletedProcess:
    overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return run_module(
        "mgipt_monai.benchmark.protocol", [*map(str, arguments), "--bundle_root", str(BUNDLE), *overrides]
    )


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_published_protocol_runs_on_miniature_sites(name: str, camera: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sites = write_sites(tmp_path / "sites", camera, SITES[name])
    checkpoints = write_checkpoints(tmp_path / "checkpoints", SITES[name][:1], NETWORKS[name]())
    done = command(
        PROTOCOLS[name],
        dataset_dir=sites,
        checkpoints=checkpoints,
        output_dir=tmp_path / "out",
        sources=f"['{SITES[name][0]}']",
        compare="['source','mgipt']",
        limit=1,
        spatial_size="[64,64]",
        **{"instance_prompt#steps": 1},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"| method | {SITES[name][0]} | mean | published |" in done.stdout
    rows = without_times(tmp_path / "out" / SITES[name][0] / "mgipt" / "records.jsonl")
    assert [(row["site"], row["status"]) for row in rows] == [(site, "ok") for site in SITES[name][1:]]
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    metrics = {"odoc": ["dsc"], "polyp": ["dsc", "e_max", "s"]}[name]
    assert [(row["metric"], row["method"]) for row in table] == [(m, r) for m in metrics for r in ("source", "mgipt")]
    assert all(0 <= float(row["mean"]) <= 100 for row in table)


def small(tmp_path: Path, camera: Path, **settings: Any) -> dict[str, Any]:
    """Return settings of a protocol over two sites with the bundle's network and random weights."""
    parser = ConfigParser(ConfigParser.load_config_files(str(CONFIGS / "inference.yaml")))
    network = parser.get_parsed_content("network_def")
    return {
        "dataset_dir": write_sites(tmp_path / "sites", camera, ["b", "a"]),
        "checkpoints": write_checkpoints(tmp_path / "checkpoints", ["a", "b"], network),
        "output_dir": tmp_path / "out",
        "bundle_root": BUNDLE,
        "compare": ["source", "mgipt"],
        "spatial_size": [64, 64],
        "instance_prompt#steps": 1,
        **settings,
    }


def test_each_site_is_the_source_once_and_a_finished_run_is_not_run_again(camera: Path, tmp_path: Path) -> None:
    settings = small(tmp_path, camera, sites=["b", "a"], variants=str(ROOT / "configs" / "ablations" / "aip_*.yaml"))
    table = run_protocol(**settings)
    assert "| method | b | a | mean |" in table
    out = settings["output_dir"]
    for source, other in ("ab", "ba"):
        results = json.loads((out / source / "results.json").read_text())
        assert results["stream"]["sites"] == [other]
        assert list(results["methods"]) == ["source", "mgipt", "aip_only"]
        assert list(results["methods"]["aip_only"]["prompts"]) == []
        assert results["settings"]["methods"]["aip_only"]["instance_prompt"]["steps"] == 1
    written = {path: path.read_bytes() for path in out.rglob("records.jsonl")}
    assert len(written) == 6
    assert run_protocol(**settings) == table
    assert {path: path.read_bytes() for path in out.rglob("records.jsonl")} == written
    # rows of an earlier run that are not run again are not in the table
    assert "aip_only" not in run_protocol(**{**settings, "variants": (), "sources": ["a"]})


def test_checkpoints_may_be_a_pattern_and_all_sites_are_taken_by_default(camera: Path, tmp_path: Path) -> None:
    settings = small(tmp_path, camera, compare=["source"], limit=2)
    for site in "ab":
        (tmp_path / "trained" / site).mkdir(parents=True)
        (tmp_path / "checkpoints" / f"{site}.pt").rename(tmp_path / "trained" / site / "model.pt")
    table = run_protocol(**{**settings, "checkpoints": str(tmp_path / "trained" / "{site}" / "model.pt")})
    assert "| method | a | b | mean |" in table


def test_all_that_is_missing_is_named_before_anything_runs(camera: Path, tmp_path: Path) -> None:
    sites = write_sites(tmp_path / "sites", camera, ["refuge", "origa"])
    done = command(PROTOCOLS["odoc"], dataset_dir=sites, checkpoints=tmp_path / "none", output_dir=tmp_path / "out")
    assert done.returncode
    message = done.stderr.splitlines()[-1]
    assert f"no images of rimone_r3, refuge_valid_test, drishti_gs in {sites}" in message
    assert "mgipt published" in message
    assert all(f"{tmp_path / 'none' / site}.pt" in message for site in SITES["odoc"])
    assert "mgipt train" in message
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_say_so(camera: Path, tmp_path: Path) -> None:
    settings = small(tmp_path, camera)
    with pytest.raises(FileNotFoundError, match=r"there is no overlay at none/\*\.yaml"):
        run_protocol(**{**settings, "variants": "none/*.yaml"})
    (tmp_path / "mgipt.yaml").write_text("{}")
    with pytest.raises(ValueError, match=r"two rows would have the same name: .*mgipt.*, mgipt"):
        run_protocol(**{**settings, "variants": [str(tmp_path / "mgipt.yaml")]})
    with pytest.raises(ValueError, match="there is no site but the source a"):
        run_protocol(**{**settings, "sites": ["a"]})
    with pytest.raises(FileNotFoundError, match="no images of c"):
        run_protocol(**{**settings, "sites": ["a", "c"]})


def parsed(*overlays: str) -> ConfigParser:
    files = [CONFIGS / f"{name}.yaml" for name in ("inference", "evaluate", "benchmark")]
    files += [ROOT / "configs" / overlay for overlay in overlays]
    return ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))


def test_odoc_is_in_the_papers_settings() -> None:
    parser = parsed("protocols/odoc.yaml")
    method = parser.get_parsed_content("method")
    assert isinstance(method.network, ResUNet)
    assert method.settings() == MGIPT(method.network, memory=None, offset="none").settings()
    assert len(method.norms.layers) == 41
    assert parser["spatial_size"] == [512, 512]
    rows = parser.get_parsed_content("methods")
    assert rows["released"]().settings() == MGIPT.released(method.network).settings()
    released = parsed("protocols/odoc.yaml", "presets/released.yaml").get_parsed_content("method")
    assert released.settings() == rows["released"]().settings()
    assert list(parser.get_parsed_content("metrics")) == ["dsc"]


def test_polyp_is_in_the_papers_settings() -> None:
    parser = parsed("protocols/polyp.yaml")
    method = parser.get_parsed_content("method")
    network, encoder = method.network, r"^resnet\."
    assert isinstance(network, PraNet)
    settings = {"lr": 0.01, "steps": 6, "aligned_layers": encoder}
    assert (
        method.settings() == MGIPT(network, global_sizes=(1, 3, 5), memory=None, offset="none", **settings).settings()
    )
    assert all(name.startswith("resnet.") for name in method.norms.layers)
    assert parser["spatial_size"] == [352, 352]
    rows = parser.get_parsed_content("methods")
    released = MGIPT.released(network, global_sizes=(1, 2, 3), **settings).settings()
    assert rows["released"]().settings() == released
    overlay = parsed("protocols/polyp.yaml", "protocols/polyp_released.yaml").get_parsed_content("method")
    assert overlay.settings() == released
    assert (
        rows["vptta"]().settings() == VPTTA(network, lr=0.01, side=3, aligned_layers=encoder, offset="none").settings()
    )
    image = {"image": torch.tensor([0.0, 255.0]).view(1, 1, 2).repeat(3, 1, 1)}
    prepared = parser.get_parsed_content("intensity")(image)["image"]
    torch.testing.assert_close(prepared[:, 0, 0], -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))
    torch.testing.assert_close(prepared[:, 0, 1], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))
