# SPDX-License-Identifier: Apache-2.0
"""Provenance of a file: the fingerprint of a network's weights, and the installed versions."""

from __future__ import annotations

import hashlib
from importlib import metadata

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "versions"]


def fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 of all parameters and persistent buffers of a network, as 64 hexadecimal digits.

    It covers the name, data type, shape and every bit of each tensor of the state dict, and is the same on all devices.
    It takes about as long as reading the weights from a file.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> fingerprint(layer.eval()) == before, fingerprint(layer.double()) == before
        (True, False)
    """
    digest = hashlib.sha256()
    tensors = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    for key, value in sorted(tensors.items()):
        digest.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        # as bytes, since numpy lacks some data types of torch
        digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the installed versions of this package and of those that its results depend on.

    Example:
        >>> list(versions())
        ['mgipt_monai', 'monai', 'torch', 'pytorch-ignite']
    """
    return {name: metadata.version(name) for name in ("mgipt_monai", "monai", "torch", "pytorch-ignite")}
