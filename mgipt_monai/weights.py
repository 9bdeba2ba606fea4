# SPDX-License-Identifier: Apache-2.0
"""Load a source network's weights, and say what is wrong where they do not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

__all__ = ["load_source_weights"]


def load_source_weights(network: nn.Module, path: str | os.PathLike) -> None:
    """Load a checkpoint into ``network``, every key of it.

    Args:
        network: the source network.
        path: a state dict, or a dict with one under ``model`` or ``state_dict``; tensors and plain types only. The
            ``module.`` that ``DataParallel`` puts before every key may be there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read or does not fit, naming the file and the keys that differ.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint at {path}: set ckpt_path to the source network's weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of plain tensors: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    own = network.state_dict()
    if not any(key in own for key in state) and all(str(key).startswith("module.") for key in state):
        consume_prefix_in_state_dict_if_present(state, "module.")
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
        raise ValueError(
            f"the checkpoint {path} does not fit the network {type(network).__name__} ({'; '.join(problems)}): "
            "set network_def to the network that it was trained as"
        )
    network.load_state_dict(state)


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
