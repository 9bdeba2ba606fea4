# SPDX-License-Identifier: Apache-2.0
"""The conclusion of the report in words: does adaptation help on these sites?"""

from __future__ import annotations

from typing import Any

from .tables import percent, points, probability, span

__all__ = ["verdict"]

LEVEL = 0.05


def verdict(results: dict[str, Any]) -> str:
    """Return a paragraph on whether adaptation helps, the best method, its significance and the images that get worse.

    A gain or loss is called clear if its 95 % interval excludes zero and its p-value is below 0.05.

    Args:
        results: content of ``results.json``.
    """
    stream, baseline = results["stream"], results["baseline"]
    where = f"{stream['measured']} images of {_count(len(stream['sites']), 'site')}"
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
        best = max(against, key=lambda method: against[method]["gain"])
        sentences = [
            f"On {where}, {_answer(best, against[best], means[best], baseline, means[baseline])}",
            f"With {best}, {percent(against[best]['worse'], 0)} % of the images get worse by more than one point "
            f"of DSC and {percent(against[best]['better'], 0)} % get better by more than one point.",
            *_others({method: values for method, values in against.items() if method != best}, baseline),
        ]
    if stream["failed"]:
        count = len({failure["name"] for failure in stream["failed"]})
        sentences.append(f"{_count(count, 'image')} failed and {'is' if count == 1 else 'are'} excluded.")
    return " ".join(sentences)


def _answer(best: str, against: dict[str, Any], mean: float, baseline: str, baseline_mean: float) -> str:
    gain, clear = against["gain"], _clear(against)
    sure = f"95 % interval {span(against['interval'], points)}, p {_relation(against['p_value'])}"
    if gain <= 0:
        return (
            f"no method has a higher mean DSC than {baseline} ({percent(baseline_mean)} %): adaptation does not help "
            f"here. The closest, {best}, is at {percent(mean)} %, a change of {points(gain)} points ({sure}), which is "
            f"{'a statistically clear loss' if clear else 'not statistically clear'}."
        )
    compared = f"a mean DSC of {percent(mean)} % compared with {percent(baseline_mean)} % of {baseline}"
    if clear:
        return (
            f"adaptation helps: the best method, {best}, has {compared}. The gain of {points(gain)} points is "
            f"statistically clear ({sure})."
        )
    return (
        f"it is not clear that adaptation helps: the best method, {best}, has {compared}, but the gain of "
        f"{points(gain)} points may be due to chance ({sure})."
    )


def _others(against: dict[str, dict[str, Any]], baseline: str) -> list[str]:
    groups = {
        f"clearly better than {baseline}": [m for m, v in against.items() if v["gain"] > 0 and _clear(v)],
        f"clearly worse than {baseline}": [m for m, v in against.items() if v["gain"] <= 0 and _clear(v)],
        f"not clearly different from {baseline}": [m for m, v in against.items() if not _clear(v)],
    }
    sentences = [
        f"{_listed(methods)} {'is' if len(methods) == 1 else 'are'} {what}"
        for what, methods in groups.items()
        if methods
    ]
    return [f"Of the other methods, {'; '.join(sentences)}."] if sentences else []


def _listed(words: list[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _clear(against: dict[str, Any]) -> bool:
    if against["interval"] is None:
        return False
    low, high = against["interval"]
    return not low <= 0 <= high and against["p_value"] is not None and against["p_value"] < LEVEL


def _relation(p_value: float | None) -> str:
    if p_value is None:
        return "not defined"
    text = probability(p_value)
    return text if text.startswith("<") else f"= {text}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
