# SPDX-License-Identifier: Apache-2.0
"""Load the weights of a source network or of its encoder, with clear errors if they do not fit."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.handlers import DiskSaver
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from mgipt_monai.utils.files import atomic_path, check_zip

__all__ = ["WeightsSaver", "load_encoder_weights", "load_source_weights"]

logger = logging.getLogger(__name__)

FINGERPRINT = ".sha256"
"""Ending of the file with a weights file's fingerprint, as ``sha256sum`` writes it."""
WRAPPERS = ("model", "state_dict", "model_state_dict", "network_weights")
"""Keys under which checkpoints hold the state dict: those of MONAI, Lightning, PyTorch's tutorials and nnU-Net."""


def load_source_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint into ``network``; all keys must match.

    The check sums in the file are verified. If there is a ``<path>.sha256`` beside it, as ``sha256sum`` writes it, the
    whole file must have this fingerprint; otherwise a line in the log says that it was not checked.

    Args:
        network: the source network.
        path: a state dict, or a dict with one under ``model``, ``state_dict``, ``model_state_dict`` or
            ``network_weights``; tensors and plain types only. The prefix ``module.`` of ``DataParallel`` is removed.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is damaged, cannot be read, has another fingerprint, or does not fit, with the file and the
            keys that differ.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint at {path}: set ckpt_path to the source network's weights")
    state = _read(path)
    own = network.state_dict()
    if not any(key in own for key in state) and all(str(key).startswith("module.") for key in state):
        consume_prefix_in_state_dict_if_present(state, "module.")
    _check(state, own, path, type(network).__name__, "set network_def to the network that was trained")
    network.load_state_dict(state)


def load_encoder_weights(encoder: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights of a classifier, such as one trained on ImageNet, into a network's encoder before training.

    All keys of the encoder must be present except the batch counters, which older files lack.

    Args:
        encoder: for example ``ResUNet().res`` or ``PraNet().resnet``.
        path: as for :func:`load_source_weights`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read or does not fit, with the file and the keys that differ.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file at {path}: set encoder_path to the encoder's weights, or to null")
    own = encoder.state_dict()
    state = {**{key: value for key, value in own.items() if key.endswith("num_batches_tracked")}, **_read(path)}
    _check(state, own, path, type(encoder).__name__, "set encoder_path to weights of this encoder, or to null")
    encoder.load_state_dict(state)


class WeightsSaver(DiskSaver):
    """Ignite's ``DiskSaver`` that also writes the fingerprint of the weights, which is checked when they are loaded.

    Args:
        dirname: the folder.
        kwargs: as for ``ignite.handlers.DiskSaver``.
    """

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        """Write the file, and its fingerprint as ``<filename>.sha256``."""
        path = Path(self.dirname) / filename
        path.with_name(filename + FINGERPRINT).unlink(missing_ok=True)  # a crash leaves none rather than a wrong one
        super().__call__(checkpoint, filename, metadata)
        if path.is_file():
            with atomic_path(f"{path}{FINGERPRINT}") as part:
                part.write_text(f"{_sha256(path)}  {filename}\n", encoding="utf-8")


def _sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_fingerprint(path: str | os.PathLike[str]) -> None:
    beside, own = f"{os.fspath(path)}{FINGERPRINT}", _sha256(path)
    if not os.path.isfile(beside):
        logger.info("weights %s: SHA-256 %s, not checked: there is no %s", path, own, os.path.basename(beside))
        return
    wanted = re.match(r"[0-9a-f]{64}\b", Path(beside).read_text(encoding="utf-8", errors="replace").lower())
    if wanted is None:
        raise ValueError(f"{beside} holds no SHA-256 of the weights: write it with sha256sum, or remove it")
    if wanted[0] != own:
        raise ValueError(
            f"the weights {path} are not those of {beside} (SHA-256 {own[:12]}..., wanted {wanted[0][:12]}...): copy "
            "them again, or rewrite that file if they were meant to change"
        )
    logger.info("weights %s: SHA-256 %s, as in %s", path, own, os.path.basename(beside))


def _read(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    _check_fingerprint(path)
    try:
        if _is_zip(path):
            check_zip(path)
        else:
            logger.warning("%s is of a format of torch without check sums: damage to it cannot be noticed", path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of plain tensors: {error}") from error
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    if others := [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]:
        raise ValueError(
            f"{path} is not a state dict of tensors ({_some(list(map(str, others)))} are not): save the network's "
            f"state dict alone, or under one of the keys {', '.join(WRAPPERS)}"
        )
    return state


def _is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether it is a zip file, or was one before it was damaged at either end; the other format is a pickle."""
    with open(path, "rb") as file:
        begins = file.read(2)
    return zipfile.is_zipfile(path) or begins == b"PK" or begins[:1] != b"\x80"


def _check(
    state: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    name: str,
    fix: str,
) -> None:
    problems = [
        f"{what}: {_some(keys)}"
        for what, keys in (
            ("missing", [key for key in own if key not in state]),
            ("unknown", [key for key in state if key not in own]),
            ("of another shape", [key for key in own if key in state and own[key].shape != state[key].shape]),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"the checkpoint {path} does not fit the network {name} ({'; '.join(problems)}): {fix}")


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
