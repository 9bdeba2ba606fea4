# SPDX-License-Identifier: Apache-2.0
"""Commission a site: a few labelled images choose a method, correct the network and certify the gain, or do nothing."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from monai.metrics import compute_dice, compute_surface_dice
from torch import Tensor, nn

from mgipt_monai.commissioning.certificate import Bound, harm_bound, images_needed, lower_bound
from mgipt_monai.commissioning.correctors import (
    fit_norms,
    fit_offset,
    fit_prompts,
    fit_temperature,
    offset_curves,
)
from mgipt_monai.methods.base import AdaptationMethod, check_image
from mgipt_monai.methods.commissioned import Commissioned, SiteSetting, monitored
from mgipt_monai.methods.source import Source
from mgipt_monai.networks.correction import Correction
from mgipt_monai.networks.prompts.early_stop import Head, binarize, check_head
from mgipt_monai.utils.provenance import fingerprint

__all__ = ["BASES", "CANDIDATES", "CORRECTORS", "Commissioning", "Row", "commission"]

logger = logging.getLogger(__name__)

BASES: dict[str, dict[str, Any]] = {
    "none": {"_target_": "mgipt_monai.Source"},
    "steady": {"_target_": "mgipt_monai.SiteCorrection", "head": "@head"},
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
CANDIDATES = ("none", "steady", "fast", "none + offset", "steady + offset", "fast + offset", "none + norms")
FEWEST = 3
"""Fewest labelled images (or groups) with which anything can be certified."""
FOLDS = 5
"""Folds of the cross-validation of what takes passes to fit; an offset is left out image by image."""
SWAPPED = 0.1
"""Mean Dice by which another order of the classes must fit better for labels to count as swapped."""

Metric = Literal["dice", "surface_dice"]
Fallback = Literal["none", "steady"]


@dataclass(frozen=True)
class Row:
    """One candidate, cross-validated on the labelled images.

    Attributes:
        name: such as ``steady + offset``.
        base: name of the label-free method.
        corrector: ``none``, ``offset``, ``norms`` or ``prompts``; the latter two include an offset.
        forwards: passes of the network an image.
        values: metric of each labelled image, by a fit that did not see it.
        classes: mean metric of each class.
        gain: mean difference from no adaptation, over groups of images.
        lower: lower bound on the gain of this candidate alone, not corrected for the choice among several.
        upper: upper bound, likewise.
        harmed: share of the images that lose more than the tolerated harm.
        needed: how many more labelled images would probably prove a gain; None if none would.
    """

    name: str
    base: str
    corrector: str
    forwards: float
    values: list[float]
    classes: list[float]
    gain: float
    lower: float
    upper: float
    harmed: float
    needed: int | None


@dataclass(frozen=True)
class Commissioning:
    """What commissioning found, see :func:`commission`.

    Attributes:
        method: ready for the site's stream; :class:`mgipt_monai.Source`, or the fallback, where nothing was proven.
        certified: whether a gain over no adaptation was proven.
        chosen: name of the deployed candidate.
        gain: mean gain over no adaptation that is expected of the chosen procedure, in the metric's unit.
        lower_bound: lower bound on it, with the stated confidence, corrected for the choice among the candidates.
        harm: share of the labelled images that lost more than was tolerated.
        harm_bound: upper bound on that share at the site, with the stated confidence.
        table: the candidates, the best first.
        statement: what is claimed, in a sentence.
        setting: what the method was built from; None where the network stays as it is.
        base_config: the method inside, as a bundle's config.
        settings: what was asked for.
        cases: for each labelled image its name, SHA-256, group, and metric before and after.
        masks: for each labelled image its masks before and after (classes, \\*spatial), by a fit that did not see it.
        skipped: candidates that cannot be used with this network, and why.
    """

    method: AdaptationMethod
    certified: bool
    chosen: str
    gain: float
    lower_bound: float
    harm: float
    harm_bound: float
    table: list[Row]
    statement: str
    setting: SiteSetting | None
    base_config: Mapping[str, Any]
    settings: Mapping[str, Any]
    cases: list[dict[str, Any]]
    masks: list[tuple[np.ndarray, np.ndarray]] = field(repr=False)
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Case:
    name: str
    image: Tensor
    label: Tensor
    group: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.image.cpu().contiguous().numpy().tobytes()).hexdigest()


@dataclass
class _Candidate:
    base: str
    corrector: str
    forwards: float
    values: np.ndarray  # (images, classes)
    masks: list[np.ndarray]  # packed

    @property
    def name(self) -> str:
        return self.base if self.corrector == NOTHING else f"{self.base} + {self.corrector}"


def commission(
    network: nn.Module,
    labelled: Iterable[Mapping[str, Any]],
    *,
    head: Head = "sigmoid",
    confidence: float = 0.9,
    candidates: Sequence[str] = CANDIDATES,
    bases: Mapping[str, Mapping[str, Any]] | None = None,
    fallback: Fallback = "none",
    tolerated_loss: float = 0.01,
    max_harm: float = 0.3,
    metric: Metric = "dice",
    boundary: float = 2.0,
    bound: Bound = "student",
    class_names: Sequence[str] | None = None,
    statistics: str | None = None,
    inferer: Inferer | None = None,
    check_labels: bool = True,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Commissioning:
    """Find out on a few labelled images of a site what helps there, and prove it, or leave the network as it is.

    A candidate is a label-free method, alone or with a corrector: an ``offset`` for each class's logit; ``norms``, two
    shares for each norm layer that move its statistics to the site's; ``prompts``, multi-scale site prompts; the latter
    two come with an offset. Each is measured on images that its fit did not see. The one with the largest lower bound
    on its gain is chosen. The certificate repeats the choice once for each image (or group) without that image, and bounds the
    mean of the resulting gains, so that it accounts for the choice among several candidates. Where the bound is not
    above 0, or more images lose than ``max_harm`` allows, the fallback is deployed.

    The claim is about the mean over images drawn like the labelled ones, and assumes that these are a random sample of
    the site's images, independent of each other.

    Args:
        network: the frozen source network; it is not changed.
        labelled: dicts with ``image`` (C, \\*spatial), preprocessed for the network, and ``label`` (classes,
            \\*spatial) of 0 and 1, without a channel for the background; optionally ``name``, and ``group`` (such as
            the patient), whose images are never split and count once.
        head: how logits become masks.
        confidence: of the certificate, in (0, 1).
        candidates: what is tried: ``BASE`` or ``BASE + CORRECTOR``; ``none`` is always.
        bases: further methods for the candidates: name to the method as a bundle's config has it, such as
            ``{"bn": {"_target_": "mgipt_monai.BatchNormAdaptation"}}``.
        fallback: what is deployed where nothing is proven: ``none``, the network as it is, or ``steady``. With
            ``steady``, a candidate must also be proven better than it.
        tolerated_loss: loss of metric from which an image counts as harmed.
        max_harm: largest share of the labelled images that may be harmed, in [0, 1].
        metric: ``dice``, or ``surface_dice`` for borders.
        boundary: for ``surface_dice``, largest distance of a border that counts as right, in pixels or voxels.
        bound: ``student`` or ``betting``, see :func:`mgipt_monai.commissioning.certificate.lower_bound`.
        class_names: of the label's channels, for messages; None numbers them.
        statistics: file of source statistics, for networks without batch norm.
        inferer: for volumes that are larger than the network's window; ``norms`` and ``prompts`` are then left out.
        check_labels: whether labels whose classes seem to be swapped are refused.
        device: for the images; None takes that of the network.
        seed: of the folds, and of what is random in a method.

    Returns:
        The method that is ready for the stream, the certificate, and what it rests on.

    Raises:
        ValueError: for settings out of range, too few images, and labels or images that cannot be right, by name.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
        >>> images = [torch.rand(1, 24, 24) for _ in range(4)]
        >>> labelled = [{"image": image, "label": (image > 0.7).float()} for image in images]
        >>> result = commission(network, labelled, candidates=["none + offset"])
        >>> result.certified, result.table[0].gain > 0, result.method(images[0][None]).shape
        (True, True, torch.Size([1, 1, 24, 24]))
    """
    _check_settings(confidence, fallback, tolerated_loss, max_harm, metric, head)
    known = {**BASES, **(bases or {})}
    wanted = _wanted([NOTHING, fallback, *candidates], known)
    shared = {"head": head, "statistics_path": statistics, "seed": seed}
    network = network.eval().requires_grad_(False)
    if device is None:
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    cases = _cases(labelled, device)
    trial = _Trial(network, cases, head, partial(_score, metric=metric, boundary=boundary), inferer, seed)
    names = [*map(str, range(cases[0].label.shape[1]))] if class_names is None else list(class_names)
    if len(names) != cases[0].label.shape[1]:
        raise ValueError(f"class_names are {names}, but the labels have {cases[0].label.shape[1]} channels")
    trial.run(wanted, {name: partial(_build, known[name], shared=shared) for name in {base for base, _ in wanted}})
    if check_labels:
        trial.check_classes(names)

    certificate = _Certificate(trial, confidence, bound, tolerated_loss)
    best, after = certificate.choose(fallback if fallback in trial.bases else NOTHING)
    harmed = certificate.harmed(after)
    reasons = []
    if not certificate.lower > 0:
        reasons.append("no gain over no adaptation is proven")
    elif fallback != NOTHING and not certificate.lower_than_fallback > 0:
        reasons.append(f"no gain over {fallback} is proven")
    if harmed > max_harm:
        reasons.append(f"{harmed:.0%} of the labelled images lose more than {tolerated_loss:g}, {max_harm:.0%} may")
    certified = not reasons and best.name != NOTHING

    deployed = best if certified else trial.candidates.get((fallback, NOTHING), trial.candidates[NOTHING, NOTHING])
    setting, method = trial.deploy(deployed)
    table = sorted((certificate.row(candidate) for candidate in trial.candidates.values()), key=lambda row: -row.lower)
    before = trial.candidates[NOTHING, NOTHING]
    count = len(certificate.groups)
    if not certified:
        after = deployed
    gains = _mean(after.values) - _mean(before.values)
    return Commissioning(
        method=method,
        certified=certified,
        chosen=deployed.name,
        gain=float(certificate.nested.mean()) if certified else float(certificate.by_group(gains).mean()),
        lower_bound=certificate.lower,
        harm=certificate.harmed(after),
        harm_bound=harm_bound(round(certificate.harmed(after) * count), count, confidence),
        table=table,
        statement=_statement(certificate, deployed, certified, reasons, confidence, metric, table),
        setting=setting,
        base_config=dict(known[deployed.base]),
        settings={
            "head": head,
            "confidence": confidence,
            "candidates": [candidate.name for candidate in trial.candidates.values()],
            "fallback": fallback,
            "tolerated_loss": tolerated_loss,
            "max_harm": max_harm,
            "metric": metric,
            "boundary": boundary,
            "bound": bound,
            "seed": seed,
            "class_names": names,
            "weights": fingerprint(network),
        },
        cases=[
            {
                "name": case.name,
                "group": case.group,
                "sha256": case.sha256,
                "before": float(b),
                "after": float(a),
                "before_by_class": dict(zip(names, map(float, bs), strict=True)),
                "after_by_class": dict(zip(names, map(float, as_), strict=True)),
            }
            for case, b, a, bs, as_ in zip(
                cases, _mean(before.values), _mean(after.values), before.values, after.values, strict=True
            )
        ],
        masks=[
            (_unpacked(first, case.label), _unpacked(second, case.label))
            for case, first, second in zip(cases, before.masks, after.masks, strict=True)
        ],
        skipped=trial.skipped,
    )


def _check_settings(
    confidence: float,
    fallback: str,
    tolerated_loss: float,
    max_harm: float,
    metric: str,
    head: str,
) -> None:
    check_head(head)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if fallback not in get_args(Fallback):
        raise ValueError(f"fallback must be one of {', '.join(get_args(Fallback))}; got {fallback!r}")
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}; got {metric!r}")
    if not 0 <= tolerated_loss < 1:
        raise ValueError(f"tolerated_loss must be in [0, 1), got {tolerated_loss}")
    if not 0 <= max_harm <= 1:
        raise ValueError(f"max_harm must be in [0, 1], got {max_harm}")


def _wanted(candidates: Sequence[str], bases: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the base and the corrector of each candidate, each once."""
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


