# SPDX-License-Identifier: Apache-2.0
"""What MGIPT can do within a limited number of forwards and backwards per image."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

from mgipt_monai.networks.prompts.global_prompts import GlobalPrompts
from mgipt_monai.networks.prompts.instance_prompt import InstancePrompt
from mgipt_monai.utils.state_checks import is_whole

__all__ = ["Plan", "fit", "plan"]


@dataclass(frozen=True)
class Plan:
    """What is done for an image.

    Attributes:
        instance_sizes: sides of the instance prompt, smallest first.
        steps: steps per size.
        global_sizes: sides of the global prompts.
        checks: whether growth is checked by consistency, if there are several instance sizes.
        guarded: whether the image is also predicted without adaptation.
    """

    instance_sizes: tuple[int, ...]
    steps: int
    global_sizes: tuple[int, ...]
    checks: bool = True
    guarded: bool = False

    @property
    def compares(self) -> bool:
        """Whether sizes are compared by consistency."""
        return self.checks and len(self.instance_sizes) > 1

    @property
    def cost(self) -> int:
        """Maximum number of forwards and backwards per image; fewer if growth stops early.

        Example:
            >>> Plan((1, 3, 5), 7, (3, 5, 7)).cost, Plan((), 7, ()).cost
            (58, 1)
        """
        tuning = 2 * len(self.global_sizes) + 2 * self.steps * len(self.instance_sizes)
        comparing = 2 * len(self.instance_sizes) if self.compares else 0
        views = len(self.global_sizes) + bool(self.instance_sizes)
        return tuning + comparing + max(1, views) + self.guarded

    def reduced(self) -> Plan:
        """Return the plan without its least important part, see :func:`plan`."""
        if len(self.instance_sizes) > 1:
            return replace(self, instance_sizes=self.instance_sizes[:-1])
        if self.instance_sizes:
            return replace(self, steps=self.steps - 1) if self.steps > 1 else replace(self, instance_sizes=())
        largest = max(self.global_sizes)
        return replace(self, global_sizes=tuple(size for size in self.global_sizes if size != largest))

    def lacks(self, whole: Plan) -> list[str]:
        """List the parts of a whole plan that this one leaves out, in the order in which they were left out."""
        words = [f"instance size {size}" for size in reversed(whole.instance_sizes[max(1, len(self.instance_sizes)) :])]
        if whole.compares and not self.compares:
            words.append("consistency check")
        if self.instance_sizes and self.steps < whole.steps:
            words.append(f"{whole.steps - self.steps} of {whole.steps} steps")
        if whole.instance_sizes and not self.instance_sizes:
            words.append(f"instance size {whole.instance_sizes[0]}")
        left_out = sorted(set(whole.global_sizes) - set(self.global_sizes), reverse=True)
        return words + [f"global size {size}" for size in left_out]


def plan(max_forwards: int, whole: Plan) -> Plan:
    """Return as much of a plan as ``max_forwards`` allows; the result depends on no image.

    Parts are left out in this order until the cost fits: instance sizes from the largest until one is left, and with
    them the consistency check; steps of the smallest size, one by one; that size; global sizes from the largest. What
    remains in the end is the calibrated prediction alone.

    Raises:
        ValueError: if not even that fits, or ``max_forwards`` is not a whole number.

    Example:
        >>> plan(30, Plan((1, 3, 5), 7, (3, 5, 7)))
        Plan(instance_sizes=(1,), steps=7, global_sizes=(3, 5, 7), checks=True, guarded=False)
    """
    least = replace(whole, instance_sizes=(), global_sizes=()).cost
    if not is_whole(max_forwards) or max_forwards < least:
        guard = " and one without adaptation" if whole.guarded else ""
        raise ValueError(
            f"max_forwards must be a whole number of at least {least} (one for the calibrated prediction{guard}), "
            f"got {max_forwards!r}"
        )
    planned = whole
    while planned.cost > max_forwards:
        planned = planned.reduced()
    return planned


def fit(
    max_forwards: int, instance_prompt: InstancePrompt, global_prompts: GlobalPrompts, guarded: bool
) -> tuple[InstancePrompt, GlobalPrompts, list[str]]:
    """Return copies of both prompts that stay within ``max_forwards``, and a list of what was left out.

    Raises:
        ValueError: as :func:`plan`.
    """
    whole = Plan(
        instance_prompt.sizes, instance_prompt.steps, global_prompts.sizes, instance_prompt.early_stop, guarded
    )
    planned = plan(max_forwards, whole)
    instance_prompt, global_prompts = copy(instance_prompt), copy(global_prompts)
    instance_prompt.sizes, instance_prompt.steps = planned.instance_sizes, planned.steps
    global_prompts.sizes = planned.global_sizes
    return instance_prompt, global_prompts, planned.lacks(whole)
