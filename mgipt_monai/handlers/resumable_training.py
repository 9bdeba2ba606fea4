# SPDX-License-Identifier: Apache-2.0
"""Resumable training: the state is saved after each epoch, and each epoch has its own seed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from monai.data.utils import set_rnd
from monai.engines import Trainer

from mgipt_monai.handlers.evaluators import wrap_run
from mgipt_monai.stream.signals import stopping_cleanly
from mgipt_monai.utils.files import load_state, save_state

__all__ = ["ResumableTrainingHandler"]

logger = logging.getLogger(__name__)


class ResumableTrainingHandler:
    """Saves the training state after each epoch, so that an interrupted training can be resumed.

    Before each epoch, torch's random numbers and the transforms of the trainer's dataset are seeded with (seed, epoch).
    On a CPU, a resumed training therefore gives bit-identical weights to an uninterrupted one.

    Attach it last, so that it saves the results of the epoch's other handlers (learning rate, validation). The file is
    replaced atomically, so a killed training leaves a readable file. SIGTERM and SIGHUP end it as Ctrl-C does.

    Args:
        path: the state file; it has the size of the network and the optimiser's state.
        states: name to object with ``state_dict`` and ``load_state_dict``: network, optimiser, scheduler. The trainer
            itself is added.
        resume: continue after the last epoch in ``path``; if there is no such file, start at the beginning.
        seed: base seed of all epochs.

    Raises:
        ValueError: when the training starts, if ``path`` cannot be read, or holds more epochs than the trainer's
            ``max_epochs``.
    """

    def __init__(self, path: str | os.PathLike, states: Mapping[str, Any], resume: bool = False, seed: int = 0) -> None:
        self.path, self.states, self.resume, self.seed = Path(path), dict(states), resume, seed

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        self.states["trainer"] = engine
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._seed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)
        wrap_run(engine, stopping_cleanly)

    def _start(self, engine: Trainer) -> None:
        if not self.resume or not self.path.is_file():
            return
        wanted = engine.state.max_epochs
        Checkpoint.load_objects(self.states, load_state(self.path, "training state"))
        if wanted is not None and engine.state.epoch > wanted:
            raise ValueError(f"{self.path} holds {engine.state.epoch} epochs, more than max_epochs={wanted}: raise it")
        engine.state.max_epochs = wanted  # allows extending a finished training
        logger.info("resuming the training after epoch %d of %d", engine.state.epoch, wanted)

    def _seed(self, engine: Trainer) -> None:
        torch_seed, transform_seed = np.random.SeedSequence((self.seed, engine.state.epoch)).generate_state(2)
        torch.manual_seed(int(torch_seed))
        set_rnd(getattr(engine.data_loader, "dataset", None), int(transform_seed))

    def _save(self) -> None:
        save_state({name: state.state_dict() for name, state in self.states.items()}, self.path)
