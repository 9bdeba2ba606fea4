# SPDX-License-Identifier: Apache-2.0
"""A network without batch norm in the bundle: calibrate once over source images, then adapt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import UNet
from PIL import Image

from mgipt_monai import RecordFile, SourceStatistics, measure_source_statistics
from tests.bundle.conftest import BUNDLE, CONFIGS, QUICK, run_bundle
from tests.conftest import stream

INFERENCE, MEASURE = CONFIGS / "inference.yaml", CONFIGS / "source_statistics.yaml"
NETWORK = {"network_def#norm": "instance", "network_def#channels": "[4,8,16,16,16]"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = UNet(2, 3, 2, (4, 8, 16, 16, 16), (2, 2, 2, 2), num_res_units=2, norm="instance")
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    torch.save(network.state_dict(), path)
    return path


def test_calibrated_network_without_batch_norm_is_adapted(tmp_path: Path, weights: Path, demo_sites: Path) -> None:
    settings = {"ckpt_path": weights, "statistics_path": tmp_path / "statistics.pt", **NETWORK}
    source = demo_sites / "cold_noisy" / "images"
    done = run_bundle([INFERENCE, MEASURE], dataset_dir=source, spatial_size="[64,64]", **settings)
    assert "3/3" in done.stderr  # the progress bar
    assert "17 layers from 3 source images written to" in done.stdout
    statistics = SourceStatistics.load(tmp_path / "statistics.pt")
    assert (statistics.images, len(statistics.layers)) == (3, 17)

    sites = {"dataset_dir": demo_sites, "sites": "['warm_vignetted']", "limit": 2}
    run_bundle([INFERENCE], output_dir=tmp_path / "mgipt", **sites, **settings, **QUICK)
    rows = RecordFile(tmp_path / "mgipt" / "records.jsonl").read()
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert all(row["loss_before"] > 0 for row in rows)
    overlay = "configs/methods/vptta.yaml"
    run_bundle([INFERENCE, overlay], output_dir=tmp_path / "vptta", spatial_size="[64,64]", **sites, **settings)
    assert [row["memory"] for row in RecordFile(tmp_path / "vptta" / "records.jsonl").read()] == [1, 2]


def test_the_preset_steady_corrects_the_look_of_the_site(tmp_path: Path, weights: Path, demo_sites: Path) -> None:
    network = UNet(2, 3, 2, (4, 8, 16, 16, 16), (2, 2, 2, 2), num_res_units=2, norm="instance")
    network.load_state_dict(torch.load(weights, weights_only=True))
    path = tmp_path / "statistics.pt"
    measure_source_statistics(network, stream(12, size=64)).save(path)
    run_bundle(
        [INFERENCE, CONFIGS.parents[1] / "configs" / "presets" / "steady.yaml"], output_dir=tmp_path / "steady",
        dataset_dir=demo_sites, sites="['warm_vignetted']", limit=2, spatial_size="[64,64]", ckpt_path=weights,
        statistics_path=path, **NETWORK,
    )  # fmt: skip
    rows = RecordFile(tmp_path / "steady" / "records.jsonl").read()
    assert [(row["status"], row["forwards"]) for row in rows] == [("ok", 2), ("ok", 2)]
    assert all(0 < row["adapted_weight"] == row["evidence"] / 2 < 0.5 for row in rows)


def test_without_a_file_the_error_says_how_to_make_one(tmp_path: Path, weights: Path, demo_sites: Path) -> None:
    done = run_bundle(
        [INFERENCE], check=False, dataset_dir=demo_sites, output_dir=tmp_path, ckpt_path=weights, **NETWORK, **QUICK
    )
    assert done.returncode != 0
    assert "found 17 x InstanceNorm2d" in done.stderr
    assert "mgipt source-statistics SOURCE_IMAGES" in done.stderr


def test_bad_source_image_ends_the_calibration_and_is_named(tmp_path: Path, weights: Path, demo_sites: Path) -> None:
    source = Path(shutil.copytree(demo_sites / "cold_noisy" / "images", tmp_path / "source"))
    Image.new("RGB", (64, 64)).save(source / "eye_001.png")
    path = tmp_path / "statistics.pt"
    done = run_bundle(
        [INFERENCE, MEASURE], check=False, dataset_dir=source, ckpt_path=weights, statistics_path=path, **NETWORK
    )
    assert done.returncode != 0
    assert "eye_001.png: the image is constant" in done.stderr
    assert not path.exists()


def test_file_is_written_into_the_bundle_unless_told_and_none_is_read() -> None:
    parser = ConfigParser()
    parser.read_config([str(INFERENCE), str(MEASURE)])
    parser["bundle_root"] = str(BUNDLE)
    assert parser.get_parsed_content("statistics_path") == f"{BUNDLE}/models/source_statistics.pt"
    parser.read_config(str(INFERENCE))
    assert parser.get_parsed_content("statistics_path") is None
