# SPDX-License-Identifier: Apache-2.0
"""Commission a site: a few labelled images choose a method, correct the network and certify the gain, or do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.inferers import Inferer
from torch import nn

from mgipt_monai.commissioning.certificate import Bound, choose, harm_bound, images_needed, lower_bound
from mgipt_monai.commissioning.trial import (
    BASES,
    CANDIDATES,
    NOTHING,
    Candidate,
    Case,
    Metric,
    Trial,
    build_base,
    by_group,
    image_means,
    read_candidates,
    read_cases,
    unpacked,
)
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.methods.commissioned import SiteSetting
from mgipt_monai.networks.prompts.early_stop import Head, check_head
from mgipt_monai.utils.provenance import fingerprint

__all__ = ["Commissioning", "Row", "check_settings", "commission", "device_of"]

SLOPE_WEIGHT = 0.02
"""Weight of a slope of 1 in a calibration, as a sum of squares: a spread of 4.5 points over ten images."""
Fallback = Literal["none", "steady"]


@dataclass(frozen=True)
class Row:
    """One candidate, cross-validated on the labelled images.

    Attributes:
        name: such as ``steady + offset``.
        base: name of the label-free method.
        corrector: ``none``, ``offset``, ``norms`` or ``prompts``; the latter two include an offset.
        cost: forwards and backwards of the network per image (F).
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
    cost: float
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
        lower_bound: lower bound on it, with the stated confidence, which holds whichever candidate is chosen.
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
        quality_calibration: intercept and slope of each class with which :class:`mgipt_monai.data.EstimateQualityd`
            estimates the Dice of this site's masks; None for another metric than Dice.
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
    quality_calibration: list[list[float]] | None = None


