# SPDX-License-Identifier: Apache-2.0
"""MGIPT, structured like the paper's overview figure (arXiv 2602.05937).

For each image, in this order: an instance prompt is learnt from scratch and grown while growing helps (AIP, Eq. 3 and
4); the multi-scale global prompts take one step and their teachers follow (MGP, Eq. 5); the prompted views are
predicted with calibrated normalisation (Eq. 6) and fused by their confidence (Eq. 7). Both kinds of prompts multiply
low-frequency amplitudes (Eq. 1) and minimise the alignment loss (Eq. 2) at the frozen network's norm layers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.inferers import Inferer, SimpleInferer
from monai.transforms import Randomizable
from torch import Tensor, nn

from mgipt_monai.methods.base import Prediction
from mgipt_monai.methods.budget import fit
from mgipt_monai.methods.guard import Guard, Guarded
from mgipt_monai.methods.parts import build_part
from mgipt_monai.methods.site_memory import Remembering, SiteMemory
from mgipt_monai.networks.alignment import AlignedNorms, SourceStatistics
from mgipt_monai.networks.alignment.norms import Normalization
from mgipt_monai.networks.alignment.source_statistics import read_statistics
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.networks.ensemble import ConfidenceEnsemble, MeanEnsemble, disagreement
from mgipt_monai.networks.prompts.early_stop import Head, PhotometricJitter, check_head, consistency_score
from mgipt_monai.networks.prompts.frequency import Offset, prompt_offset
from mgipt_monai.networks.prompts.global_prompts import GlobalPrompts
from mgipt_monai.networks.prompts.instance_prompt import InstancePrompt

__all__ = ["MGIPT"]

Tuning = Literal["instance", "released"]


class MGIPT(Remembering):
    """Multi-scale Global-Instance Prompt Tuning (arXiv 2602.05937) around a frozen segmentation network.

    Only the global prompts are kept between images: a few hundred numbers for each of a few sites, no image content.
    Cost with the default sizes: 42 to 58 F (a forward, or a backward to the prompts, is 1 F); a guard adds 1 F.

    Args:
        network: a network with batch norm that stores its statistics, or any network with ``statistics``; it is frozen
            and set to evaluation mode.
        instance_prompt: AIP (Eq. 3 and 4); None builds one from ``lr``, ``steps`` and ``instance_sizes``.
        global_prompts: MGP (Eq. 5); None builds them from ``lr`` and ``global_sizes``.
        ensemble: fuses the predictions (Eq. 7); None uses the published factors.
        jitter: perturbation for the consistency check: a callable from image to image (1, C, \\*spatial). A MONAI
            ``Randomizable`` is seeded with (seed, image index) for each image. None uses :class:`PhotometricJitter`.
        statistics: source statistics to align with, if the network stores none or to replace the stored ones: a
            statistics file or its content, see :func:`measure_source_statistics`. They must belong to the network's
            weights, which is checked at the first image after construction, :meth:`bind` or :meth:`reset`.
        aligned_layers: regular expression on the names of the norm layers to align; None aligns all.
        source_weight: lambda of the calibrated normalisation (Eq. 6), in [0, 1].
        tuning: normalisation while prompts are tuned: ``instance`` as in the paper, or ``released``, which is
            ``instance`` for the first image of a stream and ``calibrated`` afterwards.
        guard: decides for each image whether its adapted prediction is used and whether the global prompts learn from
            it; the method is then wrapped in :class:`mgipt_monai.methods.Guarded`. None always does both.
        memory: keeps the global prompts of several sites apart, so that images from elsewhere do not spoil them:
            ``default``, a :class:`SiteMemory` with other settings, or None to learn from all images alike.
        max_forwards: maximum number of forwards and backwards per image. Parts are left out to meet it, in the order of
            :func:`mgipt_monai.methods.budget.plan`, and listed in the record's ``dropped``. None leaves nothing out.
            For whole images or single slices only, since the number of windows depends on the volume.
        head: ``sigmoid`` (each channel a structure) or ``softmax`` (channel 0 is background).
        seed: seeds the jitter.
        lr: learning rate of both prompts (0.05; 0.01 for polyps).
        steps: steps per size of the instance prompt (7; 6 for polyps).
        instance_sizes: sides of the instance prompt (1, 3, 5); empty leaves it out.
        global_sizes: sides of the global prompts (3, 5, 7); empty leaves them out.
        offset: makes z-scored images start at zero for the prompts (``auto``), see :func:`prompt_offset`.
        prompted_channels: channels of the image that are prompted; None for all. Clicks or guidance should not be.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a setting out of range, or a network without usable norm layers; at the first
            image, for statistics that belong to other weights.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> mgipt = MGIPT(network, steps=2)
        >>> logits = mgipt(torch.rand(1, 3, 32, 32))
        >>> logits.shape, mgipt.last[0]["instance_size"] in (1, 3, 5)
        (torch.Size([1, 2, 32, 32]), True)
    """

    takes_windows = True
    has_uncertainty = True

    def __new__(cls, *args: Any, guard: Guard | None = None, **settings: Any) -> Any:
        """Build the method, wrapped in :class:`Guarded` if there is a guard."""
        if guard is None:
            return super().__new__(cls)
        return Guarded(cls(*args, **settings), guard)

    def __init__(
        self,
        network: nn.Module,
        instance_prompt: InstancePrompt | None = None,
        global_prompts: GlobalPrompts | None = None,
        ensemble: ConfidenceEnsemble | MeanEnsemble | None = None,
        jitter: Callable[[Tensor], Tensor] | None = None,
        *,
        statistics: SourceStatistics | str | os.PathLike[str] | None = None,
        aligned_layers: str | None = None,
        source_weight: float = 0.8,
        tuning: Tuning = "instance",
        guard: Guard | None = None,
        memory: SiteMemory | Literal["default"] | None = "default",
        max_forwards: int | None = None,
        head: Head = "sigmoid",
        seed: int = 0,
        lr: float | None = None,
        steps: int | None = None,
        instance_sizes: Sequence[int] | None = None,
        global_sizes: Sequence[int] | None = None,
        offset: Offset | None = None,
        prompted_channels: Sequence[int] | None = None,
        output: Output | None = None,
    ) -> None:
        if tuning not in get_args(Tuning):
            raise ValueError(f"tuning must be one of {', '.join(get_args(Tuning))}; got {tuning!r}")
        check_head(head)
        self.aligned_layers, self.source_weight = aligned_layers, source_weight
        self.statistics = read_statistics(statistics)
        super().__init__(network, memory, output)
        self.tuning, self.head, self.seed = tuning, head, seed
        shared = {"lr": lr, "offset": offset, "channels": prompted_channels}
        own = {"steps": steps, "sizes": instance_sizes}
        self.instance_prompt = build_part(InstancePrompt, instance_prompt, shared, own)
        self.global_prompts = build_part(GlobalPrompts, global_prompts, shared, own={"sizes": global_sizes})
        if not self.instance_prompt.sizes and not self.global_prompts.sizes:
            raise ValueError("instance_sizes and global_sizes are both empty: nothing would be adapted; use Source")
        self.ensemble = ConfidenceEnsemble() if ensemble is None else ensemble
        self.jitter = PhotometricJitter() if jitter is None else jitter
        self.max_forwards = max_forwards
        self._unlimited = self.instance_prompt, self.global_prompts
        self._dropped: list[str] = []
        self.reserve(0)

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
        """Build the method with all choices of the released code, optic disc/cup setting.

        For polyps (352 x 352): ``lr=0.01, steps=6, global_sizes=(1, 2, 3)``, and the encoder as ``aligned_layers``.
        """
        return cls(
            network,
            InstancePrompt(instance_sizes, steps=steps, lr=lr, offset="none"),
            GlobalPrompts(global_sizes, lr=lr, centred=False, offset="none"),
            ConfidenceEnsemble(one_channel="constant"),
            jitter,
            tuning="released",
            memory=None,
            **settings,
        )

    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        self.norms.start(image)
        self._backwards = 0
        self._seed_jitter()
        self.global_prompts.prepare(image)

        tuning = self.instance_prompt.tune(image, self._loss, lambda prompt: self._consistency(image, prompt))
        if self.global_prompts.sizes:
            self._visit(image)
        global_losses = self.global_prompts.step(image, self._loss)

        with torch.no_grad():
            views = [self.instance_prompt(image)] if self._shows_instance else []
            logits = self.norms.predict(torch.cat([*views, self.global_prompts(image)]), "calibrated")
            has_prompts = self.instance_prompt.sizes or self.global_prompts.sizes  # max_forwards may leave none
            fused = self.ensemble(logits, has_instance=bool(views)) if has_prompts else logits
            uncertainty, mean = disagreement(logits, self.head)

        record = {
            "instance_size": tuning.size,
            "loss_before": tuning.loss_before,
            "loss_after": tuning.loss_after,
            "global_losses": global_losses.tolist(),
            "consistency": tuning.consistency,
            "disagreement": mean,
            "offset": prompt_offset(image, self.instance_prompt.offset)[0].tolist(),
            **self._cost(),
        }
        return Prediction(fused, record, uncertainty)

    def _loss(self, prompted: Tensor) -> Tensor:
        """Return the alignment loss (Eq. 2) of prompted images (N, C, \\*spatial), (N,)."""
        self._backwards += len(prompted) * self.norms.loss_windows
        return self.norms.loss(prompted, self._tuning_normalization("instance"))

    def _consistency(self, image: Tensor, prompt: Callable[[Tensor], Tensor]) -> float:
        """Return how much the prediction under the prompt changes when the image is jittered (Eq. 4)."""
        with torch.no_grad():
            views = torch.cat([prompt(image), prompt(self.instance_prompt.perturbed(image, self.jitter))])
            logits = self.norms.predict_windows(views, self._tuning_normalization("calibrated"))
            return consistency_score(logits[:1], logits[1:], self.head)

    def _tuning_normalization(self, paper: Normalization) -> Normalization:
        """Return the paper's normalisation, or with ``released`` that of the released code."""
        if self.tuning == "instance":
            return paper
        return "instance" if self.images_seen == 0 else "calibrated"

    def _seed_jitter(self) -> None:
        if isinstance(self.jitter, Randomizable):
            seed = np.random.SeedSequence((self.seed, self.images_seen)).generate_state(1)[0]
            self.jitter.set_random_state(seed=int(seed))

    @property
    def _shows_instance(self) -> bool:
        """Whether one view is that of the instance prompt or, without any prompt, the unprompted image."""
        return bool(self.instance_prompt.sizes) or not self.global_prompts.sizes

    def reserve(self, forwards: int) -> None:
        """Reserve additional forwards within ``max_forwards``; ValueError if that leaves none for the prediction."""
        if self.max_forwards is not None:
            self.instance_prompt, self.global_prompts, self._dropped = fit(
                self.max_forwards, *self._unlimited, guarded=forwards > 0
            )

    def predict_through(self, inferer: Inferer, windows: int = 2) -> None:
        """Run the network through an inferer from now on; ValueError with ``max_forwards`` if it uses windows."""
        if self.max_forwards is not None and not isinstance(inferer, SimpleInferer):
            raise ValueError(
                f"max_forwards={self.max_forwards} cannot be guaranteed with a {type(inferer).__name__}, whose number "
                "of windows depends on the image: set max_forwards to None, or use a SimpleInferer"
            )
        super().predict_through(inferer, windows)

    def prompt_maps(self) -> dict[str, Tensor]:
        """Return the global prompts' teachers, by their sides."""
        teachers = self.global_prompts.adaptation_state()["teachers"]
        place = "" if self.global_prompts.centred else ", one step off centre"
        return {" x ".join(map(str, teacher.shape[2:])) + place: teacher[0] for teacher in teachers}

    def adapted_input(self, image: Tensor) -> Tensor:
        """Return the latest image with its instance prompt or, without one, with the smallest global prompt."""
        with torch.no_grad():
            return self.instance_prompt(image) if self._shows_instance else self.global_prompts(image)[:1]

    def signals(self, record: dict[str, Any]) -> dict[str, float]:
        """Return how far the prompts are from 1, and how tuning changed the loss and the consistency."""
        drift = self.global_prompts.largest_change
        signals = {"prompt": drift, "drift": drift}
        if self.instance_prompt.sizes:
            signals["prompt"] = max(drift, self.instance_prompt.largest_change)
            signals["loss_drop"] = 1 - record["loss_after"] / max(record["loss_before"], 1e-12)
        if record["consistency"]:
            signals["inconsistency"] = record["consistency"][record["instance_size"]]
        return signals

    @property
    def averaged(self) -> tuple[str, ...]:
        """Students and teachers: if only the teachers were averaged, they would jump back to their own students."""
        return ("students", "teachers") if self.global_prompts.sizes else ()

    def source_norms(self) -> AlignedNorms:
        """Return the norm layers that the prompts are tuned with."""
        return self.norms

    def _cost(self) -> dict[str, int]:
        return {"forwards": self.norms.forwards, "backwards": self._backwards}

    def _state_record(self) -> dict[str, Any]:
        norm = math.hypot(*[(teacher - 1).norm().item() for teacher in self.global_prompts.teachers])
        dropped = {} if self.max_forwards is None else {"dropped": self._dropped}
        return {**super()._state_record(), "prompt_norm": norm, **dropped}

    def _bound(self) -> None:
        self.norms = AlignedNorms(self.network, self.aligned_layers, self.source_weight, self.statistics, self.route)

    def _reset(self) -> None:
        super()._reset()
        self.instance_prompt.reset()
        self.global_prompts.reset()

    def _learnt(self) -> dict[str, Any]:
        return self.global_prompts.adaptation_state()

    def _load_learnt(self, learnt: dict[str, Any]) -> None:
        self.global_prompts.load_adaptation_state(learnt)
