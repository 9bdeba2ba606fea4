# SPDX-License-Identifier: Apache-2.0
"""An audit of a commissioned site: does its certificate hold on new labelled images?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from torch import nn

from mgipt_monai.commissioning.certificate import Bound, lower_bound
from mgipt_monai.commissioning.commission import check_settings, device_of
from mgipt_monai.commissioning.trial import NOTHING, Metric, build_base, by_group, image_means, read_cases, score
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.methods.commissioned import Commissioned, SiteSetting
from mgipt_monai.methods.source import Source
from mgipt_monai.networks.prompts.early_stop import Head

__all__ = ["Audit", "audit"]

FEWEST = 3
"""Fewest new images (or groups): nothing is fitted to them, so fewer than for commissioning do."""


@dataclass(frozen=True)
class Audit:
    """A commissioned setting on labelled images that it was not fitted to, see :func:`audit`.

    Attributes:
        holds: whether a gain over no adaptation is proven on these images alone.
        gain: mean gain over no adaptation.
        lower: lower bound on it.
        upper: upper bound on it.
        harmed: share of the images that lost more than was tolerated.
        cases: for each image its name, SHA-256 and metric without and with the setting.
        statement: what follows, in a sentence.
    """

    holds: bool
    gain: float
    lower: float
    upper: float
    harmed: float
    cases: list[dict[str, Any]]
    statement: str


def audit(
    network: nn.Module,
    labelled: Iterable[Mapping[str, Any]],
    setting: SiteSetting,
    base: Mapping[str, Any],
    *,
    head: Head = "sigmoid",
    confidence: float = 0.9,
    tolerated_loss: float = 0.01,
    metric: Metric = "dice",
    boundary: float = 2.0,
    bound: Bound = "student",
    statistics: str | None = None,
    inferer: Inferer | None = None,
    known: Iterable[str] = (),
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Audit:
    """Check a certificate on new labelled images of the site: nothing is fitted, so every image is a fair test.

    Args:
        network: the frozen source network.
        labelled: as for :func:`commission`.
        setting: what was deployed.
        base: the method inside, as a bundle's config has it.
        head: how logits become masks.
        confidence: of the bounds, in (0, 1).
        tolerated_loss: loss of metric from which an image counts as harmed.
        metric: as for :func:`commission`.
        boundary: as for :func:`commission`.
        bound: as for :func:`commission`.
        statistics: file of source statistics, for networks without batch norm.
        inferer: for volumes that are larger than the network's window.
        known: SHA-256 of images that it was commissioned on, which are refused.
        device: for the images; None takes that of the network.
        seed: of what is random in a method.

    Raises:
        ValueError: as :func:`commission`, and for an image that the setting was fitted to.
    """
    check_settings(confidence, NOTHING, tolerated_loss, 1.0, metric, head, boundary, bound)
    network = network.eval().requires_grad_(False)
    cases, known = read_cases(labelled, device_of(network) if device is None else device, head, FEWEST), set(known)
    if seen := [case.name for case in cases if case.sha256 in known]:
        raise ValueError(f"{', '.join(seen[:4])}: the site was commissioned on this image: audit it on new ones")
    plain = build_base(base, network, shared={"head": head, "statistics_path": statistics, "seed": seed})
    methods: list[AdaptationMethod] = [Source(network), Commissioned(plain, setting, head)]
    values = []
    for method in methods:
        if inferer is not None:
            method.predict_through(inferer)
        scored = [score(method(case.image), case.label, head, metric, boundary)[0] for case in cases]
        values.append(image_means(np.stack(scored)))
    before, after = values
    gains = by_group(after - before, cases)
    lower, upper = lower_bound(gains, confidence, bound), -lower_bound(-gains, confidence, bound)
    holds, count = lower > 0, len(gains)
    verdict = (
        f"The gain is proven again: more than {100 * lower:.1f} points"
        if holds
        else f"It harms: the loss is more than {-100 * upper:.1f} points; do not use the setting"
        if upper < 0
        else "No gain is proven on these images alone: label more, or commission the site again"
    )
    return Audit(
        holds=holds,
        gain=float(gains.mean()),
        lower=lower,
        upper=upper,
        harmed=float((gains < -tolerated_loss).mean()),
        cases=[
            {"name": case.name, "sha256": case.sha256, "before": float(b), "after": float(a)}
            for case, b, a in zip(cases, before, after, strict=True)
        ],
        statement=f"On {count} new labelled images the setting gains {100 * gains.mean():.1f} points. {verdict}.",
    )
