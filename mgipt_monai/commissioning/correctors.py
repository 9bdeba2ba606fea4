# SPDX-License-Identifier: Apache-2.0
"""Correctors: what fits a :class:`Correction` to a few labelled images, towards no correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.nn import functional

from mgipt_monai.networks.correction import Correction, NormShift, ShiftedNorm, input_statistics, is_shifted
from mgipt_monai.networks.prompts.early_stop import Head

__all__ = [
    "OFFSETS",
    "best_offsets",
    "curves_of",
    "dice_at_offsets",
    "fit_norms",
    "fit_offset",
    "fit_prompts",
    "fit_temperature",
]

OFFSETS = np.linspace(-8, 8, 129)
"""Offsets that are tried, in logits."""
STEP_OF_OFFSETS = OFFSETS[1] - OFFSETS[0]
OFFSET_CALM = 0.00375
"""Mean Dice that one logit of offset must bring."""
MOST_ROUNDS = 5
TEMPERATURES = np.geomspace(0.2, 5, 41)
PROMPT_SIDES = (1, 3, 5)
STEPS, RATE, CALM = 20, 0.15, 0.05
"""Adam's steps, learning rate and weight of the squared distance from no correction, for norms and prompts."""


def fit_offset(logits: Sequence[Tensor], labels: Sequence[Tensor], head: Head = "sigmoid") -> Correction:
    """Fit an offset for each class, which maximises the mean Dice of the masks; the background of softmax has none.

    Offsets are tried on a grid. For a softmax head, where the classes compete, one class after another is moved until
    none gains.

    Args:
        logits: (1, K, \\*spatial) each.
        labels: 0 and 1, (1, classes, \\*spatial) each.
        head: how logits become masks.
    """
    if head == "sigmoid":
        return best_offsets([curves_of(one, label) for one, label in zip(logits, labels, strict=True)])
    offset = torch.zeros(logits[0].shape[1])
    for _ in range(MOST_ROUNDS):
        before = offset.clone()
        for channel in range(1, len(offset)):
            curves = [
                dice_at_offsets(one, label, head, offset, channel) for one, label in zip(logits, labels, strict=True)
            ]
            offset[channel] = _best(np.stack(curves))
        if torch.equal(offset, before):
            break
    return Correction(offset=offset)


def curves_of(logits: Tensor, label: Tensor) -> np.ndarray:
    """Return :func:`dice_at_offsets` of each channel of a sigmoid head, (K, offsets); each is on its own."""
    channels = logits.shape[1]
    return np.stack([dice_at_offsets(logits, label, "sigmoid", torch.zeros(channels), k) for k in range(channels)])


def best_offsets(curves: Sequence[np.ndarray]) -> Correction:
    """Return the offsets that :func:`fit_offset` finds for images with these :func:`curves_of`."""
    return Correction(offset=torch.tensor([_best(channel) for channel in np.stack(curves, axis=1)]))


def _best(curves: np.ndarray) -> float:
    """Return the offset with the best mean over images, (images, offsets)."""
    known = curves[~np.isnan(curves).any(axis=1)]
    return float(OFFSETS[(known.mean(axis=0) - OFFSET_CALM * np.abs(OFFSETS)).argmax()]) if len(known) else 0.0


def dice_at_offsets(logits: Tensor, label: Tensor, head: Head, offset: Tensor, channel: int) -> np.ndarray:
    """Return the Dice of one image at each of the :data:`OFFSETS` of one channel, the others' being as given.

    Args:
        logits: (1, K, \\*spatial).
        label: 0 and 1, (1, classes, \\*spatial).
        head: how logits become masks.
        offset: of each channel, (K,); that of ``channel`` is ignored.
        channel: the one that is moved.

    Returns:
        (offsets,): the channel's own Dice for ``sigmoid``, the mean over the label's classes for ``softmax``; NaN if
        the label has none to measure it by.
    """
    masks = (label[0] > 0).flatten(1).cpu().numpy()
    values = logits[0].flatten(1).cpu().numpy()
    # a voxel is the channel's at the offsets above the negative of its margin over the best other one
    if head == "sigmoid":
        masks, own = masks[channel : channel + 1], 0
        margin, winner = values[channel], np.full(values.shape[1], -1)
    else:
        own = channel - 1
        shifted = values + offset.numpy()[:, None]
        shifted[channel] = -np.inf
        winner = shifted.argmax(axis=0) - 1
        margin = values[channel] - shifted.max(axis=0)
    # how many of the thresholds lie below each; in double precision, as a margin may be tiny
    place = np.clip(np.ceil((margin.astype(float) - OFFSETS[0]) / STEP_OF_OFFSETS), 0, len(OFFSETS)).astype(int)

    def taken(where: np.ndarray) -> np.ndarray:
        """Count the voxels of a mask that are the channel's, at each offset."""
        counts = np.bincount(place[where], minlength=len(OFFSETS) + 1)
        return counts[::-1].cumsum()[::-1][1:][::-1]

    scores = []
    for index, mask in enumerate(masks):
        if not (size := mask.sum()):
            continue
        if index == own:
            predicted, right = taken(np.ones_like(mask)), taken(mask)
        else:
            others = winner == index
            predicted, right = (where.sum() - taken(where) for where in (others, others & mask))
        scores.append(2 * right / (predicted + size))
    return np.mean(scores, axis=0) if scores else np.full(len(OFFSETS), np.nan)


