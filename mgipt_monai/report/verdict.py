# SPDX-License-Identifier: Apache-2.0
"""The conclusion of the report in words: does adaptation help on these sites?"""

from __future__ import annotations

from typing import Any

from .tables import corrected, percent, points, probability, span

__all__ = ["measured_images", "verdict"]

LEVEL = 0.05


def verdict(results: dict[str, Any]) -> str:
    """Return a paragraph on whether adaptation helps, the best method, its significance and the images that get worse.

    A gain or loss is called clear if its 95 % interval excludes zero and its p-value, corrected for the number of
    methods that are compared with the baseline, is below 0.05; possible, if only the uncorrected one is.

    Args:
        results: content of ``results.json``.
    """
    stream, baseline = results["stream"], results["baseline"]
    rounds = stream.get("rounds", 1)
    where = f"{_count(measured_images(stream), 'image')} of {_count(len(stream['sites']), 'site')}"
    where += f" in {rounds} rounds" if rounds > 1 else ""
    means = {method: figures["metrics"]["dsc"]["mean"] for method, figures in results["methods"].items()}
    against = {
        method: figures["against_baseline"]["dsc"]
        for method, figures in results["methods"].items()
        if figures["against_baseline"]
    }
    if not against:
        best = max(means, key=lambda method: means[method])
        sentences = [
            f"On {where}, {best} has the highest mean DSC, {percent(means[best])} %.",
            "There is no method without adaptation to compare with, so whether adaptation helps is not known.",
        ]
    else:
        adjusted = corrected({method: values["p_value"] for method, values in against.items()})
        against = {m: values | {"adjusted": adjusted.get(m), "tests": len(adjusted)} for m, values in against.items()}
        best = max(against, key=lambda method: against[method]["gain"])
        sentences = [
            f"On {where}, {_answer(best, against[best], means[best], baseline, means[baseline])}",
            f"With {best}, {percent(against[best]['worse'], 0)} % of the images get worse by more than one point "
            f"of DSC and {percent(against[best]['better'], 0)} % get better by more than one point.",
            *_others({method: values for method, values in against.items() if method != best}, baseline),
        ]
    if stream["failed"]:
        count = len({failure["name"] for failure in stream["failed"]})
        what = "image" if rounds == 1 else "record"
        sentences.append(f"{_count(count, what)} failed and {'is' if count == 1 else 'are'} excluded.")
    return " ".join(sentences)


def measured_images(stream: dict[str, Any]) -> int:
    """Return how many images all figures are over; an image of several rounds counts once."""
    return stream.get("measured_images", round(stream["measured"] / stream.get("rounds", 1)))


def _answer(best: str, against: dict[str, Any], mean: float, baseline: str, baseline_mean: float) -> str:
    gain, certainty = against["gain"], _certainty(against)
    sure = f"95 % interval {span(against['interval'], points)}, p {_relation(against)}"
    if gain <= 0:
        loss = {
            "clear": "a statistically clear loss",
            "possible": f"possibly a loss: {_POSSIBLE}",
            "": "not statistically clear",
        }
        return (
            f"no method has a higher mean DSC than {baseline} ({percent(baseline_mean)} %): adaptation does not help "
            f"here. The closest, {best}, is at {percent(mean)} %, a change of {points(gain)} points ({sure}), which is "
            f"{loss[certainty]}."
        )
    compared = f"a mean DSC of {percent(mean)} % compared with {percent(baseline_mean)} % of {baseline}"
    if certainty == "clear":
        return (
            f"adaptation helps: the best method, {best}, has {compared}. The gain of {points(gain)} points is "
            f"statistically clear ({sure})."
        )
    if certainty == "possible":
        return (
            f"adaptation possibly helps: the best method, {best}, has {compared}, a gain of {points(gain)} points "
            f"({sure}). It is not certain: {_POSSIBLE}."
        )
    return (
        f"it is not clear that adaptation helps: the best method, {best}, has {compared}, but the gain of "
        f"{points(gain)} points may be due to chance ({sure})."
    )


_POSSIBLE = "the 95 % interval, uncorrected for several comparisons, excludes zero, but p, corrected, is 0.05 or more"


def _others(against: dict[str, dict[str, Any]], baseline: str) -> list[str]:
    groups: dict[str, list[str]] = {}
    for kind, word in (("clear", "clearly "), ("possible", "possibly ")):
        for sign, better in ((True, "better"), (False, "worse")):
            groups[f"{word}{better} than {baseline}"] = [
                method for method, v in against.items() if _certainty(v) == kind and (v["gain"] > 0) == sign
            ]
    groups[f"not clearly different from {baseline}"] = [m for m, v in against.items() if not _certainty(v)]
    sentences = [
        f"{_listed(methods)} {'is' if len(methods) == 1 else 'are'} {what}"
        for what, methods in groups.items()
        if methods
    ]
    if not sentences:
        return []
    text = [f"Of the other methods, {'; '.join(sentences)}."]
    if any(_certainty(values) == "possible" for values in against.values()):
        text.append(f'"Possibly": {_POSSIBLE}.')
    return text


def _listed(words: list[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _certainty(against: dict[str, Any]) -> str:
    """Return how sure a gain or loss is: clear, possible, or neither."""
    low, high = against["interval"] or (0.0, 0.0)
    if low <= 0 <= high or against["p_value"] is None or against["p_value"] >= LEVEL:
        return ""
    return "clear" if against["adjusted"] < LEVEL else "possible"


def _relation(against: dict[str, Any]) -> str:
    if against["adjusted"] is None:
        return "not defined"
    text = probability(against["adjusted"])
    text = text if text.startswith("<") else f"= {text}"
    return text if against["tests"] == 1 else f"{text} corrected for {against['tests']} comparisons"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
