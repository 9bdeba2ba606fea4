# SPDX-License-Identifier: Apache-2.0
"""Every candidate for a site, measured on labelled images that its fit did not see."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from monai.metrics import compute_dice, compute_surface_dice
from torch import Tensor, nn

from mgipt_monai.commissioning.correctors import (
    best_offsets,
    curves_of,
    fit_norms,
    fit_offset,
    fit_prompts,
    fit_temperature,
)
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.methods.commissioned import Commissioned, SiteSetting, monitored
from mgipt_monai.methods.source import Source
from mgipt_monai.metrics import expected_dice
from mgipt_monai.networks.correction import Correction
from mgipt_monai.networks.prompts.early_stop import Head, binarize
from mgipt_monai.utils.files import root_cause
from mgipt_monai.utils.provenance import fingerprint
from mgipt_monai.utils.state_checks import check_image

__all__ = [
    "BASES",
    "CANDIDATES",
    "CORRECTORS",
    "NOTHING",
    "Candidate",
    "Case",
    "Metric",
    "Trial",
    "build_base",
    "read_cases",
]

logger = logging.getLogger(__name__)

BASES: dict[str, dict[str, Any]] = {
    "none": {"_target_": "mgipt_monai.Source"},
    "steady": {"_target_": "mgipt_monai.SiteCorrection", "head": "@head", "statistics": "@statistics_path"},
    "fast": {
        "_target_": "mgipt_monai.MGIPT",
        "instance_sizes": [1],
        "steps": 2,
        "global_sizes": [5],
        "head": "@head",
        "statistics": "@statistics_path",
    },
}
"""Label-free methods, as a bundle's configs have them; the network is added."""

NOTHING = "none"
TRAINED = {"norms": fit_norms, "prompts": fit_prompts}
"""Correctors that take forwards and backwards to fit; an offset comes with them."""
CORRECTORS = ("offset", *TRAINED)
CANDIDATES = ("none + offset", "steady + offset", "fast + offset", "none + norms")
FEWEST = 5
"""Fewest labelled images (or groups) that are accepted; with three, one certificate in eight was false on one site."""
FOLDS = 5
"""Folds of the cross-validation of what takes passes to fit; an offset is left out image by image."""
SWAPPED = 0.1
"""Dice by which each class must fit better in another order of the classes for labels to count as swapped."""

Metric = Literal["dice", "surface_dice"]
Scored = tuple[np.ndarray, Tensor, list[float]]
"""Metric of each class, masks and expected Dice of one image."""


@dataclass
class Case:
    """One labelled image: (1, C, \\*spatial), with its label (1, classes, \\*spatial)."""

    name: str
    image: Tensor
    label: Tensor
    group: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the image's values, as 64 hexadecimal digits."""
        return hashlib.sha256(self.image.cpu().contiguous().numpy().tobytes()).hexdigest()


@dataclass
class Candidate:
    """A base and a corrector, with metric, masks and expected Dice of each image by a fit that did not see it."""

    base: str
    corrector: str
    cost: float
    values: np.ndarray  # (images, classes)
    masks: list[np.ndarray]  # packed
    quality: np.ndarray

    @property
    def name(self) -> str:
        """The candidate's name, such as ``steady + offset``."""
        return self.base if self.corrector == NOTHING else f"{self.base} + {self.corrector}"