def _cases(labelled: Iterable[Mapping[str, Any]], device: torch.device | str) -> list[_Case]:
    cases: list[_Case] = []
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
        if cases and label.shape[1] != cases[0].label.shape[1]:
            raise ValueError(f"{name}: {label.shape[1]} classes, but {cases[0].name} has {cases[0].label.shape[1]}")
        case = _Case(name, image, label, str(item.get("group", name if "name" in item else index)))
        if (other := seen.setdefault(case.sha256, name)) != name or (len(cases) and name in [c.name for c in cases]):
            raise ValueError(f"{name} is the same image as {other}: leave one out")
        cases.append(case)
    groups = len({case.group for case in cases})
    if groups < FEWEST:
        what = "images" if groups == len(cases) else f"groups (in {len(cases)} images)"
        raise ValueError(f"{groups} labelled {what} can certify nothing: give at least {FEWEST}, better ten")
    for channel in range(cases[0].label.shape[1]):
        if not any(case.label[:, channel].any() for case in cases):
            raise ValueError(f"class {channel} is in no label: leave it out, or label images that have it")
    return cases


def _plain(value: Any) -> Tensor:
    return value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)


def _build(config: Mapping[str, Any], network: nn.Module, shared: Mapping[str, Any]) -> AdaptationMethod:
    parser = ConfigParser({**shared, "network": network, "method": {**config, "network": "@network"}})
    method = parser.get_parsed_content("method")
    if not isinstance(method, AdaptationMethod):
        raise TypeError(f"a base must be an adaptation method, got {type(method).__name__}")
    return method