def fit_temperature(logits: Sequence[Tensor], labels: Sequence[Tensor], head: Head = "sigmoid") -> float:
    """Fit the temperature that makes the probabilities of the labels most likely; it changes no mask.

    Args:
        logits: (1, K, \\*spatial) each, with their offset.
        labels: (1, classes, \\*spatial) each.
        head: how logits become probabilities.
    """

    def surprise(temperature: float) -> float:
        total = 0.0
        for each, label in zip(logits, labels, strict=True):
            if head == "sigmoid":
                total += functional.binary_cross_entropy_with_logits(each / temperature, label).item()
            else:
                total += functional.cross_entropy(each / temperature, with_background(label)).item()
        return total

    return float(min(TEMPERATURES, key=surprise))


def with_background(label: Tensor) -> Tensor:
    """Return a label (1, classes, \\*spatial) with a channel for the background before the classes."""
    return torch.cat([1 - label.amax(dim=1, keepdim=True), label], dim=1)


@contextmanager
def _hooked(network: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    layers = dict(network.named_modules())
    handles = [layers[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _site_statistics(network: nn.Module, images: Sequence[Tensor]) -> dict[str, NormShift]:
    """Measure the statistics of the site's images at each norm layer; nothing is shifted yet."""
    sums: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def measuring(name: str) -> Any:
        def measure(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if inputs[0].ndim > 2:
                mean, std = input_statistics(layer, inputs[0])
                sums.setdefault(name, []).append((mean.mean(dim=0), std.log().mean(dim=0)))

        return measure

    hooks = {name: measuring(name) for name, layer in network.named_modules() if is_shifted(layer)}
    with _hooked(network, hooks):
        for image in images:
            network(image)
    return {
        name: NormShift(
            torch.zeros(2),
            torch.stack([mean for mean, _ in seen]).mean(dim=0),
            torch.stack([log_std for _, log_std in seen]).mean(dim=0).exp(),
        )
        for name, seen in sums.items()
    }


def fit_norms(
    network: nn.Module, images: Sequence[Tensor], labels: Sequence[Tensor], head: Head = "sigmoid", steps: int = STEPS
) -> Correction:
    """Fit two shares for each norm layer, of the site's mean and deviation, and an offset for each output channel.

    Adam minimises the mean soft Dice loss of the images, one image a step in turn, plus the squared shares.

    Args:
        network: the frozen network, in evaluation mode.
        images: (1, C, \\*spatial) each.
        labels: (1, K, \\*spatial) each, with the channels of :func:`binarize`.
        head: how logits become masks.
        steps: of Adam; each takes a forward and a backward.

    Returns:
        The correction, without an offset: that is fitted afterwards, to the masks.
    """
    shifts = _site_statistics(network, images)
    if not shifts:
        return Correction()
    shares = {name: torch.zeros(2, requires_grad=True, device=images[0].device) for name in shifts}
    moving = {name: replace(shift, share=shares[name]) for name, shift in shifts.items()}
    with _hooked(network, {name: ShiftedNorm(shift) for name, shift in moving.items()}):
        _descend(list(shares.values()), network, images, labels, head, steps)
    return Correction(norms={name: replace(shift, share=shares[name].detach()) for name, shift in shifts.items()})


def fit_prompts(
    network: nn.Module,
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    head: Head = "sigmoid",
    steps: int = STEPS,
    sides: Sequence[int] = PROMPT_SIDES,
) -> Correction:
    """Fit multi-scale site prompts, which act together, as :func:`fit_norms` fits shares."""
    channels, dims = images[0].shape[1], images[0].ndim - 2
    sides = [side for side in sides if side <= min(min(image.shape[2:]) for image in images)]
    changes = [torch.zeros(1, channels, *[side] * dims, requires_grad=True, device=images[0].device) for side in sides]

    def run(image: Tensor) -> Tensor:
        return network(Correction(prompts=tuple(change + 1 for change in changes)).to_image(image))

    _descend(changes, run, images, labels, head, steps)
    return Correction(prompts=tuple((change + 1).detach() for change in changes))


def _descend(
    parameters: list[Tensor],
    run: Any,
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    head: Head,
    steps: int,
) -> None:
    softmax = head == "softmax"
    loss = DiceLoss(sigmoid=not softmax, softmax=softmax, include_background=not softmax, batch=False)
    channels = labels[0].shape[1] + softmax
    offset = torch.zeros(channels, requires_grad=True, device=images[0].device)
    optimizer = torch.optim.Adam([*parameters, offset], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for step in range(steps):
            image, label = images[step % len(images)], labels[step % len(images)]
            if softmax:
                label = with_background(label)
            logits = Correction(offset=offset).to_logits(run(image))
            distance = torch.stack([parameter.square().sum() for parameter in parameters]).sum()
            optimizer.zero_grad()
            (loss(logits, label) + CALM * distance / len(parameters)).backward()
            # activations that overflow have no gradient to follow
            if all(torch.isfinite(each.grad).all() for each in (*parameters, offset) if each.grad is not None):
                optimizer.step()
            schedule.step()
