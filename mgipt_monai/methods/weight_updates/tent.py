# SPDX-License-Identifier: Apache-2.0
"""TENT: entropy minimisation, which makes the network more confident."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mgipt_monai.methods.weight_updates.base import TrainedCopy, WeightAdaptation
from mgipt_monai.methods.weight_updates.losses import entropy
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.networks.prompts.early_stop import Head
from mgipt_monai.networks.prompts.frequency import check_step

__all__ = ["Tent"]


class Tent(WeightAdaptation):
    """Entropy minimisation over the affine weights of the norm layers, one Adam step per image.

    Adapts the weight and bias of each batch norm, on a copy; the norm layers normalise with the image's own statistics.
    The entropy is binary per channel for a sigmoid head and categorical for a softmax head, mean over all pixels. The
    prediction is the one before the update, as in the authors' code: it needs no additional forward, and an image's
    step takes effect from the next image on.

    Keeps these weights and Adam's moments between images: a few thousand numbers fitted to the images seen, no image.
    Cost: 2 F (one forward, and one backward of about 1 F, since convolutions need no weight gradient).

    Source: Wang et al., Tent: Fully test-time adaptation by entropy minimization, ICLR 2021 (arXiv 2006.10726).

    Args:
        network: the source network, with batch norm that stores its statistics; it is not changed.
        lr: Adam's learning rate.
        betas: Adam's betas.
        head: ``sigmoid`` (each channel a structure) or ``softmax`` (channel 0 is background).
        aligned_layers: regular expression on the names of the norm layers to adapt; None adapts all.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a setting out of range, or a network without usable norm layers.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> tent = Tent(network)
        >>> tent(torch.rand(1, 3, 16, 16)).shape, tent.last[0]["backwards"]
        (torch.Size([1, 2, 16, 16]), 1)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        head: Head = "sigmoid",
        aligned_layers: str | None = None,
        output: Output | None = None,
    ) -> None:
        betas = check_step(lr, betas)
        self.lr, self.betas = lr, betas
        super().__init__(network, head=head, aligned_layers=aligned_layers, output=output)

    def _optimizer(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(weights, lr=self.lr, betas=self.betas)

    def _adapt(self, adapted: TrainedCopy, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits = adapted.predict(image)
        loss = entropy(logits, self.head).mean()
        adapted.step(adapted.gradients(loss))
        return logits, {"loss_before": loss.item()}
