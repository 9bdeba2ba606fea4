# SPDX-License-Identifier: Apache-2.0
"""CoTTA: a student learns from its own slow average, and random weights are restored to the source's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mgipt_monai.methods.weight_updates.base import TrainedCopy, WeightAdaptation, load_weights
from mgipt_monai.methods.weight_updates.losses import confidence, cross_entropy, logits_of, probabilities
from mgipt_monai.methods.weight_updates.views import mean_probabilities, scales_and_flips
from mgipt_monai.networks.alignment.norms import AlignedNorms
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.networks.prompts.early_stop import Head
from mgipt_monai.networks.prompts.frequency import check_step

__all__ = ["CoTTA"]


class StudentAndTeacher(TrainedCopy):
    """The student is the trained copy; the teacher is a second copy of the network that follows it."""

    KEYS = (*TrainedCopy.KEYS, "teacher")

    def __init__(self, network: nn.Module, *settings: Any) -> None:
        super().__init__(network, *settings)
        self.teacher = AlignedNorms(copy.deepcopy(network).eval(), settings[1])

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the teacher to ``decay * teacher + (1 - decay) * student``."""
        for name, weight in self.teacher.network.named_parameters():
            weight.lerp_(self.weights[name], 1 - decay)

    @torch.no_grad()
    def restore(self, source: nn.Module, probability: float, generator: torch.Generator) -> float:
        """Restore each number of the student to the source's with this probability; return the share restored."""
        restored = 0
        for name, weight in self.weights.items():
            # drawn on the CPU, so that all devices draw the same
            chosen = torch.rand(weight.shape, generator=generator) < probability
            restored += int(chosen.sum())
            weight.copy_(torch.where(chosen.to(weight.device), source.get_parameter(name), weight))
        return restored / sum(weight.numel() for weight in self.weights.values())

    def state(self) -> dict[str, Any]:
        """Return copies of the student, of its optimiser's moments and of the teacher, on the CPU."""
        teacher = {name: weight.clone().cpu() for name, weight in self.teacher.network.named_parameters()}
        return {**super().state(), "teacher": teacher}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned; raise ValueError if it does not fit."""
        super().load(state)
        load_weights(dict(self.teacher.network.named_parameters()), state["teacher"])


class CoTTA(WeightAdaptation):
    """Continual adaptation of all weights by consistency with a weight-averaged teacher, and stochastic restore.

    Adapts every weight of a copy, the student, with one Adam step per image towards the teacher's probabilities. The
    teacher is the exponential moving average of the students. If the source network (the anchor) is not confident on
    the image (its mean maximum probability is below ``confidence_threshold``), the teacher's probabilities are averaged
    over the image at each of ``scales``, original and flipped; otherwise they come from the image alone. After the step
    a few random numbers of the student are restored to the source's. All three networks normalise with the image's own
    statistics. The prediction is the teacher's, from which the student learnt.

    Keeps student, teacher and Adam's moments between images: four times the network, fitted to the images seen. No
    image is stored, but millions of weights trained on few images can reveal some of them: treat the state as derived
    from patient data. Cost: 5 F if the anchor is confident (anchor, teacher, student, and a backward to all weights at
    2 F); otherwise 4 F plus the 14 views, in 2D by their area another 25 F.

    Source: Wang et al., Continual test-time domain adaptation, CVPR 2022 (arXiv 2203.13591), settings of its
    segmentation experiments.

    Args:
        network: the source network, with batch norm that stores its statistics; it is not changed.
        lr: Adam's learning rate.
        betas: Adam's betas.
        decay: share of the old teacher kept at each image, in [0, 1].
        restore_probability: probability that a number of the student is restored, in [0, 1].
        confidence_threshold: anchor confidence below which views are averaged; 0 never averages, above 1 always. A
            network that is confident in its background stays above the default, and the teacher then predicts much the
            same as the student.
        scales: scale factors of the views; each side stays divisible by its powers of two (up to 32).
        head: ``sigmoid`` (each channel a structure) or ``softmax`` (channel 0 is background).
        aligned_layers: regular expression on the names of the norm layers that use the image's statistics; None: all.
        seed: seeds the restore, with the image index.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a setting out of range, or a network without usable norm layers.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> cotta = CoTTA(network, confidence_threshold=1.1)
        >>> cotta(torch.rand(1, 3, 16, 16)).shape, cotta.last[0]["views"]
        (torch.Size([1, 2, 16, 16]), 14)
    """

    _copy_type = StudentAndTeacher

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float = 6e-5 / 8,
        betas: tuple[float, float] = (0.9, 0.999),
        decay: float = 0.999,
        restore_probability: float = 0.01,
        confidence_threshold: float = 0.69,
        scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
        head: Head = "sigmoid",
        aligned_layers: str | None = None,
        seed: int = 0,
        output: Output | None = None,
    ) -> None:
        betas = check_step(lr, betas)
        for name, value in (("decay", decay), ("restore_probability", restore_probability)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if not confidence_threshold >= 0:
            raise ValueError(f"confidence_threshold must not be negative, got {confidence_threshold}")
        if not scales or not all(0 < scale <= 4 for scale in scales):
            raise ValueError(f"scales must be one or more numbers above 0 and up to 4, got {tuple(scales)}")
        self.lr, self.betas, self.decay, self.scales = lr, betas, decay, tuple(scales)
        self.restore_probability, self.confidence_threshold = restore_probability, confidence_threshold
        super().__init__(network, head=head, aligned_layers=aligned_layers, seed=seed, output=output)

    def _optimizer(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(weights, lr=self.lr, betas=self.betas)

    def _weight_names(self) -> set[str]:
        return {name for name, _ in self.network.named_parameters()}

    def _bound(self) -> None:
        super()._bound()
        self.anchor = AlignedNorms(self.network, self.aligned_layers, route=self.route)

    def _adapt(self, adapted: TrainedCopy, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        assert isinstance(adapted, StudentAndTeacher)  # _copy_type
        self.anchor.forwards = adapted.teacher.forwards = 0
        with torch.no_grad():
            anchor_logits = self.anchor.predict(image, "instance")
            anchor_confidence = confidence(anchor_logits, self.head)
            sure = anchor_confidence >= self.confidence_threshold
            logits, target = self._teach(adapted.teacher, image, anchor_logits.shape[2:], sure)

        loss = cross_entropy(adapted.predict(image), target, self.head).mean()
        adapted.step(adapted.gradients(loss))
        adapted.follow(self.decay)
        generator = torch.Generator().manual_seed(self._image_seed())
        restored = adapted.restore(self.network, self.restore_probability, generator)

        return logits, {
            "loss_before": loss.item(),
            "anchor_confidence": anchor_confidence,
            "views": adapted.teacher.forwards,
            "restored_share": restored,
            "forwards": self.anchor.forwards + adapted.teacher.forwards + adapted.norms.forwards,
        }

    def _teach(
        self, teacher: AlignedNorms, image: Tensor, output_size: Sequence[int], sure: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits and probabilities."""
        if sure:
            logits = teacher.predict(image, "instance")
            return logits, probabilities(logits, self.head)
        views = scales_and_flips(image.shape[2:], output_size, self.scales)
        mean = mean_probabilities(lambda view: teacher.predict(view, "instance"), image, views, self.head)
        return logits_of(mean, self.head), mean
