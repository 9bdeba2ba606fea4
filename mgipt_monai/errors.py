# SPDX-License-Identifier: Apache-2.0
"""What went wrong, in the words of whoever noticed it first."""

from __future__ import annotations

__all__ = ["root_cause"]


def root_cause(error: BaseException) -> str:
    """Return the first cause's own message: MONAI wraps errors in the names of the transforms they went through.

    Example:
        >>> try:
        ...     try:
        ...         raise ValueError("too dark")
        ...     except ValueError as cause:
        ...         raise RuntimeError("applying transform") from cause
        ... except RuntimeError as error:
        ...     root_cause(error)
        'too dark'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip() or type(error).__name__