def commission(
    network: nn.Module,
    labelled: Iterable[Mapping[str, Any]],
    *,
    head: Head = "sigmoid",
    confidence: float = 0.9,
    candidates: Sequence[str] | str = CANDIDATES,
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
    on its gain is chosen. The certificate's bound holds for all candidates at once, so that it accounts for the choice.
    Where it is not above 0, or more images lose than ``max_harm`` allows, the fallback is deployed.

    The claim is about the mean over images drawn like the labelled ones, and assumes that these are a random sample of
    the site's images, independent of each other.

    Args:
        network: the frozen source network; it is not changed.
        labelled: dicts with ``image`` (C, \\*spatial), preprocessed for the network, and ``label`` (classes,
            \\*spatial) of 0 and 1, without a channel for the background; optionally ``name``, and ``group`` (such as
            the patient), whose images are never split and count once.
        head: how logits become masks.
        confidence: of the certificate, in (0, 1).
        candidates: what is tried: ``BASE`` or ``BASE + CORRECTOR``, as a list or separated by commas. The bases are
            ``none``, ``steady``, ``fast`` and those of ``bases``. The more are tried, the more has to be proven.
        bases: further methods for the candidates: name to the method as a bundle's config has it, such as
            ``{"bn": {"_target_": "mgipt_monai.BatchNormAdaptation"}}``.
        fallback: what is deployed where nothing is proven: ``none``, the network as it is, or ``steady``, unless that
            loses on the labelled images. With ``steady``, a candidate must also be proven better than it.
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
        >>> network = nn.Conv2d(1, 1, 1)
        >>> network.load_state_dict({"weight": torch.full((1, 1, 1, 1), 4.0), "bias": torch.zeros(1)})
        <All keys matched successfully>
        >>> images = [torch.rand(1, 24, 24) for _ in range(6)]
        >>> labelled = [{"image": image, "label": (image > 0.7).float()} for image in images]
        >>> result = commission(network, labelled, candidates=["none + offset"])
        >>> result.certified, result.table[0].gain > 0, result.method(images[0][None]).shape
        (True, True, torch.Size([1, 1, 24, 24]))
    """
    check_settings(confidence, fallback, tolerated_loss, max_harm, metric, head, boundary, bound)
    known = {**BASES, **(bases or {})}
    listed = read_candidates(candidates, known)
    wanted = list(dict.fromkeys([(NOTHING, NOTHING), (fallback, NOTHING), *listed]))
    shared = {"head": head, "statistics_path": statistics, "seed": seed}
    network = network.eval().requires_grad_(False)
    cases = read_cases(labelled, device_of(network) if device is None else device, head)
    names = [*map(str, range(cases[0].label.shape[1]))] if class_names is None else list(class_names)
    if len(names) != cases[0].label.shape[1]:
        raise ValueError(f"class_names are {names}, but the labels have {cases[0].label.shape[1]} channels")
    trial = Trial(network, cases, head, metric, boundary, inferer, seed)
    trial.run(wanted, {name: partial(build_base, known[name], shared=shared) for name in {base for base, _ in wanted}})
    if check_labels:
        trial.check_classes(names)

    before, behind = trial.candidates[NOTHING, NOTHING], trial.candidates.get((fallback, NOTHING))
    compared = [trial.candidates[each] for each in listed if each in trial.candidates]
    if not compared:
        raise ValueError(f"none of the candidates can be used with this network: {trial.skipped}")
    gains = {
        each.name: by_group(image_means(each.values) - image_means(before.values), cases)
        for each in trial.candidates.values()
    }
    harmed = {name: float((gain < -tolerated_loss).mean()) for name, gain in gains.items()}
    choice = choose(np.stack([gains[each.name] for each in compared]), confidence, bound)
    best = compared[choice.best]
    reasons = []
    if not choice.lower > 0:
        reasons.append("no gain over no adaptation is proven")
    elif behind not in (None, before, best):
        over_fallback = gains[best.name] - gains[fallback]
        if not lower_bound(over_fallback, confidence, bound) > 0:
            reasons.append(f"no gain over {fallback!r} is proven")
    if harmed[best.name] > max_harm:
        reasons.append(f"{harmed[best.name]:.0%} of the images lose more than {100 * tolerated_loss:g} points")
    certified = not reasons
    # what loses on the labelled images is no safe place to fall back to
    second = behind if behind is not None and gains[behind.name].mean() >= 0 else before
    after = best if certified else second
    if not certified and second is not (behind or before):
        reasons.append(f"{fallback!r} loses {-100 * gains[fallback].mean():.1f} points")
    rows = [_row(each, gains[each.name], confidence, bound, harmed[each.name]) for each in trial.candidates.values()]
    table = sorted(rows, key=lambda row: -row.lower)
    try:
        setting, method = trial.deploy(after)
    except (ValueError, FloatingPointError) as error:
        # a fit to all images may diverge where those to parts of them did not
        reasons.append(f"{after.name!r} cannot be fitted to all images ({error})")
        certified, after = False, second if second is not after else before
        setting, method = trial.deploy(after)
    count = len(gains[NOTHING])
    expected = choice.expected if certified else float(gains[after.name].mean())
    return Commissioning(
        method=method,
        certified=certified,
        chosen=after.name,
        gain=expected,
        lower_bound=choice.lower,
        harm=harmed[after.name],
        harm_bound=harm_bound(round(harmed[after.name] * count), count, confidence),
        table=table,
        statement=_statement(after.name, count, reasons, confidence, metric, table, expected, choice.lower),
        setting=setting,
        base_config=dict(known[after.base]),
        settings={
            "head": head,
            "confidence": confidence,
            "candidates": [candidate.name for candidate in compared],
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
        cases=[_case(case, before.values[i], after.values[i], names) for i, case in enumerate(cases)],
        masks=[
            (unpacked(first, case.label), unpacked(second, case.label))
            for case, first, second in zip(cases, before.masks, after.masks, strict=True)
        ],
        skipped=trial.skipped,
        quality_calibration=calibrate_quality(after.quality, after.values) if metric == "dice" else None,
    )


def calibrate_quality(quality: np.ndarray, dice: np.ndarray) -> list[list[float]]:
    """Fit for each class a line from expected to true Dice; both (images, classes), NaN where a class is absent.

    Few images say little about the slope, so it is drawn towards 1.

    Example:
        >>> expected = np.array([[0.9], [0.9], [0.9]])
        >>> [[round(number, 6) for number in line] for line in calibrate_quality(expected, expected - 0.25)]
        [[-0.25, 1.0]]
    """
    lines = []
    for predicted, true in zip(quality.T, dice.T, strict=True):
        there = ~np.isnan(true)
        if not there.any():
            lines.append([0.0, 1.0])
            continue
        x, y = predicted[there], true[there]
        slope = ((x - x.mean()) @ (y - y.mean()) + SLOPE_WEIGHT) / (np.square(x - x.mean()).sum() + SLOPE_WEIGHT)
        lines.append([float(y.mean() - slope * x.mean()), float(slope)])
    return lines


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's parameters; the CPU for one without any."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _row(candidate: Candidate, gains: np.ndarray, confidence: float, bound: Bound, harmed: float) -> Row:
    changes = candidate.name != NOTHING
    return Row(
        name=candidate.name,
        base=candidate.base,
        corrector=candidate.corrector,
        cost=candidate.cost,
        values=image_means(candidate.values).tolist(),
        classes=np.nanmean(candidate.values, axis=0).tolist(),
        gain=float(gains.mean()),
        lower=lower_bound(gains, confidence, bound) if changes else 0.0,
        upper=-lower_bound(-gains, confidence, bound) if changes else 0.0,
        harmed=harmed,
        needed=images_needed(gains, confidence) if changes else None,
    )


def _case(case: Case, before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    return {
        "name": case.name,
        "group": case.group,
        "sha256": case.sha256,
        "before": float(np.nanmean(before)),
        "after": float(np.nanmean(after)),
        "before_by_class": dict(zip(names, before.tolist(), strict=True)),
        "after_by_class": dict(zip(names, after.tolist(), strict=True)),
    }


def check_settings(
    confidence: float,
    fallback: str,
    tolerated_loss: float,
    max_harm: float,
    metric: str,
    head: str,
    boundary: float,
    bound: str,
) -> None:
    """Raise ValueError, with the value and the choices, for a setting that is out of range."""
    check_head(head)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if fallback not in get_args(Fallback):
        raise ValueError(f"fallback must be one of {', '.join(get_args(Fallback))}; got {fallback!r}")
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}; got {metric!r}")
    if bound not in get_args(Bound):
        raise ValueError(f"bound must be one of {', '.join(get_args(Bound))}; got {bound!r}")
    if not boundary >= 0:
        raise ValueError(f"boundary must not be negative, got {boundary}")
    if not 0 <= tolerated_loss < 1:
        raise ValueError(f"tolerated_loss must be in [0, 1), got {tolerated_loss}")
    if not 0 <= max_harm <= 1:
        raise ValueError(f"max_harm must be in [0, 1], got {max_harm}")


def _statement(
    name: str,
    count: int,
    reasons: Sequence[str],
    confidence: float,
    metric: Metric,
    table: Sequence[Row],
    expected: float,
    lower: float,
) -> str:
    unit = "DSC" if metric == "dice" else "surface Dice"
    best = max(table, key=lambda row: row.gain)
    if not reasons and name != NOTHING and lower > 0:
        return (
            f"With {confidence:.0%} confidence, {name!r} raises the mean {unit} of this site's images by more than "
            f"{100 * lower:.1f} points over no adaptation (expected: {100 * expected:.1f}); {count} labelled images."
        )
    kept = "Keep the network as it is" if name == NOTHING else f"{name!r} is deployed, unproven"
    text = f"{kept}: with {count} labelled images and {confidence:.0%} confidence, "
    text += " and ".join(reasons or ["no candidate is better"]) + "."
    if best.gain > 0:
        text += f" The best candidate, {best.name!r}, gained {100 * best.gain:.1f} points"
        text += f"; about {best.needed} more labelled images would prove it." if best.needed else "."
    return text
