# SPDX-License-Identifier: Apache-2.0
"""AIP, the adaptive-scale instance prompt (Eq. 3 and 4): learnt from scratch for each image, grown while it helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from mgipt_monai.networks.prompts.early_stop import got_worse
from mgipt_monai.networks.prompts.frequency import (
    LowFrequencies,
    Offset,
    check_channels,
    check_offset,
    check_sizes,
    check_step,
    check_tuning,
    loss_gradients,
    prompt_offset,
)
from mgipt_monai.utils.state_checks import is_whole

__all__ = ["InstancePrompt", "InstanceTuning"]


@dataclass
class InstanceTuning:
    """The result of tuning one image's prompt.

    Attributes:
        size: side of the chosen prompt.
        losses: per tried size, the alignment loss before each step (the first is the unadapted image's).
        consistency: per tried size, the consistency score (lower is better); empty if sizes were not compared.
    """

    size: int = 0
    losses: dict[int, list[float]] = field(default_factory=dict)
    consistency: dict[int, float] = field(default_factory=dict)

    @property
    def loss_before(self) -> float | None:
        """Loss of the unadapted image; None if no size was tried."""
        return next(iter(self.losses.values()))[0] if self.losses else None

    @property
    def loss_after(self) -> float | None:
        """Loss before the last step of the chosen size: the one after it would cost a forward."""
        return self.losses[self.size][-1] if self.losses else None


class InstancePrompt(nn.Module):
    """Progressive instance prompt: tune, check, then grow or stop.

    The smallest size starts at ones. A tuned prompt becomes the frozen centre of the next size, whose outer ring starts
    at ones and is trained alone with a new Adam optimiser. Growth ends at the largest size, or as soon as the
    consistency score gets worse; then the previous size's prompt is kept.

    Args:
        sizes: sides to try, increasing by an even number; a single size is tuned without any check.
        steps: Adam steps per size.
        lr: learning rate.
        betas: Adam's betas.
        early_stop: whether a worse consistency score ends the growth; otherwise the largest size is always reached.
        offset: see :func:`mgipt_monai.networks.prompt_offset`.
        channels: channels of the image that are prompted; None for all. Clicks or guidance should not be.

    Raises:
        ValueError: at construction, for sizes that do not nest or settings out of range.

    Example:
        >>> prompt = InstancePrompt(sizes=(1, 3), steps=2)
        >>> image = torch.rand(1, 3, 32, 32)
        >>> tuning = prompt.tune(image, lambda x: (x - 0.2).abs().mean((1, 2, 3)), lambda prompted: 0.0)
        >>> tuning.size, prompt.amplitude.shape
        (3, torch.Size([1, 3, 3, 3]))
    """

    def __init__(
        self,
        sizes: Sequence[int] = (1, 3, 5),
        steps: int = 7,
        lr: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.99),
        early_stop: bool = True,
        offset: Offset = "auto",
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.sizes = check_sizes("instance sizes", sizes)
        if any((large - small) % 2 or large <= small for small, large in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError(f"instance sizes must grow by an even number, so that they share a centre; got {sizes}")
        if not is_whole(steps) or steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.betas = check_step(lr, betas)
        self.steps, self.lr, self.early_stop = steps, lr, early_stop
        self.offset, self.channels = check_offset(offset), check_channels(channels)
        self.amplitude: Tensor | None = None
        """The latest image's prompt (1, C, side, ...); each image replaces it, and it is not part of the state."""

    def forward(self, image: Tensor) -> Tensor:
        """Apply the latest tuned prompt to ``image`` (B, C, \\*spatial); without one, return the image unchanged."""
        if self.amplitude is None:
            return image
        return self._frequencies(image, self.amplitude.shape[-1]).apply(self.amplitude)

    @property
    def largest_change(self) -> float:
        """Largest distance from 1 of a factor in the latest image's prompt; 0 before the first image."""
        return 0.0 if self.amplitude is None else (self.amplitude - 1).abs().max().item()

    def extra_repr(self) -> str:
        """Return the settings."""
        adam = f"steps={self.steps}, lr={self.lr}"
        return f"sizes={self.sizes}, {adam}, early_stop={self.early_stop}, offset={self.offset}"

    def reset(self) -> None:
        """Forget the latest image's prompt."""
        self.amplitude = None

    def tune(
        self,
        image: Tensor,
        loss: Callable[[Tensor], Tensor],
        consistency: Callable[[Callable[[Tensor], Tensor]], float],
    ) -> InstanceTuning:
        """Learn the prompt of one image.

        Args:
            image: (1, C, \\*spatial).
            loss: alignment loss of prompted images, (N, C, \\*spatial) to (N,); one forward and one backward per step.
            consistency: score of a prompt, passed as the function that applies it; called after each size, if there are
                several.

        Returns:
            The chosen size and the measurements. The prompt itself is in ``amplitude``.
        """
        tuning = InstanceTuning()
        self.amplitude = None
        for size in self.sizes:
            previous: Tensor | None = self.amplitude
            self.amplitude = self._tune_size(image, size, loss, tuning)
            if self.early_stop and len(self.sizes) > 1:
                tuning.consistency[size] = consistency(self)
                if tuning.size and got_worse(tuning.consistency[tuning.size], tuning.consistency[size]):
                    self.amplitude = previous
                    break
            tuning.size = size
        return tuning

    def perturbed(self, image: Tensor, jitter: Callable[[Tensor], Tensor]) -> Tensor:
        """Return an image (1, C, \\*spatial) with its prompted channels perturbed."""
        if self.channels is None:
            return jitter(image)
        changed, channels = image.clone(), list(self.channels)
        changed[:, channels] = jitter(image[:, channels])
        return changed

    def _frequencies(self, image: Tensor, size: int) -> LowFrequencies:
        return LowFrequencies(image, size, offset=prompt_offset(image, self.offset), channels=self.channels)

    def _tune_size(self, image: Tensor, size: int, loss: Callable[[Tensor], Tensor], tuning: InstanceTuning) -> Tensor:
        shape = (1, image.shape[1], *[size] * (image.ndim - 2))
        prompt, ring = torch.ones(shape, device=image.device), torch.ones(shape, device=image.device)
        if self.amplitude is not None:
            margin = [(size - self.amplitude.shape[-1]) // 2] * (2 * (image.ndim - 2))
            prompt = functional.pad(self.amplitude, margin, value=1.0)
            ring = functional.pad(torch.zeros_like(self.amplitude), margin, value=1.0)
        prompt.requires_grad_()
        adam = torch.optim.Adam([prompt], lr=self.lr, betas=self.betas)
        low = self._frequencies(image, size)
        losses = []
        for _ in range(self.steps):
            value, (gradient,) = loss_gradients(loss, low.apply(prompt), prompt)
            losses.append(value)
            # Adam does not move entries with zero gradient: the centre stays frozen
            prompt.grad = gradient * ring
            adam.step()
        # checked at the end, so that no step waits for a GPU; a non-finite value stays in the prompt
        tuned = prompt.detach()
        check_tuning(*losses, tuned)
        tuning.losses[size] = torch.cat(losses).tolist()
        return tuned
