# SPDX-License-Identifier: Apache-2.0
"""Which versions made a file."""

from __future__ import annotations

from importlib import metadata

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Return the installed versions of this package and of those that its results depend on.

    Example:
        >>> list(versions())
        ['mgipt_monai', 'monai', 'torch', 'pytorch-ignite']
    """
    return {name: metadata.version(name) for name in ("mgipt_monai", "monai", "torch", "pytorch-ignite")}
