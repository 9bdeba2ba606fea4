# SPDX-License-Identifier: Apache-2.0
"""Provenance of a file: the fingerprint of a network's weights, files that belong to it, and installed versions."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mgipt_monai.utils.files import load_state, save_state
from mgipt_monai.utils.state_checks import check_keys, check_number

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BesideWeights", "fingerprint", "versions"]

logger = logging.getLogger(__name__)


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


class BesideWeights(ABC):
    """Numbers of a network's layers, measured in source images and kept in a file beside the network's weights.

    A mixin of frozen dataclasses. The file holds tensors and plain types with check sums, and no image.

    Attributes:
        layers: dotted name of a layer to its numbers.
        images: number of source images.
        fingerprint: of the weights, see :func:`fingerprint`.
        path: the file they were read from; None if they were not read from a file.
    """

    kind: ClassVar[str]
    """What the file is, for messages."""
    made_with: ClassVar[str]
    """The command that makes it, for messages."""
    version: ClassVar[int] = 1

    layers: Mapping[str, Any]
    images: int
    fingerprint: str
    path: str | None

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """Return what the file holds beside version, images and fingerprint."""

    @classmethod
    @abstractmethod
    def _of(cls, content: Mapping[str, Any], path: str) -> Self:
        """Build the numbers from what a file holds."""

    @property
    def origin(self) -> str:
        """Their name in error messages."""
        return f"the {self.kind}" if self.path is None else f"the {self.kind} {self.path}"

    def _check_provenance(self) -> None:
        """Raise ValueError unless there are layers, images and a fingerprint."""
        check_keys("layers", self.layers, set())
        if not self.layers:
            raise ValueError(f"the {self.kind} has no layers")
        if others := [name for name in self.layers if not isinstance(name, str)]:
            raise ValueError(f"the name of a layer must be a text, got {others[0]!r}")
        check_number("number of source images", self.images, least=1, whole=True)
        if not isinstance(self.fingerprint, str):
            raise ValueError(f"the fingerprint must be a text, got a {type(self.fingerprint).__name__}")

    @property
    def digest(self) -> str:
        """SHA-256 of all numbers, as 64 hexadecimal digits."""
        digest = hashlib.sha256()

        def add(value: Any) -> None:
            if isinstance(value, Mapping):
                for key, each in sorted(value.items()):
                    digest.update(f"{key}\0".encode())
                    add(each)
            else:
                numbers = value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
                digest.update(numbers)

        add(self._content())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file. A crash leaves the old file or the new one.

        Raises:
            FileExistsError: if there is a file of another kind, such as the network's weights.
        """
        if os.path.lexists(path):
            try:
                type(self).load(path)
            except (OSError, ValueError):
                raise FileExistsError(
                    f"{path} is not a {self.kind}, and not overwritten: choose another name, or move it away"
                ) from None
        content = {"version": self.version, "images": self.images, "fingerprint": self.fingerprint, **self._content()}
        save_state(content, path, sealed=True)
        told = "%s of %d layers from %d source images written to %s"
        logger.info(told, self.kind, len(self.layers), self.images, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by :meth:`save`, without executing any code in it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or of another kind.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no {cls.kind} at {path}: create it with {cls.made_with}")
        try:
            content = load_state(path, cls.kind)
            check_keys("file", content, {"version", "images", "fingerprint", "layers"})
            check_number("version", content["version"], cls.version, cls.version, whole=True)
            return cls._of(content, os.fspath(path))
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable {cls.kind} ({error.__cause__ or error}): recreate it with {cls.made_with}"
            ) from error

    def check(self, network: nn.Module) -> None:
        """Raise ValueError unless ``network`` has exactly the weights that the numbers were measured with."""
        if fingerprint(network) != self.fingerprint:
            raise ValueError(
                f"{self.origin} was made with other weights than this {type(network).__name__} has: "
                f"make it again with {self.made_with}"
            )


def versions() -> dict[str, str]:
    """Return the installed versions of this package and of those that its results depend on.

    Example:
        >>> list(versions())
        ['mgipt_monai', 'monai', 'torch', 'pytorch-ignite']
    """
    return {name: metadata.version(name) for name in ("mgipt_monai", "monai", "torch", "pytorch-ignite")}
