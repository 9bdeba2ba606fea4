# SPDX-License-Identifier: Apache-2.0
"""Label-free losses of a prediction: its entropy, and its distance from another prediction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mgipt_monai.networks.prompts.early_stop import Head

__all__ = ["class_count", "confidence", "cross_entropy", "entropy", "logits_of", "probabilities"]


def probabilities(logits: Tensor, head: Head) -> Tensor:
    """Turn logits (B, K, \\*spatial) into probabilities of the same shape.

    Raises:
        ValueError: for a softmax head with one channel.
    """
    if head == "sigmoid":
        return logits.sigmoid()
    if logits.shape[1] < 2:
        raise ValueError("a softmax head needs at least two channels; use head='sigmoid' for this network")
    return logits.softmax(dim=1)


def logits_of(probability: Tensor, head: Head) -> Tensor:
    """Turn probabilities back into logits, finite where a probability is 0 or 1."""
    return torch.logit(probability, eps=1e-6) if head == "sigmoid" else probability.clamp_min(1e-6).log()


def cross_entropy(logits: Tensor, target: Tensor, head: Head) -> Tensor:
    """Cross-entropy of a prediction with soft labels, in nats, per decision.

    Args:
        logits: (B, K, \\*spatial).
        target: probabilities of the same shape.
        head: a sigmoid head decides for each channel, a softmax head once per pixel.

    Returns:
        (B, K, \\*spatial) for a sigmoid head, (B, 1, \\*spatial) for a softmax head.
    """
    if head == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return -(target * logits.log_softmax(dim=1)).sum(dim=1, keepdim=True)


def entropy(logits: Tensor, head: Head) -> Tensor:
    """Entropy in nats: binary for each channel of a sigmoid head, categorical for each pixel of a softmax head.

    Args:
        logits: (B, K, \\*spatial).
        head: how logits become probabilities.

    Returns:
        (B, K, \\*spatial) for a sigmoid head, (B, 1, \\*spatial) for a softmax head; at most ln(:func:`class_count`).

    Example:
        >>> entropy(torch.zeros(1, 1, 2), "sigmoid")  # ln 2
        tensor([[[0.6931, 0.6931]]])
    """
    return cross_entropy(logits, probabilities(logits, head), head)


def class_count(logits: Tensor, head: Head) -> int:
    """Return the number of classes per decision: two for a sigmoid head, the number of channels for a softmax head."""
    return 2 if head == "sigmoid" else logits.shape[1]


def confidence(logits: Tensor, head: Head) -> float:
    """Probability of the most likely class, mean over all decisions."""
    likely = probabilities(logits, head)
    if head == "sigmoid":
        return float(torch.maximum(likely, 1 - likely).mean())
    return float(likely.amax(dim=1).mean())
