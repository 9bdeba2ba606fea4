# SPDX-License-Identifier: Apache-2.0
"""The page that a site signs: what commissioning found, on which images, and what that does and does not prove."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from monai.utils import convert_to_numpy

try:
    import jinja2  # noqa: F401 (the page's template needs it)
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the commissioning page needs {error.name}: pip install mgipt_monai[commission]"
    ) from error

from mgipt_monai.commissioning.commission import Commissioning, Row
from mgipt_monai.commissioning.trial import FOLDS, NOTHING, TRAINED
from mgipt_monai.report.overlays import STYLES, contour_picture, fullest_plane
from mgipt_monai.report.page import page_environment
from mgipt_monai.report.styles import as_svg, plain_axes
from mgipt_monai.utils.files import plain_text
from mgipt_monai.utils.provenance import versions

__all__ = ["commissioning_page"]

UNITS = {"dice": "DSC", "surface_dice": "surface Dice"}
BOUNDS = {
    "student": "Student's, which assumes roughly normal differences",
    "betting": "betting, which holds for differences of any distribution",
}
BASES_IN_WORDS = {
    NOTHING: "the source network, as it is",
    "steady": "fuses the network's prediction with two that normalise with the site's statistics instead of those of "
    "the training images; no gradients",
    "fast": "MGIPT with its smallest instance prompt, fitted to each image in two steps, and one prompt for the site; "
    "no labels",
}
CORRECTORS_IN_WORDS = {
    "offset": "adds one number for each class to the logits, which makes its masks larger or smaller",
    "norms": "moves the statistics of each norm layer towards the site's, by two numbers a layer; includes an offset",
    "prompts": "changes the lowest frequencies of every image in the same way; includes an offset",
}


class _ShownCase(NamedTuple):
    """A labelled image as the page shows it; ``rows`` are what is measured, before and after."""

    name: str
    group: str
    sha256: str
    picture: str
    plane: str
    change: float
    harmed: bool
    rows: list[tuple[str, float, float]]


def commissioning_page(
    result: Commissioning,
    labelled: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    facts: Mapping[str, str] | None = None,
) -> str:
    """Return one HTML page with verdict, certificate, candidates, all labelled images, settings, and signature lines.

    It needs no other file and no script, and prints on A4.

    Args:
        result: what :func:`mgipt_monai.commission` returned.
        labelled: the images and labels that it was given, in the same order. Names are those in ``result.cases``.
        title: heading, such as the name of the site; "" has a general one.
        facts: more to state about what was done, such as the scanner: what to value. A ``date`` replaces today's.

    Raises:
        ValueError: if ``labelled`` are not the images that were commissioned.
    """
    labelled = list(labelled)
    if len(labelled) != len(result.cases):
        raise ValueError(
            f"{len(result.cases)} labelled images were commissioned, but {len(labelled)} are given: pass the same ones"
        )
    is_changed = result.chosen != NOTHING
    shown = [
        _shown_case(case, item, masks, is_changed, result.settings["tolerated_loss"])
        for case, item, masks in zip(result.cases, labelled, result.masks, strict=True)
    ]
    groups = len({case["group"] for case in result.cases})
    gaining = [row for row in result.table if row.name != NOTHING and row.gain > 0]
    explained = _explained(result)
    (deployed,) = (row for row in result.table if row.name == result.chosen)
    environment = page_environment("mgipt_monai.commissioning")
    environment.filters |= {"number": _number, "signed": _signed, "share": _share, "loss": _loss, "of_class": _of_class}
    return environment.get_template("commissioning.html.j2").render(
        result=result,
        settings=result.settings,
        title=title,
        unit=UNITS[result.settings["metric"]],
        counted="images" if groups == len(shown) else "groups",
        groups=groups,
        is_changed=is_changed,
        before=float(np.mean([case["before"] for case in result.cases])),
        after=float(np.mean([case["after"] for case in result.cases])),
        best=max(gaining, key=lambda row: row.gain, default=None),
        parts=[part for part in (deployed.base, deployed.corrector) if part != NOTHING],
        chart=_gain_chart(result),
        # the worst first; without any change, those that the network predicts worst
        cases=sorted(shown, key=lambda case: (case.change, case.rows[0][1])),
        styles=STYLES,
        facts=_facts(result, groups) | dict(facts or {}),
        explained=explained,
        monitored=result.setting is not None and bool(result.setting.reference),
    )


def _shown_case(
    case: Mapping[str, Any],
    item: Mapping[str, Any],
    masks: tuple[np.ndarray, np.ndarray],
    is_changed: bool,
    tolerated_loss: float,
) -> _ShownCase:
    image, label = convert_to_numpy(item["image"]), convert_to_numpy(item["label"])
    # a picture of another image beside these figures would be signed as well
    if hashlib.sha256(np.ascontiguousarray(image, dtype=np.float32).tobytes()).hexdigest() != case["sha256"]:
        raise ValueError(
            f"{case['name']} is another image than the one that was commissioned: pass the same ones, in the same order"
        )
    outlines = {"reference": label, "before": masks[0]} | ({"after": masks[1]} if is_changed else {})
    change = case["after"] - case["before"]
    rows = [("mean", case["before"], case["after"])] if len(case["before_by_class"]) > 1 else []
    rows += [(_of_class(name), value, case["after_by_class"][name]) for name, value in case["before_by_class"].items()]
    png = base64.b64encode(contour_picture(image, outlines)).decode()
    return _ShownCase(
        name=case["name"],
        group="" if case["group"] == case["name"] else case["group"],
        sha256=case["sha256"],
        picture=f"data:image/png;base64,{png}",
        plane=f"plane {fullest_plane(label) + 1} of {label.shape[-1]}" if label.ndim == 4 else "",
        change=change,
        harmed=change < -tolerated_loss,
        rows=rows,
    )


def _gain_chart(result: Commissioning) -> str:
    """Return the gain of each candidate with its bounds, as a data URI; "" if no adaptation is the only one."""
    rows = [row for row in result.table if row.name != NOTHING]
    if not rows:
        return ""
    figure = Figure(figsize=(7.2, 0.9 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1.2)
    for place, row in enumerate(rows):
        is_chosen = row.name == result.chosen
        low, high = 100 * row.lower, 100 * row.upper
        axes.plot([low, high], [place, place], color="#0072b2", linewidth=3.5 if is_chosen else 1.5)
        marker, face = ("D", "#0072b2") if is_chosen else ("o", "white")
        axes.plot(100 * row.gain, place, marker, color="#0072b2", markerfacecolor=face, markersize=7)
    names = [plain_text(row.name) + (" (deployed)" if row.name == result.chosen else "") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0")
    axes.set_xlabel(f"gain in {UNITS[result.settings['metric']]} over no adaptation, points")
    plain_axes(axes, grid="x")
    return as_svg(figure)


def _facts(result: Commissioning, groups: int) -> dict[str, str]:
    """Return what was done: what to value."""
    settings, count = result.settings, len(result.cases)
    within = f"; a border within {settings['boundary']:g} pixels or voxels counts as right"
    one = "image" if groups == count else "group"
    fits = []
    if any(row.corrector == "offset" for row in result.table):
        fits.append(f"an offset is fitted once for each {one}, without it")
    if trained := [name for name in TRAINED if any(row.corrector == name for row in result.table)]:
        fits.append(f"{' and '.join(trained)} in {min(FOLDS, groups)} folds of whole {one}s")
    fallback = settings["fallback"]
    facts = {
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "labelled images": f"{count}" if groups == count else f"{count}, in {groups} groups; a group counts once",
        "classes": ", ".join(map(_of_class, settings["class_names"])),
        "metric": UNITS[settings["metric"]] + (within if settings["metric"] == "surface_dice" else ""),
        "confidence": _share(settings["confidence"]),
        "bound": BOUNDS[settings["bound"]],
        "tolerated loss": f"{_loss(settings['tolerated_loss'])}; {one}s that lose more count as harmed",
        "harmed at most": f"{_share(settings['max_harm'])} of the labelled {one}s, or nothing is certified",
        "without proof": "the network stays as it is" if fallback == NOTHING else f"{fallback} is deployed",
        "cross-validation": "; ".join(fits) or "nothing was fitted to labels",
        "output": {"sigmoid": "sigmoid, each channel a class", "softmax": "softmax, channel 0 is the background"}[
            settings["head"]
        ],
        "seed": str(settings["seed"]),
        "network's weights (SHA-256)": settings["weights"],
    }
    if result.setting is not None:
        correction = result.setting.correction
        if correction.offset is not None:
            background = ["background"] * (settings["head"] == "softmax")
            names = [*background, *map(_of_class, settings["class_names"])]
            offsets = zip(names, correction.offset.tolist(), strict=True)
            facts["offsets, in logits"] = ", ".join(f"{name} {value:+.2f}".replace("-", "−") for name, value in offsets)
        facts["correction (SHA-256)"] = correction.digest
    return facts | {"versions": ", ".join(f"{name} {version}" for name, version in versions().items())}


def _explained(result: Commissioning) -> dict[str, str]:
    """Return what the parts of the candidates do: name to words."""
    rows: list[Row] = result.table
    bases = {row.base: BASES_IN_WORDS.get(row.base, "a method that was given in addition") for row in rows}
    return bases | {row.corrector: CORRECTORS_IN_WORDS[row.corrector] for row in rows if row.corrector != NOTHING}


def _of_class(name: str) -> str:
    # without names, classes have numbers
    return f"class {name}" if name.isdigit() else name


def _number(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "–"


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    rounded = round(100 * value, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def _share(value: float) -> str:
    return f"{100 * value:.3g}%"


def _loss(value: float) -> str:
    return f"{100 * value:g} point{'' if value == 0.01 else 's'}"
