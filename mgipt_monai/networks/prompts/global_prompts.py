# SPDX-License-Identifier: Apache-2.0
"""MGP, the multi-scale global prompts (Eq. 5): the only state kept from one image of a stream to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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
    short_axis,
)
from mgipt_monai.utils.state_checks import check_finite, check_keys, check_tensors

__all__ = ["GlobalPrompts"]


class GlobalPrompts(nn.Module):
    """Students that take one Adam step per image, and teachers that average them and are used for prediction.

    Args:
        sizes: side of each prompt, one student and one teacher per side; empty for none.
        lr: learning rate; the optimiser is new for each image, so a step changes each number by about ``lr``.
        betas: Adam's betas.
        teacher_decay: share of the old teacher kept at each image, in [0, 1); with 0 the teachers equal the students.
        centred: whether the blocks are centred on the zero frequency; False matches the released code
            (see :class:`LowFrequencies`).
        offset: see :func:`mgipt_monai.networks.prompt_offset`.
        channels: channels of the image that are prompted; None for all. Clicks or guidance should not be.

    Raises:
        ValueError: at construction, for settings out of range.

    Example:
        >>> prompts = GlobalPrompts(sizes=(3, 5))
        >>> image = torch.rand(1, 3, 32, 32)
        >>> losses = prompts.step(image, lambda x: (x - 0.2).abs().mean((1, 2, 3)))
        >>> losses.shape, prompts(image).shape  # one prompted image per teacher
        (torch.Size([2]), torch.Size([2, 3, 32, 32]))
    """

    def __init__(
        self,
        sizes: Sequence[int] = (3, 5, 7),
        lr: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.99),
        teacher_decay: float = 0.1,
        centred: bool = True,
        offset: Offset = "auto",
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.sizes = check_sizes("global sizes", sizes)
        self.betas = check_step(lr, betas)
        if not 0 <= teacher_decay < 1:
            raise ValueError(f"teacher_decay must be in [0, 1), got {teacher_decay}")
        self.lr, self.teacher_decay, self.centred = lr, teacher_decay, centred
        self.offset, self.channels = check_offset(offset), check_channels(channels)
        self.students: list[Tensor] = []
        self.teachers: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        """Apply every teacher to one image: (1, C, \\*spatial) to (number of sizes, C, \\*spatial)."""
        self.prepare(image)
        return self._views(image, self.teachers)

    def step(self, image: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Move the students by one step and update the teachers; all sizes in one batch.

        Args:
            image: (1, C, \\*spatial).
            loss: alignment loss of prompted images, (N, C, \\*spatial) to (N,).

        Returns:
            The students' losses before the step, one per size.
        """
        self.prepare(image)
        if not self.sizes:
            return image.new_zeros(0)
        students = [student.clone().requires_grad_() for student in self.students]
        losses, gradients = loss_gradients(loss, self._views(image, students), *students)
        check_tuning(losses, *gradients)
        for student, gradient in zip(students, gradients, strict=True):
            student.grad = gradient
        torch.optim.Adam(students, lr=self.lr, betas=self.betas).step()
        self.students = [student.detach() for student in students]
        self.teachers = [
            torch.lerp(student, teacher, self.teacher_decay)
            for student, teacher in zip(self.students, self.teachers, strict=True)
        ]
        return losses

    @property
    def largest_change(self) -> float:
        """Largest distance from 1 of a factor in the teachers; 0 before the first image."""
        return max(((teacher - 1).abs().max().item() for teacher in self.teachers), default=0.0)

    def extra_repr(self) -> str:
        """Return the settings."""
        adam = f"lr={self.lr}, teacher_decay={self.teacher_decay}"
        return f"sizes={self.sizes}, {adam}, centred={self.centred}, offset={self.offset}"

    def reset(self) -> None:
        """Start a new stream: all prompts start at ones again."""
        self.students, self.teachers = [], []

    def adaptation_state(self) -> dict[str, list[Tensor]]:
        """Return copies of the students and teachers; empty before the first image."""
        return {
            "students": [p.clone().cpu() for p in self.students],
            "teachers": [p.clone().cpu() for p in self.teachers],
        }

    def check_adaptation_state(self, state: dict[str, list[Tensor]]) -> None:
        """Raise ValueError if the state's prompts are not finite tensors, do not match, or have other sizes."""
        check_keys("state", state, {"students", "teachers"})
        for role in ("students", "teachers"):
            check_tensors(role, state[role])
            sides = tuple(p.shape[-1] if p.ndim else 0 for p in state[role])
            if sides and sides != self.sizes:
                raise ValueError(f"the state has {role} of sizes {sides}, these global prompts have {self.sizes}")
        if len(state["students"]) != len(state["teachers"]):
            raise ValueError("the state has different numbers of students and teachers")
        for prompt in (*state["students"], *state["teachers"]):
            channels, dims = state["students"][0].shape[1:2], state["students"][0].ndim - 2
            if dims < 1 or prompt.shape != (1, *channels, *[prompt.shape[-1]] * dims):
                raise ValueError(f"the state's students and teachers do not match: shape {tuple(prompt.shape)}")
        for role in ("students", "teachers"):
            check_finite(role, *state[role])

    def load_adaptation_state(self, state: dict[str, list[Tensor]]) -> None:
        """Restore prompts of the same sizes; raise ValueError, without changing anything, if they do not fit."""
        self.check_adaptation_state(state)
        self.students = [p.detach().clone() for p in state["students"]]
        self.teachers = [p.detach().clone() for p in state["teachers"]]

    def prepare(self, image: Tensor) -> None:
        """Create the prompts at the first image of a stream, check that they fit, and move them to the device.

        Raises:
            ValueError: for an image that is smaller than a prompt, or has other channels or axes than the stream's.
        """
        channels, dims = image.shape[1], image.ndim - 2
        if not self.students:
            self.students = [torch.ones(1, channels, *[size] * dims, device=image.device) for size in self.sizes]
            self.teachers = [student.clone() for student in self.students]
        if not self.sizes:
            return
        for size in self.sizes:
            short_axis(image, size)
        if self.students[0].shape[1] != channels or self.students[0].ndim != image.ndim:
            raise ValueError(
                f"this image has {channels} channels and {dims} spatial dimensions, the stream's have "
                f"{self.students[0].shape[1]} and {self.students[0].ndim - 2}: convert it, or start a new stream with "
                "reset()"
            )
        if self.students[0].device != image.device:
            self.students = [student.to(image.device) for student in self.students]
            self.teachers = [teacher.to(image.device) for teacher in self.teachers]

    def _views(self, image: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        offset = prompt_offset(image, self.offset)
        views = [LowFrequencies(image, p.shape[-1], self.centred, offset, self.channels).apply(p) for p in prompts]
        return torch.cat(views) if views else image[:0]
