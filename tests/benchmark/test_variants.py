# SPDX-License-Identifier: Apache-2.0
"""Overlays as rows of a benchmark: each ablation changes what it says, and nothing else."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from mgipt_monai import MGIPT
from mgipt_monai.benchmark import overlaid_method
from mgipt_monai.networks import ConfidenceEnsemble, MeanEnsemble
from tests.bundle.conftest import CONFIGS, ROOT
from tests.conftest import stream, tiny_network

ABLATIONS = {path.stem: path for path in sorted((ROOT / "configs" / "ablations").glob("*.yaml"))}


def config() -> ConfigParser:
    parser = ConfigParser(ConfigParser.load_config_files(str(CONFIGS / "inference.yaml")))
    parser["instance_prompt#steps"] = 2
    return parser


def ablated(name: str, network: nn.Module) -> MGIPT:
    return overlaid_method(config(), ABLATIONS[name], network)()


def changes(one: dict, other: dict, place: str = "") -> dict[str, object]:
    """What differs between two nested settings: the other's value by its place."""
    found = {}
    for key in {**one, **other}:
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= changes(a, b, f"{place}{key}#")
        elif a != b:
            found[f"{place}{key}"] = b
    return found


# sizes that are empty are not listed among a method's settings
CLAIMS = {
    "aip_only": {"global_prompts#sizes": None},
    "fixed_size_1": {"instance_prompt#sizes": [1]},
    "fixed_size_3": {"instance_prompt#sizes": [3]},
    "fixed_size_5": {"instance_prompt#sizes": [5]},
    "mgp_only": {"instance_prompt#sizes": None},
    "no_calibration": {"source_weight": 0.0},
    "no_early_stop": {"instance_prompt#early_stop": False},
    "no_ema": {"global_prompts#teacher_decay": 0.0},
    "plain_mean": {f"ensemble#{key}": None for key in ("instance_factor", "global_factor", "one_channel")},
    "single_scale": {"global_prompts#sizes": [5]},
}


def test_every_ablation_is_tested() -> None:
    assert list(ABLATIONS) == list(CLAIMS)


@pytest.mark.parametrize("name", CLAIMS)
def test_an_ablation_changes_what_it_says_alone(name: str, network: nn.Module) -> None:
    whole, part = MGIPT(network, steps=2), ablated(name, network)
    assert part.network is network
    assert changes(whole.settings(), part.settings()) == CLAIMS[name]


def run(method: MGIPT, count: int = 3) -> tuple[list[Tensor], list[dict]]:
    images = stream(count)
    outputs, records = [], []
    for image in images:
        outputs.append(method(image))
        records += method.last
    return outputs, records


def test_aip_only_has_no_global_prompts_and_forgets_each_image(network: nn.Module) -> None:
    method = ablated("aip_only", network)
    outputs, records = run(method)
    assert method.prompt_maps() == {}
    assert all(record["global_losses"] == [] for record in records)
    # an image's prediction does not depend on those before it, but for the jitter's seed
    method.reset()
    assert torch.equal(method(stream(3)[0]), outputs[0])


def test_mgp_only_tunes_no_instance_prompt(network: nn.Module) -> None:
    method = ablated("mgp_only", network)
    _, records = run(method)
    assert method.instance_prompt.amplitude is None
    assert all((r["instance_size"], r["forwards"], r["backwards"]) == (0, 3 + 3, 3) for r in records)


@pytest.mark.parametrize("side", [1, 3, 5])
def test_a_fixed_size_is_taken_for_every_image_without_a_check(side: int, network: nn.Module) -> None:
    _, records = run(ablated(f"fixed_size_{side}", network))
    assert all(record["instance_size"] == side and record["consistency"] == {} for record in records)


def test_without_early_stop_the_largest_size_is_always_reached(network: nn.Module) -> None:
    _, records = run(ablated("no_early_stop", network))
    assert all(record["instance_size"] == 5 and record["consistency"] == {} for record in records)


def test_without_ema_the_teachers_are_the_students(network: nn.Module) -> None:
    method = ablated("no_ema", network)
    run(method)
    prompts = method.global_prompts
    assert all(torch.equal(one, other) for one, other in zip(prompts.students, prompts.teachers, strict=True))


def test_without_calibration_predictions_do_not_see_the_stored_statistics() -> None:
    network = tiny_network()
    method = ablated("no_calibration", network)
    view = stream(1)[0]
    before = method.norms.predict(view, "calibrated")
    assert torch.equal(before, method.norms.predict(view, "instance"))


def test_plain_mean_weighs_all_alike() -> None:
    logits = torch.randn(4, 2, 8, 8)
    torch.testing.assert_close(MeanEnsemble()(logits), logits.mean(0, keepdim=True))
    assert not torch.allclose(ConfidenceEnsemble(1.0, 1.0)(logits), logits.mean(0, keepdim=True))


def test_an_overlay_leaves_the_config_as_it_was(network: nn.Module) -> None:
    parser = config()
    before = str(parser.get())
    overlaid_method(parser, ABLATIONS["aip_only"], network)()
    assert str(parser.get()) == before
