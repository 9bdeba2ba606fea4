# SPDX-License-Identifier: Apache-2.0
"""Training from the command line: it can be interrupted, and the published networks are trained as overlays say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.engines.utils import IterationEvents
from torch import nn

from mgipt_monai.networks import PraNet, ResUNet
from tests.bundle.conftest import BUNDLE, ROOT, run_bundle
from tests.conftest import identical, same_state

CONFIG_FILES = ["bundle/configs/inference.yaml", "bundle/configs/train.yaml"]
SMALL = {"spatial_size": "[64,64]", "batch_size": 2, "val_interval": 1}
PROTOCOLS = {"odoc": ResUNet, "polyp": PraNet}


def overlays(protocol: str) -> list[str]:
    return [f"configs/protocols/{protocol}.yaml", f"configs/protocols/train_{protocol}.yaml"]


def workflow(configs: Sequence[str], sites: Path, output: Path, **settings: Any) -> ConfigWorkflow:
    """A training as ``python -m monai.bundle run`` builds it, not run yet."""
    flow = ConfigWorkflow(
        config_file=[str(ROOT / path) for path in configs],
        workflow_type="train",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(sites),
        sites=["cold_noisy"],
        output_dir=str(output),
        device="cpu",
        **settings,
    )
    flow.initialize()
    return flow


class KilledError(Exception):
    """What ends a training in the middle of an epoch."""


def test_a_training_that_was_killed_ends_with_the_weights_of_one_that_was_not(tmp_path: Path, demo_sites: Path) -> None:
    settings = {"spatial_size": [64, 64], "batch_size": 1, "max_epochs": 4, "val_interval": 1}
    settings |= {"network_def#channels": [4, 8, 16, 16, 16], "cache_rate": 0.0}
    workflow(CONFIG_FILES, demo_sites, tmp_path / "whole", **settings).run()

    def kill(trainer: Engine) -> None:
        raise KilledError

    flow = workflow(CONFIG_FILES, demo_sites, tmp_path / "parts", **settings)
    trainer = flow.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2 * 2 + 1), kill)
    with pytest.raises(RuntimeError, match="run"):
        flow.run()
    flow = workflow(CONFIG_FILES, demo_sites, tmp_path / "parts", resume=True, **settings)
    epochs = []
    trainer = flow.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda trainer: epochs.append(trainer.state.epoch))
    flow.run()

    assert epochs == [3, 4]
    whole, parts = (torch.load(tmp_path / run / "training.pt", weights_only=True) for run in ("whole", "parts"))
    assert same_state(whole, parts)
    whole, parts = (torch.load(tmp_path / run / "model.pt", weights_only=True) for run in ("whole", "parts"))
    assert identical(whole, parts)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_published_networks_train_and_their_encoders_start_from_a_file(
    protocol: str, tmp_path: Path, demo_sites: Path
) -> None:
    network = PROTOCOLS[protocol]()
    encoder = {"odoc": "res", "polyp": "resnet"}[protocol]
    torch.save(getattr(network, encoder).state_dict(), tmp_path / "encoder.pt")
    run_bundle(
        [*CONFIG_FILES, *overlays(protocol)],
        dataset_dir=demo_sites,
        sites="['cold_noisy']",
        output_dir=tmp_path / "out",
        encoder_path=tmp_path / "encoder.pt",
        max_epochs=1,
        lr=1e-12,  # so that the weights stay where they started
        **SMALL,
    )
    weights = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert weights.keys() == network.state_dict().keys()
    for name, start in getattr(network, encoder).named_parameters():
        torch.testing.assert_close(weights[f"{encoder}.{name}"], start, atol=1e-6, rtol=0)


def test_odoc_recipe(tmp_path: Path, demo_sites: Path) -> None:
    configs = [*CONFIG_FILES, *overlays("odoc")]
    flow = workflow(configs, demo_sites, tmp_path, cache_rate=0.0, network_def=nn.Conv2d(3, 2, 1))
    train = {name: flow.parser.get_parsed_content(f"train#{name}") for name in ("trainer", "optimizer", "scheduler")}
    assert train["trainer"].state.max_epochs == 200
    group = train["optimizer"].param_groups[0]
    assert (type(train["optimizer"]).__name__, group["lr"]) == ("SGD", 0.001)
    assert (group["momentum"], group["nesterov"]) == (0.99, True)
    for _ in range(100):
        train["optimizer"].step()
        train["scheduler"].step()
    assert group["lr"] == pytest.approx(0.001 * 0.5**0.9)


def test_polyp_recipe_adds_up_four_losses_and_limits_gradients(tmp_path: Path, demo_sites: Path) -> None:
    network = nn.Conv2d(3, 1, 1)
    flow = workflow([*CONFIG_FILES, *overlays("polyp")], demo_sites, tmp_path, cache_rate=0.0, network_def=network)
    trainer, optimizer = (flow.parser.get_parsed_content(f"train#{name}") for name in ("trainer", "optimizer"))
    assert (trainer.state.max_epochs, type(optimizer).__name__) == (20, "Adam")
    assert optimizer.param_groups[0]["lr"] == 0.0001
    logits, mask = torch.randn(2, 1, 64, 64), torch.ones(2, 1, 64, 64)
    one = trainer.loss_function.loss(logits, mask)
    torch.testing.assert_close(trainer.loss_function([logits] * 4, mask), 4 * one)
    network.weight.grad, network.bias.grad = torch.full_like(network.weight, -3.0), torch.full_like(network.bias, 0.2)
    trainer.fire_event(IterationEvents.BACKWARD_COMPLETED)
    assert network.weight.grad.unique().tolist() == [-0.5]
    assert network.bias.grad.item() == pytest.approx(0.2)
