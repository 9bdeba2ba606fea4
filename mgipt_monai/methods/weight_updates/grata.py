# SPDX-License-Identifier: Apache-2.0
"""GraTa: two label-free losses, with a step size that depends on the agreement of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.networks.utils import one_hot
from monai.transforms import Randomizable
from torch import Tensor, nn

from mgipt_monai.methods.weight_updates.base import TrainedCopy, WeightAdaptation
from mgipt_monai.methods.weight_updates.losses import cross_entropy, entropy
from mgipt_monai.methods.weight_updates.views import mean_probabilities, turns_and_flips
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.networks.prompts.early_stop import Head, PhotometricJitter
from mgipt_monai.networks.prompts.frequency import check_step

__all__ = ["GraTa", "agreement"]


def agreement(cosine: float) -> float:
    """Return the factor of the learning rate for gradients with this cosine: ``(cosine + 1)^2 / 4``."""
    return (cosine + 1) ** 2 / 4


class GraTa(WeightAdaptation):
    """Gradient alignment: the gradient of a consistency loss, taken after an entropy step.

    Adapts the weight and bias of each batch norm, on a copy; the norm layers normalise with the image's own statistics.
    The auxiliary gradient is that of the entropy of the image's prediction. The pseudo gradient is that of the
    consistency (cross-entropy) of a jittered view with the mean prediction over six views (the image, two flips, three
    rotations), at the weights moved by minus the auxiliary gradient: minimising there also aligns the two gradients.
    One Adam step along the pseudo gradient follows, with the learning rate scaled by ``(cos + 1)^2 / 4`` of the angle
    between the two. The prediction is the one after the update.

    Keeps these weights and Adam's moments between images: a few thousand numbers fitted to the images seen, no image.
    Cost: 11 F (six views, two forwards, two backwards of about 1 F each, one prediction).

    Source: Chen et al., Gradient alignment improves test-time adaptation for medical image segmentation, AAAI 2025
    (arXiv 2408.07343).

    Args:
        network: the source network, with batch norm that stores its statistics; it is not changed.
        jitter: transform for the consistency loss: a callable from image to image (1, C, \\*spatial). A MONAI
            ``Randomizable`` is seeded with (seed, image index) for each image. None uses :class:`PhotometricJitter`.
        hard_labels: whether the mean prediction over the views is binarised before the jittered view is compared with
            it. Probabilities pull the weights straight back from the entropy step: the gradients then point in opposite
            directions and the steps almost vanish.
        lr: Adam's learning rate when both gradients agree.
        betas: Adam's betas.
        head: ``sigmoid`` (each channel a structure) or ``softmax`` (channel 0 is background).
        aligned_layers: regular expression on the names of the norm layers to adapt; None adapts all.
        seed: seeds the jitter.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a setting out of range, or a network without usable norm layers; for an image
            of one spatial dimension, which cannot be rotated.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> grata = GraTa(network)
        >>> logits = grata(torch.rand(1, 3, 16, 16))
        >>> grata.last[0]["forwards"] + grata.last[0]["backwards"], 0 <= grata.last[0]["lr"] <= grata.lr
        (11, True)
    """

    def __init__(
        self,
        network: nn.Module,
        jitter: Callable[[Tensor], Tensor] | None = None,
        *,
        hard_labels: bool = True,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        head: Head = "sigmoid",
        aligned_layers: str | None = None,
        seed: int = 0,
        output: Output | None = None,
    ) -> None:
        betas = check_step(lr, betas)
        self.hard_labels, self.lr, self.betas = hard_labels, lr, betas
        self.jitter = PhotometricJitter() if jitter is None else jitter
        super().__init__(network, head=head, aligned_layers=aligned_layers, seed=seed, output=output)

    def _optimizer(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(weights, lr=self.lr, betas=self.betas)

    def _adapt(self, adapted: TrainedCopy, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        if image.ndim < 4:
            raise ValueError(f"GraTa rotates images, which needs two spatial dimensions or more; got {image.ndim - 2}")
        if isinstance(self.jitter, Randomizable):
            self.jitter.set_random_state(seed=self._image_seed())
        with torch.no_grad():
            target = mean_probabilities(adapted.predict, image, turns_and_flips(), self.head)
            if self.hard_labels:
                target = _binarised(target, self.head)

        auxiliary_loss = entropy(adapted.predict(image), self.head).mean()
        auxiliary = adapted.gradients(auxiliary_loss)
        with adapted.moved([-gradient for gradient in auxiliary]):
            pseudo_loss = cross_entropy(adapted.predict(self.jitter(image)), target, self.head).mean()
            pseudo = adapted.gradients(pseudo_loss)

        cosine = cosine_of(auxiliary, pseudo)
        lr = self.lr * agreement(cosine)
        adapted.step(pseudo, lr)
        with torch.no_grad():
            logits = adapted.predict(image)
        return logits, {
            "loss_before": pseudo_loss.item(),
            "entropy_before": auxiliary_loss.item(),
            "cosine": cosine,
            "lr": lr,
        }


def cosine_of(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the cosine of the angle between two gradients of the same weights, in [-1, 1]; 0 if one is zero."""
    first, second = (torch.cat([part.flatten() for part in gradient]) for gradient in (one, other))
    return torch.cosine_similarity(first, second, dim=0).clamp(-1, 1).item()


def _binarised(target: Tensor, head: Head) -> Tensor:
    if head == "sigmoid":
        return (target > 0.5).float()
    return one_hot(target.argmax(dim=1, keepdim=True), num_classes=target.shape[1])
