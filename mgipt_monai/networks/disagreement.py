# SPDX-License-Identifier: Apache-2.0
"""How much the prompted views of one image disagree: an uncertainty that costs no forward of the network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .early_stop import Head, binarize

__all__ = ["disagreement"]


def disagreement(logits: Tensor, head: Head = "sigmoid") -> tuple[Tensor, float]:
    """Measure how much several views disagree, for each pixel and in one number for the image.

    Per pixel it is the mutual information between the class and the view: the entropy of the views' mean probability
    less the mean of their entropies, over the largest value it can have. 0 where all views say the same, however unsure
    they are; 1 where they are sure and split evenly among as many classes as they can. A sigmoid head decides for each
    structure, and the structure with the largest value counts. Each view has one vote, whatever its factor in the
    ensemble. A pixel where a view is not finite counts as 1.

    The image's number is the mean over the pixels where at least one view sees a structure; 0 where no view sees any.
    A mean over all pixels would mostly tell how large the background is, which all views agree on. For two sure views
    of one structure the number is one minus the intersection over union of their masks.

    Source: the mutual information of Bayesian active learning by disagreement (Houlsby et al., arXiv 1112.5745), here
    with the views as the members.

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
    structures = binarize(logits, head)
    # (N, decisions, classes, *spatial)
    if head == "sigmoid":
        probabilities = torch.stack([logits.sigmoid(), (-logits).sigmoid()], dim=2)
    else:
        probabilities = logits.softmax(dim=1)[:, None]
    largest = math.log(min(max(len(logits), 2), probabilities.shape[2]))
    together = _entropy(probabilities.mean(dim=0, keepdim=True))
    shared = (together - _entropy(probabilities).mean(dim=0, keepdim=True)) / largest
    uncertainty = shared.amax(dim=1, keepdim=True).nan_to_num(nan=1.0).clamp(0, 1)

    seen = (structures > 0).any(dim=1).any(dim=0) | ~torch.isfinite(logits).all(dim=1).all(dim=0)
    return uncertainty, uncertainty[0, 0][seen].mean().item() if seen.any() else 0.0


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=2)
