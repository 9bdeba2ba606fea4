# SPDX-License-Identifier: Apache-2.0
"""InTEnt: predictions with several blends of source and image statistics, integrated by their entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mgipt_monai.methods.base import AdaptationMethod, Prediction
from mgipt_monai.methods.weight_updates.losses import entropy
from mgipt_monai.networks.alignment.layers import NEEDS_BATCH_NORM, find_norm_layers
from mgipt_monai.networks.alignment.norms import AlignedNorms
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.networks.ensemble import disagreement
from mgipt_monai.networks.prompts.early_stop import Head, check_head

__all__ = ["InTEnt"]


class InTEnt(AdaptationMethod):
    """Predictions with several blends of the source's and the image's statistics, integrated by entropy (InTEnt).

    Each prediction has a balanced entropy: the mean of its mean entropies over foreground and background, so that a
    large background does not decide. These are scaled to 0 for the lowest and 1 for the highest of an image, and the
    softmax of their negatives weighs the probabilities. So the most certain prediction counts ``e`` times as much as
    the least certain. Keeps nothing between images. Cost: 1 F for each blend.

    Source: Dong et al., Medical image segmentation with InTEnt: integrated entropy weighting for single image test-time
    adaptation, CVPR 2024 workshops (arXiv 2402.09604), with the weights by entropy balance; the blends and the scaling
    of the entropies are those of the authors' released program. Ours: each structure of a sigmoid head has weights of
    its own (the paper has one structure); a prediction without background has its plain mean entropy, as one without
    foreground has; and each layer blends with the statistics of its own features, as :class:`BatchNormAdaptation` does,
    where that program takes them from one forward with the image's statistics alone.

    Args:
        network: the source network, with batch norm that stores its statistics.
        source_weights: weight of the source's statistics in each blend, in [0, 1].
        aligned_layers: regular expression on the names of the norm layers to adapt; None adapts all.
        head: ``sigmoid`` (each channel a structure) or ``softmax`` (channel 0 is background).
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for weights out of range, or a network without usable norm layers.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> method = InTEnt(network)
        >>> method(torch.rand(1, 3, 16, 16)).shape, method.last[0]["forwards"]
        (torch.Size([1, 2, 16, 16]), 6)
    """

    takes_windows = True
    has_uncertainty = True

    def __init__(
        self,
        network: nn.Module,
        source_weights: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        aligned_layers: str | None = None,
        head: Head = "sigmoid",
        output: Output | None = None,
    ) -> None:
        if not source_weights or not all(0 <= weight <= 1 for weight in source_weights):
            raise ValueError(f"source_weights must be numbers in [0, 1], got {source_weights}")
        check_head(head)
        self.source_weights, self.aligned_layers, self.head = tuple(map(float, source_weights)), aligned_layers, head
        super().__init__(network, output)

    @torch.no_grad()
    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        self.norms.start(image)
        views = []
        for weight in self.source_weights:
            self.norms.source_weight = weight
            # the network as it is, bit for bit, where only the source's statistics count
            views.append(self.norms.predict(image, "source" if weight == 1 else "calibrated"))
        together = torch.cat(views)
        weights = entropy_weights(together, self.head)
        uncertainty, mean = disagreement(together, self.head)
        unadapted = views[self.source_weights.index(1)] if 1 in self.source_weights else None
        source_weight = torch.tensor(self.source_weights, device=weights.device) @ weights.mean(dim=1)
        record = {"source_weight": source_weight.item(), "disagreement": mean}
        cost = {"forwards": self.norms.forwards, "backwards": 0}
        return Prediction(integrate(together, weights, self.head), {**record, **cost}, uncertainty, unadapted)

    def _bound(self) -> None:
        find_norm_layers(self.network, self.aligned_layers, NEEDS_BATCH_NORM)
        self.norms = AlignedNorms(self.network, self.aligned_layers, route=self.route)


def entropy_weights(views: Tensor, head: Head) -> Tensor:
    """Weigh predictions by their balanced entropy.

    Args:
        views: logits of each prediction, (N, K, \\*spatial).
        head: how logits become probabilities.

    Returns:
        Weights (N, K) for a sigmoid head and (N, 1) for a softmax head, with a sum of 1 over the predictions.

    Example:
        >>> certain, unsure = torch.tensor([[[9.0, -9.0]]]), torch.tensor([[[0.1, -0.1]]])
        >>> entropy_weights(torch.cat([certain, unsure]), "sigmoid").flatten()
        tensor([0.7311, 0.2689])
    """
    unsure = entropy(views, head).flatten(2)
    is_structure = views > 0 if head == "sigmoid" else views.argmax(dim=1, keepdim=True) > 0
    parts = torch.stack([is_structure.flatten(2), ~is_structure.flatten(2)])
    counts = parts.sum(dim=-1)
    means = (unsure * parts).sum(dim=-1) / counts.clamp(min=1)
    balanced = torch.where((counts > 0).all(dim=0), means.mean(dim=0), unsure.mean(dim=-1))
    lowest, highest = balanced.amin(dim=0), balanced.amax(dim=0)
    return torch.softmax((lowest - balanced) / (highest - lowest).clamp(min=1e-12), dim=0)


def integrate(views: Tensor, weights: Tensor, head: Head) -> Tensor:
    """Return the logits of the predictions' mean probability, (1, K, \\*spatial), finite however certain they are.

    Args:
        views: logits of each prediction, (N, K, \\*spatial).
        weights: see :func:`entropy_weights`.
        head: how logits become probabilities.

    Example:
        >>> views = torch.tensor([[[0.0, 2.0]], [[0.0, -2.0]]])
        >>> integrate(views, torch.full((2, 1), 0.5), "sigmoid").abs() < 1e-6
        tensor([[[True, True]]])
    """
    share = weights.log().view(*weights.shape, *[1] * (views.ndim - 2))
    if head == "softmax":
        return torch.logsumexp(views.log_softmax(dim=1) + share, dim=0, keepdim=True)
    yes, no = (torch.logsumexp(logsigmoid(signed) + share, dim=0, keepdim=True) for signed in (views, -views))
    return yes - no
