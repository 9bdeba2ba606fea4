# SPDX-License-Identifier: Apache-2.0
"""The handler that lets a training go on, on a trainer of a few weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, RandGaussianNoised
from torch import nn

from mgipt_monai.handlers import ResumableTrainingHandler
from tests.conftest import identical


def trainer(path: Path, max_epochs: int, workers: int = 0, **settings) -> SupervisedTrainer:
    """Three images in random order, with noise of MONAI's on them, before a network with dropout."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(0.5), nn.Conv2d(2, 1, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    items = [{"image": torch.full((1, 4, 4), float(i)), "label": torch.zeros(1, 4, 4)} for i in range(3)]
    dataset = Dataset(items, Compose([RandGaussianNoised(keys="image", prob=0.5)]))
    return SupervisedTrainer(
        device="cpu",
        max_epochs=max_epochs,
        train_data_loader=DataLoader(dataset, batch_size=1, shuffle=True, num_workers=workers),
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        train_handlers=[ResumableTrainingHandler(path, {"network": network, "optimizer": optimizer}, **settings)],
    )


def noise(engine: SupervisedTrainer) -> Compose:
    return engine.data_loader.dataset.transform


def trained(path: Path, *args, **settings) -> dict[str, torch.Tensor]:
    engine = trainer(path, *args, **settings)
    engine.run()
    return engine.network.state_dict()


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_equals_uninterrupted(workers: int, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole.pt", 3, workers)
    trained(tmp_path / "parts.pt", 1, workers)
    assert identical(whole, trained(tmp_path / "parts.pt", 3, workers, resume=True))


def test_seeds_differ_from_epoch_to_epoch_and_from_seed_to_seed(tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 1):
        engine = trainer(tmp_path / "t.pt", 2, seed=seed)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: drawn.append(noise(engine).R.rand()))
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: drawn.append(torch.rand(1).item()))
        engine.run()
    assert len(set(drawn)) == 8


def test_without_a_file_and_without_resume_a_training_starts_at_the_beginning(tmp_path: Path) -> None:
    first = trained(tmp_path / "t.pt", 2, resume=True)
    assert identical(first, trained(tmp_path / "t.pt", 2))
    # nothing is left to do
    assert identical(first, trained(tmp_path / "t.pt", 2, resume=True))


def test_what_cannot_be_resumed_says_so(tmp_path: Path) -> None:
    trained(tmp_path / "t.pt", 2)
    with pytest.raises(ValueError, match=r"t\.pt holds 2 epochs, more than max_epochs=1: raise it"):
        trained(tmp_path / "t.pt", 1, resume=True)
    (tmp_path / "t.pt").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"t\.pt is not a readable training state"):
        trained(tmp_path / "t.pt", 2, resume=True)
