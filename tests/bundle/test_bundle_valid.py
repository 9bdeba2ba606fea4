# SPDX-License-Identifier: Apache-2.0
"""The bundle is what MONAI calls a valid, self-contained bundle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out

import mgipt_monai
from mgipt_monai import (
    MGIPT,
    AdaptationMethod,
    AdaptiveInferer,
    StreamingAdaptationEvaluator,
    TestTimeAdaptationHandler,
)
from tests.bundle.conftest import BUNDLE, CONFIGS, ROOT

PARTS = ("instance_prompt", "global_prompts", "ensemble", "jitter")
SCHEMA = Path(__file__).parents[1] / "golden" / "metadata_schema.json"


def workflow(tmp_path: Path, dataset_dir: Path, **settings) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=str(CONFIGS / "inference.yaml"),
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=str(CONFIGS / "logging.conf"),
        workflow_type="infer",
        bundle_root=str(BUNDLE),
        dataset_dir=str(dataset_dir),
        output_dir=str(tmp_path),
        **settings,
    )


def settings_of(method: MGIPT) -> dict:
    """Every plain setting of a method and its parts."""
    plain = (int, float, str, bool, tuple, type(None))
    parts = {"method": method, **{part: getattr(method, part) for part in PARTS}}
    return {
        (part, key): value
        for part, owner in parts.items()
        for key, value in vars(owner).items()
        if isinstance(value, plain) and not key.startswith("_") and key != "side_by_side"
    }


def test_check_properties_passes_and_the_entries_are_what_they_say(tmp_path: Path, demo_sites: Path) -> None:
    flow = workflow(tmp_path, demo_sites)
    flow.initialize()
    assert not flow.check_properties()
    assert isinstance(flow.evaluator, StreamingAdaptationEvaluator)
    assert isinstance(flow.inferer, AdaptiveInferer)
    assert isinstance(flow.parser.get_parsed_content("method"), MGIPT)
    assert isinstance(flow.handlers[0], TestTimeAdaptationHandler)
    assert flow.inferer.method.network is flow.evaluator.network
    for part in PARTS:
        assert flow.parser.get_parsed_content(part) is getattr(flow.inferer.method, part)


def test_config_defaults_are_the_methods_defaults(tmp_path: Path, demo_sites: Path) -> None:
    flow = workflow(tmp_path, demo_sites)
    flow.initialize()
    assert settings_of(flow.inferer.method) == settings_of(MGIPT(flow.network_def))


def test_metadata_passes_the_schema() -> None:
    # the schema file is at hand, so nothing is downloaded
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(SCHEMA))


def test_metadata_is_of_this_version() -> None:
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    assert metadata["version"] == mgipt_monai.__version__
    assert metadata["version"] in metadata["changelog"]
    assert metadata["required_packages_version"]["mgipt_monai"] == mgipt_monai.__version__


def test_network_takes_and_gives_what_the_metadata_says() -> None:
    verify_net_in_out(
        net_id="network_def",
        config_file=str(CONFIGS / "inference.yaml"),
        meta_file=str(CONFIGS / "metadata.json"),
        bundle_root=str(BUNDLE),
        device="cpu",
        n=4,
    )


def test_it_is_self_contained() -> None:
    for name in ("LICENSE", "configs/metadata.json", "configs/logging.conf", "docs/README.md", "models/model.pt"):
        assert (BUNDLE / name).is_file(), name
    # MONAI Label loads the .pt of the shortest name in models/, so there is one alone
    assert [path.name for path in (BUNDLE / "models").glob("*.pt")] == ["model.pt"]
    assert (BUNDLE / "models" / "model.pt").stat().st_size < 5e6


def test_shipped_weights_fit_the_network_strictly() -> None:
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.yaml"))
    parser["device"] = "cpu"
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True), strict=True)


# these are laid over other bundles' configs
EXISTING = sorted(ROOT.glob("configs/existing_*.yaml"))
# train.yaml is left out, it brings a trainer and so most of its keys with it
OVERLAYS = {
    *ROOT.glob("configs/**/*.yaml"),
    *(CONFIGS / f"{name}.yaml" for name in ("evaluate", "source_statistics", "suggest", "benchmark", "export")),
    CONFIGS / "interpolation_weights.yaml",
} - {*EXISTING}


@pytest.mark.parametrize("path", sorted(OVERLAYS), ids=lambda path: path.name)
def test_every_overlay_sets_only_keys_that_exist(path: Path) -> None:
    # MONAI takes unknown keys in silence, so that a typing error would have no effect
    known = set(yaml.safe_load((CONFIGS / "inference.yaml").read_text()))
    train = set(yaml.safe_load((CONFIGS / "train.yaml").read_text()))
    own = {
        "evaluate.yaml": {"mask_ranges", "mask_background", "metrics"},
        "source_statistics.yaml": {"statistics"},
        "suggest.yaml": {"k", "suggestions_path", "suggestions"},
        "export.yaml": {"site_dir", "export_path", "export_size", "use_trace", "example"},
        "benchmark.yaml": {"methods", "compare", "benchmark", "probability_metrics"},
        "hippocampus.yaml": {"probability_metrics"},
        "low_frequency_gain.yaml": {"gain"},
        "cameras.yaml": {"severity"},
        "steady.yaml": {"site_statistics"},
        "fundus_odoc.yaml": {"mask_coding"},
        "distributed.yaml": {"share_by", "average_every", "averaging", "finalize"},
        "odoc.yaml": {"published", "probability_metrics"},
        "polyp.yaml": {"published", "methods"},
        "networks.yaml": {"methods", "compare", "probability_metrics"},
        "precedents.yaml": {"methods", "compare", "interpolation_path", "selection_path"},
        "ttn.yaml": {"interpolation_path"},
        "interpolation_weights.yaml": {*train, "interpolation_path", "prior_strength", "select_channels"},
        "train_odoc.yaml": {*train, "encoder_path"},
        "train_polyp.yaml": {*train, "encoder_path", "gradient_limit"},
    }
    allowed = known | own["evaluate.yaml"] | own.get(path.name, set())
    keys = {key.lstrip("+").split("#")[0] for key in yaml.safe_load(path.read_text())}
    assert keys <= allowed


@pytest.mark.parametrize("path", EXISTING, ids=lambda path: path.name)
def test_overlay_for_other_bundles_uses_all_that_it_sets_and_little_of_theirs(path: Path) -> None:
    text = path.read_text()
    used = set(re.findall(r"@(\w+)", re.sub(r"#.*", "", text)))
    for_the_user = {"labelled"}  # what a bundle's dataset is pointed to
    assert used - {"evaluator", "validate", "bundle_root"} == set(yaml.safe_load(text)) - {"+initialize"} - for_the_user


def with_presets(tmp_path: Path, demo_sites: Path, *presets: str) -> AdaptationMethod:
    """The method of the bundle's config with presets over it."""
    flow = ConfigWorkflow(
        config_file=[
            str(CONFIGS / "inference.yaml"),
            *(str(ROOT / f"configs/presets/{name}.yaml") for name in presets),
        ],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(demo_sites),
        output_dir=str(tmp_path),
    )
    flow.initialize()
    return flow.inferer.method


