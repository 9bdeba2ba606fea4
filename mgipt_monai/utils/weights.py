# SPDX-License-Identifier: Apache-2.0
"""Load the weights of a source network or of its encoder, with clear errors if they do not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

__all__ = ["load_encoder_weights", "load_source_weights"]


def load_source_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint into ``network``; all keys must match.

    Args:
        network: the source network.
        path: a state dict, or a dict with one under ``model`` or ``state_dict``; tensors and plain types only. The
            prefix ``module.`` of ``DataParallel`` is removed.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read or does not fit, with the file and the keys that differ.
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


def _read(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of plain tensors: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


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
