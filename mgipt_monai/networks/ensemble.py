# SPDX-License-Identifier: Apache-2.0
"""Ensemble (Eq. 7): the predictions of the instance prompt and of the global prompts, weighted by their confidence."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

__all__ = ["ConfidenceEnsemble", "MeanEnsemble"]


class ConfidenceEnsemble(nn.Module):
    """Confidence-weighted sum of the logits of several prompted views of one image.

    Per voxel the weights are the confidences (largest softmax value over the channels) divided by their sum, times
    a factor for each kind of prompt. The factors are not normalised, as published: they scale the logits, which leaves
    masks as they are.

    Args:
        instance_factor: factor of the instance prompt's prediction.
        global_factor: factor of each global prompt's prediction.
        one_channel: confidence of a network with a single output channel, whose softmax is constant: ``binary``, the
            probability of the likelier class, or ``constant`` as in the released code.

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

    def forward(self, logits: Tensor, has_instance: bool = True) -> Tensor:
        """Fuse the logits.

        Args:
            logits: one prediction per prompted view, (N, K, \\*spatial).
            has_instance: whether the first prediction is the instance prompt's; the others are global prompts'.

        Returns:
            Fused logits (1, K, \\*spatial).
        """
        confidence = self.confidence(logits)
        factors = torch.full((len(logits),), self.global_factor, dtype=logits.dtype, device=logits.device)
        if has_instance:
            factors[0] = self.instance_factor
        weights = confidence / confidence.sum(dim=0) * factors.view(-1, *[1] * (logits.ndim - 1))
        return (weights * logits).sum(dim=0, keepdim=True)

    def confidence(self, logits: Tensor) -> Tensor:
        """Confidence per voxel, in (0, 1]: (N, K, \\*spatial) to (N, 1, \\*spatial)."""
        if logits.shape[1] > 1 or self.one_channel == "constant":
            return logits.softmax(dim=1).amax(dim=1, keepdim=True)
        return torch.sigmoid(logits.abs())


class MeanEnsemble(nn.Module):
    """Plain mean of the logits of several prompted views: what the confidence weights are held against.

    Example:
        >>> MeanEnsemble()(torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1, 1)).item()
        3.0
    """

    def forward(self, logits: Tensor, has_instance: bool = True) -> Tensor:
        """Fuse logits (N, K, \\*spatial) into (1, K, \\*spatial); the instance prompt's count as any others."""
        return logits.mean(dim=0, keepdim=True)
