# SPDX-License-Identifier: Apache-2.0
"""Failures of the machine (no space, no memory, no permission to write), which are not the fault of an image."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import torch

__all__ = ["MachineFailureError", "behind", "machine_failure", "out_of_memory"]

ANYWHERE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENODEV")
    if hasattr(errno, name)
}
WRITING = {errno.EROFS, errno.EACCES, errno.EPERM}
MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "DataLoader worker (pid")
DEVICE_TEXTS = ("CUDA error", "HIP error", "CUDNN_STATUS_", "CUBLAS_STATUS_")


class MachineFailureError(RuntimeError):
    """A failure of the machine; the stream stops, and can be resumed at the same image.

    Args:
        message: what failed.
        out_of_memory: whether memory ran out, which a single image may cause.
    """

    def __init__(self, message: str, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


def machine_failure(error: BaseException, writing: bool = True) -> str | None:
    """Return what failed if an error, or one behind it, is a failure of the machine; None for any other error.

    Args:
        error: the error.
        writing: whether files were written; a file that may not be read is a failure of its image.

    Example:
        >>> machine_failure(OSError(errno.ENOSPC, "No space left on device", "out/eye.png"))
        'No space left on device: out/eye.png'
        >>> machine_failure(PermissionError(errno.EACCES, "Permission denied", "in/eye.png"), writing=False)
        >>> machine_failure(ValueError("the image is constant"))
    """
    for one in behind(error):
        if isinstance(one, MachineFailureError) or any(text in str(one) for text in DEVICE_TEXTS):
            return str(one)
        if out_of_memory(one):
            detail = "" if isinstance(one, OSError) else str(one).strip().partition("\n")[0][:200]
            return f"out of memory ({detail})" if detail else "out of memory"
        if isinstance(one, OSError) and (one.errno in ANYWHERE or (writing and one.errno in WRITING)):
            place = "" if one.filename is None else f": {os.fsdecode(one.filename)}"
            return f"{one.strerror}{place}"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one behind it, says that memory ran out, or that a worker process was killed."""
    for one in behind(error):
        if isinstance(one, MachineFailureError):
            return one.out_of_memory
        if isinstance(one, (MemoryError, torch.cuda.OutOfMemoryError)):
            return True
        if isinstance(one, OSError) and one.errno == errno.ENOMEM:
            return True
        if isinstance(one, RuntimeError) and any(text in str(one) for text in MEMORY_TEXTS):
            return True
    return False


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from or while handling."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
