# SPDX-License-Identifier: Apache-2.0
"""SAR: entropy minimisation that ignores unreliable pixels, seeks flat minima, and recovers from collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mgipt_monai.methods.weight_updates.base import TrainedCopy, WeightAdaptation
from mgipt_monai.methods.weight_updates.losses import class_count, entropy
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.networks.prompts.early_stop import Head
from mgipt_monai.networks.prompts.frequency import check_step
from mgipt_monai.utils.state_checks import check_number

__all__ = ["SAR"]

AVERAGE_DECAY = 0.9


class SAR(WeightAdaptation):
    """Sharpness-aware and reliable entropy minimisation, with model recovery.

    Adapts the weight and bias of each batch norm, on a copy; the norm layers normalise with the image's own statistics.
    The paper filters images; here the filter acts per pixel (per pixel and channel for a sigmoid head), and keeps those
    whose entropy is below ``margin`` times the largest possible one. The step follows the gradient at the weights that
    SAM reaches by moving ``rho`` uphill, over the pixels that are reliable at both points. When the moving average of
    that loss falls below ``recovery_threshold``, the copy, its optimiser and the average are reset. An image without a
    reliable pixel changes nothing. The prediction is the one before the update.

    Keeps these weights, their momentum and the average between images: a few thousand numbers fitted to the images
    seen, no image. Cost: 4 F (two forwards, two backwards of about 1 F each); 1 F where no pixel is reliable.

    Source: Niu et al., Towards stable test-time adaptation in dynamic wild world, ICLR 2023 (arXiv 2302.12400).

    Args:
        network: the source network, with batch norm that stores its statistics; it is not changed.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        rho: length of SAM's step uphill.
        margin: share of the largest entropy (ln 2 for a sigmoid head, ln C for C softmax channels) up to which a pixel
            is reliable.
        recovery_threshold: e_m, as a share of the largest entropy; 0 never recovers. The paper's 0.2 nats are for 1,000
            classes, where they are 0.029 of ln 1,000. Used unchanged, a two-class network that is confident on most
            pixels would recover after every image and predict like :class:`BatchNormAdaptation`.
        head: ``sigmoid`` (each channel a structure) or ``softmax`` (channel 0 is background).
        aligned_layers: regular expression on the names of the norm layers to adapt; None adapts all.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a setting out of range, or a network without usable norm layers.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> sar = SAR(network)
        >>> logits = sar(torch.rand(1, 3, 16, 16))
        >>> 0 <= sar.last[0]["reliable_share"] <= 1
        True
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float = 2.5e-4,
        momentum: float = 0.9,
        rho: float = 0.05,
        margin: float = 0.4,
        recovery_threshold: float = 0.029,
        head: Head = "sigmoid",
        aligned_layers: str | None = None,
        output: Output | None = None,
    ) -> None:
        check_step(lr, (0, 0))
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not 0 < margin <= 1:
            raise ValueError(f"margin must be in (0, 1], got {margin}")
        for name, value in (("rho", rho), ("recovery_threshold", recovery_threshold)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.lr, self.momentum, self.rho, self.margin = lr, momentum, rho, margin
        self.recovery_threshold = recovery_threshold
        self._average: float | None = None
        super().__init__(network, head=head, aligned_layers=aligned_layers, output=output)

    def _optimizer(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(weights, lr=self.lr, momentum=self.momentum)

    def _adapt(self, adapted: TrainedCopy, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits = adapted.predict(image)
        entropies = entropy(logits, self.head)
        largest = math.log(class_count(logits, self.head))
        limit = self.margin * largest
        reliable = entropies.detach() < limit
        record = {
            "loss_before": None,
            "reliable_share": reliable.float().mean().item(),
            "loss_average": self._average,
            "recovered": False,
        }
        if not reliable.any():
            return logits, record
        loss = _mean(entropies, reliable)
        record["loss_before"] = loss.item()
        with adapted.moved(uphill(adapted.gradients(loss), self.rho)):
            entropies = entropy(adapted.predict(image), self.head)
            reliable &= entropies.detach() < limit
            if not reliable.any():
                return logits, record
            loss = _mean(entropies, reliable)
            gradients = adapted.gradients(loss)
        adapted.step(gradients)
        average = record["loss_average"] = self._follow(loss.item())
        if average < self.recovery_threshold * largest:
            self._reset()
            record["recovered"] = True
        return logits, record

    def _follow(self, loss: float) -> float:
        self._average = loss if self._average is None else AVERAGE_DECAY * self._average + (1 - AVERAGE_DECAY) * loss
        return self._average

    def _reset(self) -> None:
        super()._reset()
        self._average = None

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "loss_average": self._average}

    def _load_state(self, state: dict[str, Any]) -> None:
        average = state["loss_average"]
        if average is not None:
            check_number("loss_average", average)
        super()._load_state(state)
        self._average = average


def uphill(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Return SAM's step: along the joint gradient of all weights, of length ``rho`` (0 if the gradient is zero)."""
    length = torch.stack([gradient.norm() for gradient in gradients]).norm()
    return [gradient * (rho / (length + 1e-12)) for gradient in gradients]


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    # not by indexing, whose backward is not deterministic on a GPU
    return (values * chosen).sum() / chosen.sum()