def _score(logits: Tensor, label: Tensor, head: Head, metric: Metric, boundary: float) -> tuple[np.ndarray, Tensor]:
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


def _mean(values: np.ndarray) -> np.ndarray:
    return np.nanmean(values, axis=1)


def _unpacked(masks: np.ndarray, label: Tensor) -> np.ndarray:
    return np.unpackbits(masks, count=label[0].numel()).reshape(label.shape[1:])


class _Trial:
    """Measures every candidate on images that its fit did not see."""

    def __init__(
        self,
        network: nn.Module,
        cases: list[_Case],
        head: Head,
        score: Callable[..., tuple[np.ndarray, Tensor]],
        inferer: Inferer | None,
        seed: int,
    ) -> None:
        self.network, self.cases, self.head, self.score, self.inferer = network, cases, head, score, inferer
        self.candidates: dict[tuple[str, str], _Candidate] = {}
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
                logits, forwards, _ = self._predict(build, Correction())
            except (ValueError, TypeError) as error:
                if base == NOTHING:
                    raise
                self.skipped[base] = str(error)
                logger.info("%s is not tried: %s", base, error)
                continue
            self.bases[base] = build
            if NOTHING in correctors:
                scored = [self._scored(each, case) for each, case in zip(logits, self.cases, strict=True)]
                self._add(base, NOTHING, forwards, scored)
            if "offset" in correctors:
                self._add(base, "offset", forwards, self._with_offset(logits))
        for corrector, fit in TRAINED.items():
            if trained := [base for base, other in wanted if other == corrector and base in self.bases]:
                if is_whole:
                    self._run_trained(corrector, fit, trained)
                else:
                    self.skipped[corrector] = "fitted to whole images only, not through windows"

    def _run_trained(self, corrector: str, fit: Callable[..., Correction], bases: Sequence[str]) -> None:
        """Fit once a fold, then measure each base on top of the fit."""
        scored: dict[str, dict[int, tuple[np.ndarray, Tensor]]] = {base: {} for base in bases}
        forwards = {}
        for fold in sorted(set(self.fold.values())):
            held_out = [self.fold[case.group] == fold for case in self.cases]
            seen = [case for case, out in zip(self.cases, held_out, strict=True) if not out]
            correction = fit(self.network, [c.image for c in seen], [c.label for c in seen], self.head)
            for base in bases:
                logits, forwards[base], _ = self._predict(self.bases[base], correction)
                curves = [
                    offset_curves(each, case.label, self.head)
                    for each, case, out in zip(logits, self.cases, held_out, strict=True)
                    if not out
                ]
                offset = fit_offset(curves, self.head)
                for index, out in enumerate(held_out):
                    if out:
                        scored[base][index] = self._scored(offset.to_logits(logits[index]), self.cases[index])
            logger.info("%s: fold %d of %d fitted", corrector, fold + 1, len(set(self.fold.values())))
        for base, results in scored.items():
            self._add(base, corrector, forwards[base], [results[index] for index in range(len(self.cases))])

    def _scored(self, logits: Tensor, case: _Case) -> tuple[np.ndarray, Tensor]:
        return self.score(logits, case.label, self.head)

    def _add(self, base: str, corrector: str, forwards: float, scored: Sequence[tuple[np.ndarray, Tensor]]) -> None:
        values = np.stack([values for values, _ in scored])
        masks = [np.packbits(masks[0].cpu().numpy().astype(bool)) for _, masks in scored]
        self.candidates[base, corrector] = _Candidate(base, corrector, forwards, values, masks)

    def _with_offset(self, logits: Sequence[Tensor]) -> list[tuple[np.ndarray, Tensor]]:
        curves = [offset_curves(each, case.label, self.head) for each, case in zip(logits, self.cases, strict=True)]
        scored = []
        for each, case in zip(logits, self.cases, strict=True):
            others = [c for c, other in zip(curves, self.cases, strict=True) if other.group != case.group]
            scored.append(self._scored(fit_offset(others, self.head).to_logits(each), case))
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
            forwards = float(method.last[0]["forwards"])
            learnt = method.adaptation_state()
            if method._state():
                for index, image in enumerate(images):
                    predictions[index] = method(image)
                    method.load_adaptation_state(learnt)
        return predictions, forwards, method

    def check_classes(self, names: Sequence[str]) -> None:
        """Raise ValueError if another order of the label's classes fits the predictions much better."""
        count = len(names)
        if count < 2 or count > 6:
            return
        overlap = np.zeros((count, count))
        for case, packed in zip(self.cases, self.candidates[NOTHING, NOTHING].masks, strict=True):
            masks = torch.from_numpy(_unpacked(packed, case.label)).flatten(1).float()
            label = case.label[0].flatten(1).cpu()
            both = masks @ label.T
            overlap += (2 * both / (masks.sum(dim=1)[:, None] + label.sum(dim=1)[None]).clamp(min=1)).numpy()
        overlap /= len(self.cases)
        order = max(itertools.permutations(range(count)), key=lambda order: overlap[range(count), order].mean())
        if overlap[range(count), order].mean() > overlap.diagonal().mean() + SWAPPED:
            told = ", ".join(f"{names[a]} is like the label {names[b]}" for a, b in enumerate(order) if a != b)
            raise ValueError(
                f"the classes of the labels seem to be swapped (the prediction of {told}): correct their order, or, if "
                "it is right and the network that far off, set check_labels to false"
            )

    def deploy(self, candidate: _Candidate) -> tuple[SiteSetting | None, AdaptationMethod]:
        """Fit the candidate to all images, and return it ready for the stream."""
        build = self.bases[candidate.base]
        if (candidate.base, candidate.corrector) == (NOTHING, NOTHING):
            return None, self._routed(Source(self.network))
        correction, images, labels = Correction(), [c.image for c in self.cases], [c.label for c in self.cases]
        if candidate.corrector in TRAINED:
            correction = TRAINED[candidate.corrector](self.network, images, labels, self.head)
        logits, _, method = self._predict(build, correction)
        if candidate.corrector != NOTHING:
            curves = [offset_curves(each, label, self.head) for each, label in zip(logits, labels, strict=True)]
            offset = fit_offset(curves, self.head)
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
        learnt, seen = method.adaptation_state(), []
        for image in images:
            with torch.no_grad():
                logits = correction.to_logits(method(correction.to_image(image)))
            seen.append(monitored(image, logits, method.last[0], self.head))
            method.load_adaptation_state(learnt)
        return {signal: [signals[signal] for signals in seen] for signal in seen[0]}

    def _routed(self, method: AdaptationMethod) -> AdaptationMethod:
        if self.inferer is not None:
            method.predict_through(self.inferer)
        return method