def test_released_overlay_is_the_released_preset(tmp_path: Path, demo_sites: Path) -> None:
    method = with_presets(tmp_path, demo_sites, "released")
    assert settings_of(method) == settings_of(MGIPT.released(method.network))
    assert settings_of(method) != settings_of(MGIPT(method.network))


def test_default_is_the_paper(tmp_path: Path, demo_sites: Path) -> None:
    default = with_presets(tmp_path, demo_sites)
    assert settings_of(default) == settings_of(MGIPT(default.network))


def test_fast_overlay_costs_eight_forwards_and_one_to_compare(tmp_path: Path, demo_sites: Path) -> None:
    method = with_presets(tmp_path, demo_sites, "fast")
    method(torch.rand(1, 3, 64, 64))
    assert method.last[0]["forwards"] + method.last[0]["backwards"] == 9
    method.compare(False)
    method(torch.rand(1, 3, 64, 64))
    assert method.last[0]["forwards"] + method.last[0]["backwards"] == 8


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bundle/configs/calibrate.yaml", "bundle/configs/source_statistics.yaml"),
        ("configs/existing_calibrate.yaml", "configs/existing_source_statistics.yaml"),
    ],
)
def test_config_of_version_0_1_is_the_renamed_one(old: str, new: str) -> None:
    assert (ROOT / old).is_symlink()  # one file in the repository
    assert (ROOT / old).read_text() == (ROOT / new).read_text()
