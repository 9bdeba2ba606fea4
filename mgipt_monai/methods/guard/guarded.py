# SPDX-License-Identifier: Apache-2.0
"""What surrounds MGIPT's adaptation to an image: a guard that may overrule it, and what lasts between images."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor

from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.methods.budget import fit
from mgipt_monai.methods.guard.guard import Guard
from mgipt_monai.networks.alignment.norms import AlignedNorms
from mgipt_monai.networks.ensemble import disagreement
from mgipt_monai.networks.prompts.early_stop import Head, binarize, consistency_score
from mgipt_monai.networks.prompts.global_prompts import GlobalPrompts
from mgipt_monai.networks.prompts.instance_prompt import InstancePrompt

__all__ = ["GuardedMethod", "area_change"]

SMALL_SHARE = 1e-4


class GuardedMethod(AdaptationMethod):
    """A method with an instance prompt and global prompts, which a guard may overrule.

    With a guard each image is also predicted without adaptation, which costs 1 F more, in the network's own
    normalisation and through the same windows. What the guard saw and said is in the image's record: ``decision``
    (``adapted`` or ``unadapted``), ``learned``, ``reasons`` and ``signals``. Each record also has ``prompt_norm``, the
    Euclidean distance of the global prompts from ones after the image, and, with a limit of cost, ``dropped``.

    Attributes:
        uncertainty: where the views of the latest call's images disagreed, (B, 1, \\*spatial) in [0, 1], see
            :func:`mgipt_monai.networks.ensemble`; also where the guard fell back. None before the first call,
            after one that failed and after ``reset``. It is replaced by the next call and never saved.
    """

    norms: AlignedNorms
    instance_prompt: InstancePrompt
    global_prompts: GlobalPrompts
    guard: Guard | None
    head: Head
    max_forwards: int | None = None
    uncertainty: Tensor | None = None
    _backwards: int
    _dropped: list[str]

    def predict_through(self, inferer: Inferer, windows: int = 2) -> None:
        """Run the network through an inferer from now on (see :class:`AdaptationMethod`).

        Raises:
            ValueError: with ``max_forwards``, for an inferer of windows.
        """
        if self.max_forwards is not None and not isinstance(inferer, SimpleInferer):
            raise ValueError(
                f"max_forwards={self.max_forwards} cannot be kept through a {type(inferer).__name__}, whose windows "
                "depend on the image: set max_forwards to None, or use a SimpleInferer"
            )
        super().predict_through(inferer, windows)

    def _spend(self, max_forwards: int) -> None:
        """Leave out what ``max_forwards`` does not allow."""
        self.instance_prompt, self.global_prompts, self._dropped = fit(
            max_forwards, self.instance_prompt, self.global_prompts, self.guard is not None
        )
        self.max_forwards = max_forwards

    def forward(self, image: Tensor) -> Tensor:
        """Adapt to each image, then predict it, and keep where the views disagreed; see the base class."""
        self.uncertainty, self._maps = None, []
        try:
            logits = super().forward(image)
            self.uncertainty = torch.cat(self._maps)
        finally:
            self._maps = []
        return logits

    @abstractmethod
    def _adapt(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Adapt to one image (1, C, \\*spatial), unguarded; return its logits and the record of what was done."""

    def _adapt_and_predict(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        self.norms.start(image)
        self._backwards = 0
        logits, record = self._adapt(image) if self.guard is None else self._adapt_guarded(image, self.guard)
        teachers = [teacher - 1 for teacher in self.global_prompts.teachers]
        record["prompt_norm"] = math.hypot(*(teacher.norm().item() for teacher in teachers))
        if self.max_forwards is not None:
            record["dropped"] = self._dropped
        return logits, record

    def _adapt_guarded(self, image: Tensor, guard: Guard) -> tuple[Tensor, dict[str, Any]]:
        before = self.global_prompts.adaptation_state()
        with torch.no_grad():
            unadapted, loss = self.norms.predict_and_measure(image)
        if not (torch.isfinite(unadapted).all() and math.isfinite(loss)):
            raise ValueError("the unadapted prediction or its loss is not finite: check the network's weights")
        try:
            adapted, record = self._adapt(image)
        except FloatingPointError:
            # a tuning step was not finite: the same as a prediction that is not
            adapted = torch.full_like(unadapted, torch.nan)
            mean = self._disagreement(adapted)
            record = {"disagreement": mean, "forwards": self.norms.forwards, "backwards": self._backwards}
        signals = {**guard.compare(loss), **self._signals(adapted, unadapted, record)}
        verdict = guard.judge(signals)
        guard.settle(verdict, signals, self.global_prompts, before)
        return adapted if verdict.accept else unadapted, {
            **record,
            "decision": "adapted" if verdict.accept else "unadapted",
            "learned": verdict.learn,
            "reasons": verdict.reasons,
            "signals": signals,
        }

    def _disagreement(self, logits: Tensor) -> float:
        """Keep the map of where the views (N, K, \\*spatial) of an image disagree, and return the image's number."""
        uncertainty, mean = disagreement(logits, self.head)
        self._maps.append(uncertainty)
        return mean

    def _signals(self, adapted: Tensor, unadapted: Tensor, record: dict[str, Any]) -> dict[str, float]:
        if not torch.isfinite(adapted).all():
            return {"finite": 0.0}
        drift = _farthest_from_one(self.global_prompts.teachers)
        signals = {
            "finite": 1.0,
            "agreement": 1 - consistency_score(adapted, unadapted, self.head),
            "area_change": area_change(binarize(adapted, self.head), binarize(unadapted, self.head)),
            "prompt": drift,
            "drift": drift,
        }
        if self.instance_prompt.sizes:
            signals["prompt"] = max(drift, _farthest_from_one([self.instance_prompt.amplitude]))
            signals["loss_drop"] = 1 - record["loss_after"] / max(record["loss_before"], 1e-12)
        if record["consistency"]:
            signals["inconsistency"] = record["consistency"][record["instance_size"]]
        return signals

    def prompt_maps(self) -> dict[str, Tensor]:
        """Return the global prompts' teachers, by their sides."""
        teachers = self.global_prompts.adaptation_state()["teachers"]
        place = "" if self.global_prompts.centred else ", one step off centre"
        return {" x ".join(map(str, teacher.shape[2:])) + place: teacher[0] for teacher in teachers}

    @property
    def averaged(self) -> tuple[str, ...]:
        """The global prompts: students hold what was learnt, and teachers averaged alone would jump back to theirs."""
        return ("students", "teachers") if self.global_prompts.sizes else ()

    def adapted_input(self, image: Tensor) -> Tensor:
        """Return the latest image under its instance prompt, or, without one, under the smallest global prompt.

        Where the guard fell back to the unadapted prediction it is the image as it is.
        """
        if self.last and self.last[-1].get("decision") == "unadapted":
            return image
        with torch.no_grad():
            return self.instance_prompt(image) if self._shows_instance else self.global_prompts(image)[:1]

    @property
    def _shows_instance(self) -> bool:
        """Whether one view is that of the instance prompt, or, without any prompt, the image as it is."""
        return bool(self.instance_prompt.sizes) or not self.global_prompts.sizes

    def _reset(self) -> None:
        self.uncertainty = None
        self.instance_prompt.reset()
        self.global_prompts.reset()
        if self.guard is not None:
            self.guard.reset()

    def _state(self) -> dict[str, Any]:
        prompts = self.global_prompts.adaptation_state()
        return prompts if self.guard is None else {**prompts, "guard": self.guard.adaptation_state()}

    def _load_state(self, state: dict[str, Any]) -> None:
        self.global_prompts.check_adaptation_state(state)
        if self.guard is not None:
            self.guard.load_adaptation_state(state["guard"], self.global_prompts)
        self.global_prompts.load_adaptation_state(state)


def area_change(masks: Tensor, others: Tensor) -> float:
    """Return the largest ratio, at least 1, between the areas of a class in two predictions of one image.

    A ten-thousandth of the image is added to either area: a class that becomes empty, or appears from nothing, gives a
    large ratio, and a few voxels of a class that is hardly there do not.

    Args:
        masks: of 0 and 1, (1, K, \\*spatial).
        others: same shape.

    Example:
        >>> whole, half = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
        >>> half[:, :, 4:] = 0
        >>> round(area_change(whole, half), 2)
        2.0
    """
    one, other = (each.flatten(2).mean(dim=2) + SMALL_SHARE for each in (masks, others))
    return torch.maximum(one / other, other / one).max().item()


def _farthest_from_one(prompts: Sequence[Tensor]) -> float:
    return max(((prompt - 1).abs().max().item() for prompt in prompts), default=0.0)