class _Certificate:
    """Chooses a candidate, and bounds its gain in a way that accounts for the choice."""

    def __init__(self, trial: _Trial, confidence: float, bound: Bound, tolerated_loss: float) -> None:
        self.trial, self.confidence, self.bound, self.tolerated_loss = trial, confidence, bound, tolerated_loss
        names = [case.group for case in trial.cases]
        self.groups = list(dict.fromkeys(names))
        self._members = [[index for index, name in enumerate(names) if name == group] for group in self.groups]
        self._before = _mean(trial.candidates[NOTHING, NOTHING].values)
        self.lower = self.lower_than_fallback = -np.inf
        self.nested = np.zeros(len(self.groups))

    def by_group(self, values: np.ndarray) -> np.ndarray:
        """Return the mean of each group's images."""
        return np.array([values[members].mean() for members in self._members])

    def gains(self, candidate: _Candidate) -> np.ndarray:
        return self.by_group(_mean(candidate.values) - self._before)

    def lower_of(self, gains: np.ndarray) -> float:
        return lower_bound(gains, self.confidence, self.bound)

    def harmed(self, candidate: _Candidate) -> float:
        return float((self.gains(candidate) < -self.tolerated_loss).mean())

    def choose(self, fallback: str) -> tuple[_Candidate, _Candidate]:
        """Choose by the largest lower bound, on all groups and, for the certificate, without each one in turn.

        Returns:
            The candidate to deploy, and the one whose cross-validated predictions show what it does.
        """
        candidates = list(self.trial.candidates.values())
        gains = np.stack([self.gains(candidate) for candidate in candidates])
        best = candidates[self._best(gains)]
        others = ~np.eye(len(self.groups), dtype=bool)
        picks = [self._best(gains[:, keep]) for keep in others]
        self.nested = np.array([gains[pick, index] for index, pick in enumerate(picks)])
        self.lower = self.lower_of(self.nested)
        reference = self.gains(self.trial.candidates[fallback, NOTHING])
        self.lower_than_fallback = self.lower_of(self.nested - reference)
        return best, best

    def _best(self, gains: np.ndarray) -> int:
        """Return the row with the largest lower bound; the first, no adaptation, has the bound 0."""
        bounds = [lower_bound(row, self.confidence, "student") for row in gains]
        return int(np.nanargmax([0.0, *bounds[1:]]))

    def row(self, candidate: _Candidate) -> Row:
        gains = self.gains(candidate)
        is_nothing = candidate.name == NOTHING
        return Row(
            name=candidate.name,
            base=candidate.base,
            corrector=candidate.corrector,
            forwards=candidate.forwards,
            values=_mean(candidate.values).tolist(),
            classes=np.nanmean(candidate.values, axis=0).tolist(),
            gain=float(gains.mean()),
            lower=0.0 if is_nothing else self.lower_of(gains),
            upper=0.0 if is_nothing else -self.lower_of(-gains),
            harmed=self.harmed(candidate),
            needed=None if is_nothing else images_needed(gains, self.confidence),
        )


def _statement(
    certificate: _Certificate,
    deployed: _Candidate,
    certified: bool,
    reasons: Sequence[str],
    confidence: float,
    metric: str,
    table: Sequence[Row],
) -> str:
    count = len(certificate.groups)
    unit = "DSC" if metric == "dice" else "surface Dice"
    if certified:
        return (
            f"With {confidence:.0%} confidence, `{deployed.name}` raises the mean {unit} of this site's images by more "
            f"than {100 * certificate.lower:.1f} points over no adaptation (expected: "
            f"{100 * certificate.nested.mean():.1f}), by {count} labelled images."
        )
    best = max((row for row in table if row.name != NOTHING), key=lambda row: row.gain, default=None)
    kept = "Keep the network as it is" if deployed.name == NOTHING else f"`{deployed.name}` is deployed, unproven"
    text = f"{kept}: with {confidence:.0%} confidence and {count} labelled images, {' and '.join(reasons)}."
    if best is not None and best.gain > 0:
        more = f"about {best.needed} more labelled images would" if best.needed else "no small number of images would"
        if best.needed == 0:
            more = "more labelled images may"
        text += f" The best candidate, `{best.name}`, gained {100 * best.gain:.1f} points; {more} prove it."
    return text
