# SPDX-License-Identifier: Apache-2.0
"""Ensemble (Eq. 7): fuse the predictions of the prompted views, and measure where they disagree."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from mgipt_monai.networks.prompts.early_stop import Head, check_head

__all__ = ["ConfidenceEnsemble", "MeanEnsemble", "disagreement", "disagreement_map", "slabs"]

SLAB = 2**18
"""Number of voxels of each view that are fused or compared at once."""


class ConfidenceEnsemble(nn.Module):
    """Confidence-weighted sum of the logits of several prompted views of one image.

    Per voxel the weights are the confidences (largest softmax value over the channels) divided by their sum, times a
    factor for each kind of prompt. As published, the factors are not normalised: they scale the logits, which does not
    change masks.

    Args:
        instance_factor: factor of the instance prompt's prediction.
        global_factor: factor of each global prompt's prediction.
        one_channel: confidence of a network with a single output channel, whose softmax is constant: ``binary``, the
            probability of the more likely class, or ``constant`` as in the released code.

    Raises:
        ValueError: at construction, for a negative factor or an unknown choice.

    Example:
        >>> fuse = ConfidenceEnsemble()
        >>> logits = torch.randn(4, 2, 8, 8)
        >>> fuse(logits, has_instance=True).shape
        torch.Size([1, 2, 8, 8])
    """

    def __init__(
        self,
        instance_factor: float = 2.0,
        global_factor: float = 0.5,
        one_channel: Literal["binary", "constant"] = "binary",
    ) -> None:
        super().__init__()
        if not (instance_factor >= 0 and global_factor >= 0):
            raise ValueError(f"factors must not be negative, got {instance_factor} and {global_factor}")
        choices = get_args(Literal["binary", "constant"])
        if one_channel not in choices:
            raise ValueError(f"one_channel must be one of {', '.join(choices)}; got {one_channel!r}")
        self.instance_factor, self.global_factor, self.one_channel = instance_factor, global_factor, one_channel

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"instance_factor={self.instance_factor}, global_factor={self.global_factor}"

    def forward(self, logits: Tensor, has_instance: bool = True) -> Tensor:
        """Fuse the logits.

        Args:
            logits: one prediction per prompted view, (N, K, \\*spatial).
            has_instance: whether the first prediction is the instance prompt's; the others are global prompts'.

        Returns:
            Fused logits (1, K, \\*spatial).
        """
        factors = torch.full((len(logits),), self.global_factor, dtype=logits.dtype, device=logits.device)
        if has_instance:
            factors[0] = self.instance_factor
        factors = factors.view(-1, *[1] * (logits.ndim - 1))
        fused = []
        for slab in slabs(logits):
            confidence = self.confidence(slab)
            fused.append((confidence / confidence.sum(dim=0) * factors * slab).sum(dim=0, keepdim=True))
        return fused[0] if len(fused) == 1 else torch.cat(fused, dim=2)

    def confidence(self, logits: Tensor) -> Tensor:
        """Confidence per voxel, in (0, 1]: (N, K, \\*spatial) to (N, 1, \\*spatial)."""
        if logits.shape[1] > 1 or self.one_channel == "constant":
            return logits.softmax(dim=1).amax(dim=1, keepdim=True)
        return torch.sigmoid(logits.abs())


class MeanEnsemble(nn.Module):
    """Plain mean of the logits of several prompted views, as a baseline for the confidence weights.

    Example:
        >>> MeanEnsemble()(torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1, 1)).item()
        3.0
    """

    def forward(self, logits: Tensor, has_instance: bool = True) -> Tensor:
        """Fuse logits (N, K, \\*spatial) into (1, K, \\*spatial); all views have the same weight."""
        return logits.mean(dim=0, keepdim=True)


def disagreement(logits: Tensor, head: Head = "sigmoid") -> tuple[Tensor, float]:
    """Measure how much several views disagree, per pixel and as one number for the image.

    Per pixel it is the mutual information between class and view: the entropy of the views' mean probability minus the
    mean of their entropies, divided by its largest possible value. It is 0 where all views agree, however uncertain
    they are, and 1 where they are certain and split evenly among as many classes as possible. A sigmoid head decides
    per structure, and the structure with the largest value counts. Each view has one vote, whatever its factor in the
    ensemble. A pixel where a view is not finite counts as 1.

    The image's number is the mean over the pixels where at least one view predicts a structure; 0 if no view does. A
    mean over all pixels would mostly measure the size of the background, on which all views agree. For two certain
    views of one structure the number is one minus the intersection over union of their masks.

    Source: the mutual information of Bayesian active learning by disagreement (Houlsby et al., arXiv 1112.5745), with
    the views as ensemble members.

    Args:
        logits: one prediction per view, (N, K, \\*spatial).
        head: how logits become probabilities.

    Returns:
        The map (1, 1, \\*spatial) and the image's number, both in [0, 1].

    Raises:
        ValueError: for a softmax head with one channel.

    Example:
        >>> wide, narrow = torch.full((1, 1, 4), 30.0), torch.tensor([[[30.0, -30.0, -30.0, -30.0]]])
        >>> uncertainty, mean = disagreement(torch.cat([wide, narrow]))
        >>> uncertainty.tolist(), mean
        ([[[0.0, 1.0, 1.0, 1.0]]], 0.75)
    """
    maps = []
    for slab in slabs(logits):
        if head == "sigmoid":
            # (N, decisions, classes, *spatial)
            probabilities = torch.stack([slab.sigmoid(), (-slab).sigmoid()], dim=2)
        else:
            probabilities = slab.softmax(dim=1)[:, None]
        together = _entropy(probabilities.mean(dim=0, keepdim=True))
        shared = together - _entropy(probabilities).mean(dim=0, keepdim=True)
        maps.append((_normalised(shared, len(logits), probabilities.shape[2]), _seen(slab, head)))
    uncertainty, seen = maps[0]
    if len(maps) > 1:
        uncertainty, seen = torch.cat([each for each, _ in maps], dim=2), torch.cat([each for _, each in maps])
    return uncertainty, uncertainty[0, 0][seen].mean().item() if seen.any() else 0.0


def disagreement_map(logits: Tensor, head: Head = "sigmoid") -> tuple[Tensor, Tensor]:
    """Return the map of :func:`disagreement`, up to rounding and faster, and the pixels that count for its number.

    Args:
        logits: one prediction per view, (N, K, \\*spatial).
        head: how logits become probabilities.

    Returns:
        The map (1, 1, \\*spatial), and a mask of the pixels (\\*spatial).
    """
    # an entropy from the logits takes one logarithm, one from the probabilities takes one of each class
    if head == "sigmoid":
        likely = logits.sigmoid()
        own = (functional.softplus(logits) - logits * likely).mean(dim=0, keepdim=True)
        mean = likely.mean(dim=0, keepdim=True)
        shared, classes = _plogp(mean).add_(_plogp(1 - mean)).add_(own).neg_(), 2
    else:
        logarithms = logits.log_softmax(dim=1)
        probabilities = logarithms.exp()
        own = -(probabilities * logarithms).sum(dim=1, keepdim=True).mean(dim=0, keepdim=True)
        together = _plogp(probabilities.mean(dim=0, keepdim=True)).sum(dim=1, keepdim=True)
        shared, classes = together.add_(own).neg_(), logits.shape[1]
    return _normalised(shared, len(logits), classes), _seen(logits, head)


def slabs(logits: Tensor, voxels: int = SLAB) -> tuple[Tensor, ...]:
    """Split logits (N, K, rows, ...) along their rows into views of at most that many voxels of each, at least a row.

    What is computed voxel by voxel then takes little memory besides its result, however large the volume.
    """
    return logits.split(max(voxels // max(math.prod(logits.shape[3:]), 1), 1), dim=2)


def _normalised(shared: Tensor, views: int, classes: int) -> Tensor:
    """Divide the mutual information of each decision (1, decisions, ...) by its largest value; the largest counts."""
    uncertainty = (shared / math.log(min(max(views, 2), classes))).amax(dim=1, keepdim=True)
    return uncertainty.nan_to_num(nan=1.0).clamp(0, 1)


def _seen(logits: Tensor, head: Head) -> Tensor:
    """Return where at least one view (N, K, ...) predicts a structure, or is not finite."""
    check_head(head)
    if head == "softmax" and logits.shape[1] < 2:
        raise ValueError("a softmax head needs at least two channels; use head='sigmoid' for this network")
    each = logits.flatten(0, 1)
    most = each.amax(dim=0)
    found = most > 0 if head == "sigmoid" else (logits[:, 1:].amax(dim=1) > logits[:, 0]).any(dim=0)
    # infinite or no number where any view is not finite
    return found | ~((most - each.amin(dim=0)) < math.inf)


def _plogp(probabilities: Tensor) -> Tensor:
    """Return p log p, which ``entr`` takes several times as long for on a CPU; 0 where p is 0."""
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log_().mul_(probabilities)


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=2)