def read_candidates(candidates: Sequence[str] | str, bases: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the base and the corrector of each candidate, each once."""
    if isinstance(candidates, str):
        candidates = candidates.strip("[]").split(",")
    wanted = []
    for candidate in candidates:
        base, plus, corrector = (part.strip() for part in str(candidate).partition("+"))
        if base not in bases or (plus and corrector not in CORRECTORS):
            raise ValueError(
                f"there is no candidate {candidate!r}: give BASE or BASE + CORRECTOR, with the bases "
                f"{', '.join(bases)} and the correctors {', '.join(CORRECTORS)}"
            )
        wanted.append((base, corrector if plus else NOTHING))
    return list(dict.fromkeys(wanted))


def read_cases(
    labelled: Iterable[Mapping[str, Any]], device: torch.device | str, head: Head, fewest: int = FEWEST
) -> list[Case]:
    """Check labelled images and return them on a device, (1, C, \\*spatial); raise ValueError by name."""
    cases: list[Case] = []
    seen: dict[str, str] = {}
    for index, item in enumerate(labelled):
        name = str(item.get("name", f"image {index}"))
        if lacking := {"image", "label"} - set(item):
            raise ValueError(f"{name} has no {' and no '.join(sorted(lacking))}")
        image, label = (_plain(item[key]).to(device)[None].float() for key in ("image", "label"))
        try:
            check_image(image)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if image.shape[2:] != label.shape[2:]:
            sizes = ["x".join(map(str, each.shape[2:])) for each in (image, label)]
            raise ValueError(f"{name}: the image is {sizes[0]} and the label {sizes[1]}: they must have the same size")
        if not torch.isin(label, torch.tensor([0.0, 1.0], device=label.device)).all():
            raise ValueError(f"{name}: the label has values other than 0 and 1: give one channel for each class")
        if not label.any():
            raise ValueError(f"{name}: the label is empty: label the image, or leave it out")
        if head == "softmax" and (label.sum(dim=1) > 1).any():
            raise ValueError(f"{name}: the label's classes overlap, which a softmax head cannot predict")
        if cases and label.shape[1] != cases[0].label.shape[1]:
            raise ValueError(f"{name}: {label.shape[1]} classes, but {cases[0].name} has {cases[0].label.shape[1]}")
        case = Case(name, image, label, str(item.get("group", name if "name" in item else index)))
        if any(name == other.name for other in cases):
            raise ValueError(f"two images have the name {name}: give each its own")
        if (twin := seen.setdefault(case.sha256, name)) != name:
            raise ValueError(f"{name} is the same image as {twin}: leave one out")
        cases.append(case)
    groups = len({case.group for case in cases})
    if groups < fewest:
        what = "images" if groups == len(cases) else f"groups (in {len(cases)} images)"
        raise ValueError(f"{groups} labelled {what} can certify nothing: give at least {fewest}, better ten")
    for channel in range(cases[0].label.shape[1]):
        if not any(case.label[:, channel].any() for case in cases):
            raise ValueError(f"class {channel} is in no label: leave it out, or label images that have it")
    return cases


def _plain(value: Any) -> Tensor:
    return value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)


def build_base(config: Mapping[str, Any], network: nn.Module, shared: Mapping[str, Any]) -> AdaptationMethod:
    """Build a method from its config; ``shared`` has the values that it refers to."""
    parser = ConfigParser({**shared, "network": network, "method": {**config, "network": "@network"}})
    try:
        method = parser.get_parsed_content("method")
    except RuntimeError as error:  # MONAI's own, around the method's
        raise ValueError(root_cause(error)) from error
    if not isinstance(method, AdaptationMethod):
        raise TypeError(f"a base must be an adaptation method, got {type(method).__name__}")
    return method


def score(logits: Tensor, label: Tensor, head: Head, metric: Metric, boundary: float) -> tuple[np.ndarray, Tensor]:
    """Return the metric of each class of one image, NaN for those that its label lacks, and the masks."""
    masks = binarize(logits, head)
    if masks.shape != label.shape:
        raise ValueError(
            f"the network predicts {masks.shape[1]} classes of {'x'.join(map(str, masks.shape[2:]))}, the labels have "
            f"{label.shape[1]} of {'x'.join(map(str, label.shape[2:]))} (head {head!r})"
        )
    if metric == "dice":
        values = compute_dice(masks, label, include_background=True, ignore_empty=True)
    else:
        values = compute_surface_dice(masks, label, [boundary] * label.shape[1], include_background=True)
    return values[0].cpu().double().numpy(), masks


def by_group(values: np.ndarray, cases: Sequence[Case]) -> np.ndarray:
    """Return the mean over each group's images, in the order of the groups' first images."""
    names = [case.group for case in cases]
    return np.array([np.mean([v for v, n in zip(values, names, strict=True) if n == g]) for g in dict.fromkeys(names)])


def image_means(values: np.ndarray) -> np.ndarray:
    """Return each image's mean over the classes that it has, (images, classes) to (images,)."""
    return np.nanmean(values, axis=1)


def unpacked(masks: np.ndarray, label: Tensor) -> np.ndarray:
    """Return packed masks in the shape of their label without its batch axis."""
    return np.unpackbits(masks, count=label[0].numel()).reshape(label.shape[1:])


class Trial:
    """Measures every candidate on images that its fit did not see."""

    def __init__(
        self,
        network: nn.Module,
        cases: list[Case],
        head: Head,
        metric: Metric = "dice",
        boundary: float = 2.0,
        inferer: Inferer | None = None,
        seed: int = 0,
    ) -> None:
        self.network, self.cases, self.head, self.inferer = network, cases, head, inferer
        self.metric, self.boundary = metric, boundary
        self.candidates: dict[tuple[str, str], Candidate] = {}
        self.skipped: dict[str, str] = {}
        self.bases: dict[str, Callable[[nn.Module], AdaptationMethod]] = {}
        groups = sorted({case.group for case in cases})
        order = np.random.default_rng(seed).permutation(len(groups))
        self.fold = {groups[place]: index % FOLDS for index, place in enumerate(order)}

    def run(
        self, wanted: Sequence[tuple[str, str]], bases: Mapping[str, Callable[[nn.Module], AdaptationMethod]]
    ) -> None:
        """Measure the candidates, pairs of a base and a corrector."""
        is_whole = self.inferer is None or isinstance(self.inferer, SimpleInferer)
        for base in dict.fromkeys(base for base, _ in wanted):
            build, correctors = bases[base], [corrector for other, corrector in wanted if other == base]
            try:
                logits, cost, _ = self._predict(build, Correction())
            except (ValueError, TypeError) as error:
                if base == NOTHING:
                    raise
                self.skipped[base] = str(error)
                logger.info("%s is not tried: %s", base, error)
                continue
            self.bases[base] = build
            if NOTHING in correctors:
                self._add(base, NOTHING, cost, list(map(self._scored, logits, self.cases)))
            if "offset" in correctors:
                self._add(base, "offset", cost, self._with_offset(logits))
        for corrector, fit in TRAINED.items():
            if trained := [base for base, other in wanted if other == corrector and base in self.bases]:
                if not is_whole:
                    self.skipped[corrector] = "fitted to whole images only, not through windows"
                    continue
                try:
                    self._run_trained(corrector, fit, trained)
                except ValueError as error:  # such as a corrected network whose activations overflow
                    self.skipped[corrector] = str(error)
                    logger.info("%s is not tried: %s", corrector, error)

    def _run_trained(self, corrector: str, fit: Callable[..., Correction], bases: Sequence[str]) -> None:
        """Fit once a fold, then measure each base on top of the fit."""
        scored: dict[str, dict[int, Scored]] = {base: {} for base in bases}
        costs = {}
        for fold in sorted(set(self.fold.values())):
            held_out = [self.fold[case.group] == fold for case in self.cases]
            seen = [case for case, out in zip(self.cases, held_out, strict=True) if not out]
            correction = fit(self.network, [c.image for c in seen], [c.label for c in seen], self.head)
            for base in list(scored):
                try:
                    logits, costs[base], _ = self._predict(self.bases[base], correction)
                except ValueError as error:  # such as source statistics of the network without the correction
                    self.skipped[f"{base} + {corrector}"] = str(error)
                    del scored[base]
                    continue
                kept = [each for each, out in zip(logits, held_out, strict=True) if not out]
                offset = fit_offset(kept, [case.label for case in seen], self.head)
                for index, out in enumerate(held_out):
                    if out:
                        scored[base][index] = self._scored(offset.to_logits(logits[index]), self.cases[index])
            logger.info("%s: fold %d of %d fitted", corrector, fold + 1, len(set(self.fold.values())))
        for base, results in scored.items():
            self._add(base, corrector, costs[base], [results[index] for index in range(len(self.cases))])

    def _scored(self, logits: Tensor, case: Case) -> Scored:
        values, masks = score(logits, case.label, self.head, self.metric, self.boundary)
        likely = logits.sigmoid() if self.head == "sigmoid" else logits.softmax(dim=1)[:, 1:]
        return values, masks, expected_dice(likely[0], masks[0])

    def _add(self, base: str, corrector: str, cost: float, scored: Sequence[Scored]) -> None:
        values, quality = (np.stack([each[part] for each in scored]) for part in (0, 2))
        masks = [np.packbits(masks[0].cpu().numpy().astype(bool)) for _, masks, _ in scored]
        self.candidates[base, corrector] = Candidate(base, corrector, cost, values, masks, quality)

    def _with_offset(self, logits: Sequence[Tensor]) -> list[Scored]:
        scored, curves = [], []
        if self.head == "sigmoid":
            curves = [curves_of(each, case.label) for each, case in zip(logits, self.cases, strict=True)]
        for case, own in zip(self.cases, logits, strict=True):
            others = [place for place, other in enumerate(self.cases) if other.group != case.group]
            if curves:
                offset = best_offsets([curves[i] for i in others])
            else:
                offset = fit_offset([logits[i] for i in others], [self.cases[i].label for i in others], self.head)
            scored.append(self._scored(offset.to_logits(own), case))
        return scored

    def _predict(
        self, build: Callable[[nn.Module], AdaptationMethod], correction: Correction
    ) -> tuple[list[Tensor], float, AdaptationMethod]:
        """Predict each image after the method has seen them all, without labels, as it will have at the site."""
        method = build(correction.to_network(self.network))
        if self.inferer is not None:
            method.predict_through(self.inferer)
        images = [correction.to_image(case.image) for case in self.cases]
        with torch.no_grad():
            predictions = [method(image) for image in images]
            cost = float(method.last[0]["forwards"] + method.last[0]["backwards"])
            learnt = method.adaptation_state()
            if method._state():
                for index, image in enumerate(images):
                    predictions[index] = method(image)
                    method.load_adaptation_state(learnt)
        return predictions, cost, method

    def check_classes(self, names: Sequence[str]) -> None:
        """Raise ValueError if another order of the label's classes fits the predictions much better."""
        count = len(names)
        if count < 2 or count > 6:
            return
        overlap = np.zeros((count, count))
        for case, packed in zip(self.cases, self.candidates[NOTHING, NOTHING].masks, strict=True):
            masks = torch.from_numpy(unpacked(packed, case.label)).flatten(1).float()
            label = case.label[0].flatten(1).cpu()
            both = masks @ label.T
            overlap += (2 * both / (masks.sum(dim=1)[:, None] + label.sum(dim=1)[None]).clamp(min=1)).numpy()
        overlap /= len(self.cases)
        order = max(itertools.permutations(range(count)), key=lambda order: overlap[range(count), order].mean())
        moved = [(a, b) for a, b in enumerate(order) if a != b]
        # each of them: a network that is far off may predict one structure in another's place, but not both
        if moved and all(overlap[a, b] > overlap[a, a] + SWAPPED for a, b in moved):
            told = ", ".join(f"{names[a]} is like the label {names[b]}" for a, b in moved)
            raise ValueError(
                f"the classes of the labels seem to be swapped (the prediction of {told}): correct their order, or, if "
                "it is right and the network that far off, set check_labels to false"
            )

    def deploy(self, candidate: Candidate) -> tuple[SiteSetting | None, AdaptationMethod]:
        """Fit the candidate to all images, and return it ready for the stream."""
        build = self.bases[candidate.base]
        if (candidate.base, candidate.corrector) == (NOTHING, NOTHING):
            return None, self._routed(Source(self.network))
        correction, images, labels = Correction(), [c.image for c in self.cases], [c.label for c in self.cases]
        if candidate.corrector in TRAINED:
            correction = TRAINED[candidate.corrector](self.network, images, labels, self.head)
        logits, _, method = self._predict(build, correction)
        if candidate.corrector != NOTHING:
            offset = fit_offset(logits, labels, self.head)
            logits = [offset.to_logits(each) for each in logits]
            temperature = fit_temperature(logits, labels, self.head)
            correction = Correction(offset.offset, temperature, correction.prompts, correction.norms)
        plain = build(self.network)
        setting = SiteSetting(
            fingerprint(self.network),
            plain.settings(),
            correction,
            method._state(),
            self._reference(method, correction, images),
        )
        return setting, self._routed(Commissioned(plain, setting, self.head))

    def _reference(
        self, method: AdaptationMethod, correction: Correction, images: Sequence[Tensor]
    ) -> dict[str, list[float]]:
        """Return the monitored signals of the labelled images."""
        is_fixed, seen = not method._state(), []
        for image in images:
            with torch.no_grad():
                logits = correction.to_logits(method(correction.to_image(image))) if is_fixed else None
            seen.append(monitored(image, logits, self.head))
        return {signal: [signals[signal] for signals in seen] for signal in seen[0]}

    def _routed(self, method: AdaptationMethod) -> AdaptationMethod:
        if self.inferer is not None:
            method.predict_through(self.inferer)
        return method
