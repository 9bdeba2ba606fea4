# SPDX-License-Identifier: Apache-2.0
"""MGIPT: the paper's overview figure as code."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.transforms import Randomizable
from torch import Tensor, nn

from mgipt_monai.methods.base import build_part
from mgipt_monai.methods.guard.guard import Guard
from mgipt_monai.methods.guard.guarded import GuardedMethod
from mgipt_monai.networks.alignment.norms import AlignedNorms
from mgipt_monai.networks.alignment.source_statistics import SourceStatistics, read_statistics
from mgipt_monai.networks.ensemble import ConfidenceEnsemble, MeanEnsemble
from mgipt_monai.networks.prompts.early_stop import Head, PhotometricJitter, check_head, consistency_score
from mgipt_monai.networks.prompts.global_prompts import GlobalPrompts
from mgipt_monai.networks.prompts.instance_prompt import InstancePrompt

__all__ = ["MGIPT"]

Tuning = Literal["instance", "calibrated", "source", "released"]


class MGIPT(GuardedMethod):
    """Multi-scale Global-Instance Prompt Tuning (arXiv 2602.05937) around a frozen segmentation network.

    For each image, the global prompts take one step, an instance prompt is learnt from scratch and grown while growing
    helps, and the four prompted views are predicted and fused. Only the global prompts last: a few hundred numbers,
    nothing of an image. Cost with the default sizes: 42 to 58 F (F is one forward of the network; a backward to the
    prompts counts as one more); a guard adds 1 F.

    Args:
        network: any network with batch norm that stores its statistics, or any at all with ``statistics``; frozen, in
            evaluation mode.
        instance_prompt: AIP (Eq. 3 and 4); None builds one from ``lr``, ``steps`` and ``instance_sizes``.
        global_prompts: MGP (Eq. 5); None builds them from ``lr`` and ``global_sizes``.
        ensemble: fuses the predictions (Eq. 7); None takes the published factors.
        jitter: the view of the consistency check: a callable from image to image (1, C, \\*spatial). A MONAI
            ``Randomizable`` is seeded with (seed, image index) for each image. None takes :class:`PhotometricJitter`.
        statistics: what to align with where the network stores no statistics, or instead of them: a statistics file or
            its content, see :func:`measure_source_statistics`. That it belongs to the network's weights is checked at
            the first image after construction, :meth:`bind` or :meth:`reset`, not at each.
        aligned_layers: regular expression on the names of the norm layers to align; None aligns all.
        source_weight: lambda of the calibrated normalisation (Eq. 6), in [0, 1].
        tuning: how the network normalises while prompts are tuned. ``instance`` is the paper's; ``released`` is
            ``instance`` for the first image of a stream and ``calibrated`` from then on.
        guard: decides for each image whether its adapted prediction is used and whether the global prompts learn from
            it, see :class:`mgipt_monai.networks.Guard`; None always does both. With it an image costs 1 F more.
        max_forwards: forwards and backwards that an image may cost at most; parts are left out to meet it, in the order
            of :func:`mgipt_monai.methods.budget.plan`, and the record says which. None leaves nothing out. For whole
            images or single slices only: the windows of a volume are not known before it.
        head: ``sigmoid`` (each channel a structure) or ``softmax`` (channel 0 is background).
        seed: seeds the jitter.
        lr: learning rate of both prompts (0.05; 0.01 for polyps).
        steps: steps per size of the instance prompt (7; 6 for polyps).
        instance_sizes: sides of the instance prompt (1, 3, 5); empty leaves it out.
        global_sizes: sides of the global prompts (3, 5, 7); empty leaves them out.

    Raises:
        ValueError: at construction, for a setting out of range, or a network without usable norm layers; at the first
            image, for a statistics file of other weights.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> mgipt = MGIPT(network, steps=2)
        >>> logits = mgipt(torch.rand(1, 3, 32, 32))
        >>> logits.shape, mgipt.last[0]["instance_size"] in (1, 3, 5)
        (torch.Size([1, 2, 32, 32]), True)
    """

    takes_windows = True

    def __init__(
        self,
        network: nn.Module,
        instance_prompt: InstancePrompt | None = None,
        global_prompts: GlobalPrompts | None = None,
        ensemble: ConfidenceEnsemble | MeanEnsemble | None = None,
        jitter: Callable[[Tensor], Tensor] | None = None,
        *,
        statistics: SourceStatistics | str | os.PathLike | None = None,
        aligned_layers: str | None = None,
        source_weight: float = 0.8,
        tuning: Tuning = "instance",
        guard: Guard | None = None,
        max_forwards: int | None = None,
        head: Head = "sigmoid",
        seed: int = 0,
        lr: float | None = None,
        steps: int | None = None,
        instance_sizes: Sequence[int] | None = None,
        global_sizes: Sequence[int] | None = None,
    ) -> None:
        if tuning not in get_args(Tuning):
            raise ValueError(f"tuning must be one of {', '.join(get_args(Tuning))}; got {tuning!r}")
        check_head(head)
        self.aligned_layers, self.source_weight = aligned_layers, source_weight
        self.statistics = read_statistics(statistics)
        super().__init__(network)
        self.tuning, self.head, self.seed, self.guard = tuning, head, seed, guard
        self.instance_prompt = build_part(
            InstancePrompt, instance_prompt, shared={"lr": lr}, own={"steps": steps, "sizes": instance_sizes}
        )
        self.global_prompts = build_part(GlobalPrompts, global_prompts, shared={"lr": lr}, own={"sizes": global_sizes})
        if not self.instance_prompt.sizes and not self.global_prompts.sizes:
            raise ValueError("instance_sizes and global_sizes are both empty: nothing would be adapted; use Source")
        if max_forwards is not None:
            self._spend(max_forwards)
        self.ensemble = ConfidenceEnsemble() if ensemble is None else ensemble
        self.jitter = PhotometricJitter() if jitter is None else jitter

    @classmethod
    def released(
        cls,
        network: nn.Module,
        *,
        jitter: Callable[[Tensor], Tensor] | None = None,
        lr: float = 0.05,
        steps: int = 7,
        instance_sizes: Sequence[int] = (1, 3, 5),
        global_sizes: Sequence[int] = (3, 5, 7),
        **settings: Any,
    ) -> MGIPT:
        """Build the method with every choice as in the released code, optic disc/cup setting.

        For polyps (352 x 352): ``lr=0.01, steps=6, global_sizes=(1, 2, 3)`` and the encoder's name pattern as
        ``aligned_layers``. Other settings as for the class.
        """
        return cls(
            network,
            InstancePrompt(instance_sizes, steps=steps, lr=lr),
            GlobalPrompts(global_sizes, lr=lr, centred=False),
            ConfidenceEnsemble(one_channel="constant"),
            jitter,
            tuning="released",
            **settings,
        )

    def _adapt(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        if isinstance(self.jitter, Randomizable):
            seed = np.random.SeedSequence((self.seed, self.images_seen)).generate_state(1)[0]
            self.jitter.set_random_state(seed=int(seed))

        global_losses = self.global_prompts.step(image, self._loss)
        tuning = self.instance_prompt.tune(image, self._loss, lambda prompt: self._consistency(image, prompt))

        with torch.no_grad():
            views = [self.instance_prompt(image)] if self._shows_instance else []
            logits = self.norms.predict(torch.cat([*views, self.global_prompts(image)]), "calibrated")
            # a budget may leave no prompt: then there is nothing to fuse
            prompted = self.instance_prompt.sizes or self.global_prompts.sizes
            fused = self.ensemble(logits, has_instance=bool(views)) if prompted else logits

        return fused, {
            "instance_size": tuning.size,
            "loss_before": tuning.loss_before,
            "loss_after": tuning.loss_after,
            "global_losses": global_losses.tolist(),
            "consistency": tuning.consistency,
            "disagreement": self._disagreement(logits),
            "forwards": self.norms.forwards,
            "backwards": self._backwards,
        }

    def _tuning_normalization(self) -> str:
        if self.tuning == "released":
            return "instance" if self.images_seen == 0 else "calibrated"
        return self.tuning

    def _loss(self, prompted: Tensor) -> Tensor:
        self._backwards += len(prompted) * self.norms.windows.count
        return self.norms.loss(prompted, self._tuning_normalization())

    def _consistency(self, image: Tensor, prompt: Callable[[Tensor], Tensor]) -> float:
        normalization = self._tuning_normalization() if self.tuning == "released" else "calibrated"
        with torch.no_grad():
            views = torch.cat([prompt(image), prompt(self.jitter(image))])
            logits, jittered_logits = self.norms.predict_windows(views, normalization).split(1)
            return consistency_score(logits, jittered_logits, self.head)

    def _bound(self) -> None:
        self.norms = AlignedNorms(self.network, self.aligned_layers, self.source_weight, self.statistics, self.route)
