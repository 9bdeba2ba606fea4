# SPDX-License-Identifier: Apache-2.0
"""What both prompt injectors share: the gradient of a prompt, and the checks of it and of their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor


def loss_gradient(
    loss: Callable[[Tensor], Tensor], prompted: Tensor, prompts: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """Return the per-image losses of prompted images and their gradient with respect to the prompts alone."""
    losses = loss(prompted)
    gradients = torch.autograd.grad(losses.sum(), prompts)
    return losses.detach(), gradients[0] if isinstance(prompts, Tensor) else gradients


def check_tuning(*values: Tensor) -> None:
    """Raise FloatingPointError unless all that tuning gave is finite; it waits for the device once."""
    if not torch.cat([value.flatten() for value in values]).isfinite().all():
        raise FloatingPointError("the alignment loss or its gradient is not finite: check the image and the network")


def check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes as a tuple; raise ValueError unless they are whole numbers from 1, each once."""
    if any(not isinstance(size, Integral) or size < 1 for size in sizes) or len(set(sizes)) != len(sizes):
        raise ValueError(f"{name} must be different whole numbers from 1, got {tuple(sizes)}")
    return tuple(int(size) for size in sizes)


def check_step(lr: float, betas: Sequence[float]) -> None:
    """Raise ValueError unless the learning rate is positive and Adam's betas are in [0, 1)."""
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be above 0, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
