# SPDX-License-Identifier: Apache-2.0
"""A benchmark through its Python interface, on photographs of 64 px."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from monai.bundle import ConfigWorkflow

import mgipt_monai
from mgipt_monai import Benchmark
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from tests.bundle.conftest import BUNDLE, CONFIGS

SCHEMA = Path(__file__).parents[2] / "docs" / "reference" / "results.schema.json"
FILES = ("results.json", "timing.json", "images.csv", "report.html")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    write_demo_stream(folder, [CAMERAS["warm_vignetted"], CAMERAS["cold_noisy"]], count=2, size=64)
    return folder


def benchmark(sites: Path, output: Path, **settings: Any) -> Benchmark:
    """Build the bundle's benchmark of three methods, as ``python -m monai.bundle run`` does."""
    flow = ConfigWorkflow(
        config_file=[str(CONFIGS / f"{name}.yaml") for name in ("inference", "evaluate", "benchmark")],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(sites),
        output_dir=str(output),
        **{"compare": ["source", "vptta", "mgipt"], "spatial_size": [64, 64], "instance_prompt#steps": 1, **settings},
    )
    flow.initialize()
    return flow.parser.get_parsed_content("benchmark")


@pytest.fixture(scope="module")
def finished(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    benchmark(sites, folder, rounds=2).run()
    return folder


def test_everything_is_written_and_fits_the_schema(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    assert list(results["methods"]) == ["source", "vptta", "mgipt"]
    assert results["baseline"] == "source"
    assert results["stream"] == {
        "images": 8,
        "measured": 8,
        "measured_images": 4,
        "rounds": 2,
        "sites": ["cold_noisy", "warm_vignetted"],
        "failed": [],
    }
    assert results["metrics"]["hd95"]["unit"] == results["metrics"]["asd"]["unit"] == "pixels"
    assert results["about"]["network"] == "UNet, 408,485 parameters"
    assert results["about"]["weights"].endswith("model.pt")
    assert results["methods"]["source"]["about"].startswith("The unadapted source network")
    assert set(results["metrics"]) == {"dsc", "hd95", "asd", "e_max", "s"}
    assert results["settings"]["methods"]["mgipt"]["instance_prompt"]["steps"] == 1
    assert list(results["methods"]["mgipt"]["prompts"]) == ["3 x 3", "5 x 5", "7 x 7"]
    assert all((finished / name).stat().st_size for name in FILES)
    timing = json.loads((finished / "timing.json").read_text())
    assert timing["methods"]["mgipt"]["seconds"]["median"] > 0
    page = (finished / "report.html").read_text()
    assert all(name in page for name in ("source", "vptta", "mgipt", "cold_noisy"))


def test_source_is_the_same_in_every_round_and_the_others_are_not(finished: Path) -> None:
    methods = json.loads((finished / "results.json").read_text())["methods"]
    first, second = methods["source"]["metrics"]["dsc"]["rounds"]
    assert first == second
    assert methods["source"]["metrics"]["dsc"]["degradation"] == 0
    assert len(set(methods["mgipt"]["metrics"]["dsc"]["rounds"])) == 2


def test_each_method_starts_at_the_streams_start(finished: Path, sites: Path, tmp_path: Path) -> None:
    alone = benchmark(sites, tmp_path, rounds=2, compare=["mgipt"]).run()
    together = json.loads((finished / "results.json").read_text())["methods"]["mgipt"]
    assert alone["baseline"] is None
    assert alone["methods"]["mgipt"]["metrics"]["dsc"] == together["metrics"]["dsc"]
    assert alone["methods"]["mgipt"]["against_baseline"] is None


@pytest.mark.parametrize("stop_after", [0, 3, 8, 11, 23])
def test_interrupted_and_resumed_gives_the_same_results(
    finished: Path, sites: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    loaded = mgipt_monai.data.StreamDataset._transform

    def interrupted(dataset: Any, index: int) -> Any:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(index)
        return loaded(dataset, index)

    monkeypatch.setattr(mgipt_monai.data.StreamDataset, "_transform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(sites, tmp_path, rounds=2).run()
    assert not (tmp_path / "results.json").exists()
    monkeypatch.undo()
    continued = []
    monkeypatch.setattr(
        mgipt_monai.data.StreamDataset,
        "_transform",
        lambda dataset, index: continued.append(index) or loaded(dataset, index),
    )
    benchmark(sites, tmp_path, rounds=2).run()
    assert (tmp_path / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    # no image is done twice
    assert len(continued) == 24 - stop_after


def test_a_failed_image_counts_for_no_method(sites: Path, tmp_path: Path) -> None:
    broken = tmp_path / "sites"
    write_demo_stream(broken, [CAMERAS["warm_vignetted"]], count=3, size=64)
    (broken / "warm_vignetted" / "images" / "eye_001.png").write_bytes(b"no image")
    results = benchmark(broken, tmp_path / "results", compare=["source", "mgipt"]).run()
    assert results["stream"]["measured"] == 2
    assert [(f["name"], f["method"]) for f in results["stream"]["failed"]] == [
        ("warm_vignetted/eye_001", "source"),
        ("warm_vignetted/eye_001", "mgipt"),
    ]
    assert all(m["metrics"]["dsc"]["images"] == 2 for m in results["methods"].values())


def test_other_settings_are_not_mixed_in(finished: Path, sites: Path) -> None:
    before = (finished / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"run of source with other settings \(seed\).*another output_dir"):
        benchmark(sites, finished, rounds=2, seed=1).run()
    with pytest.raises(ValueError, match=r"run of mgipt with other settings \(method\)"):
        benchmark(sites, finished, rounds=2, **{"method#source_weight": 0.5}).run()
    assert (finished / "results.json").read_bytes() == before


def test_unknown_methods_are_refused() -> None:
    method = mgipt_monai.Source(torch.nn.Conv2d(3, 1, 1))
    with pytest.raises(ValueError, match="no method other: choose from source, mine"):
        Benchmark(partial(dict), {"source": method, "mine": method}, "results", compare=["source", "other"])
    with pytest.raises(ValueError, match="methods is empty"):
        Benchmark(partial(dict), {}, "results")


def test_a_stream_without_rounds_or_order_is_reported_too(sites: Path, tmp_path: Path) -> None:
    # as from Python: images as they are found, no settings given
    from_config = benchmark(sites, tmp_path, compare=["source"], limit=1)
    data = from_config.evaluator().data_loader.dataset.data
    plain = [{key: value for key, value in item.items() if key != "round"} for item in data]

    def evaluator(**changed: Any) -> Any:
        made = from_config.evaluator(**changed)
        made.data_loader.dataset.data = plain
        return made

    methods = {"source": from_config.methods["source"]}
    Benchmark(evaluator, methods, tmp_path / "plain").run()
    assert "sites" in (tmp_path / "plain" / "report.html").read_text()
