# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from mgipt_monai.report.verdict import verdict


def results(
    gains: dict[str, tuple[float, float, float | None]], failed: int = 0, baseline: str | None = "source"
) -> dict[str, Any]:
    """A source network at 80 % and methods of given gain, half width of its interval, and p-value."""
    methods = {"source": {"metrics": {"dsc": {"mean": 0.8}}, "against_baseline": None}}
    for method, (gain, half, p_value) in gains.items():
        against = {
            "gain": gain,
            "interval": [gain - half, gain + half],
            "p_value": p_value,
            "worse": 0.25,
            "better": 0.5,
        }
        methods[method] = {
            "metrics": {"dsc": {"mean": 0.8 + gain}},
            "against_baseline": {"dsc": against} if baseline else None,
        }
    failures = [{"name": f"A/{i}", "method": "mgipt", "reason": "broken"} for i in range(failed)]
    stream = {"measured": 20, "sites": ["A", "B"], "failed": failures}
    return {"stream": stream, "baseline": baseline, "methods": methods}


def test_clear_gain_of_the_best_method() -> None:
    text = verdict(results({"tent": (0.01, 0.002, 0.03), "mgipt": (0.02, 0.005, 0.0004)}))
    assert text.startswith(
        "On 20 images of 2 sites, adaptation helps: the best method, mgipt, has a mean DSC of 82.00 % compared with "
        "80.00 % of source. The gain of +2.00 points is statistically clear (95 % interval +1.50 to +2.50, p < 0.001 "
        "corrected for 2 comparisons)."
    )
    assert "With mgipt, 25 % of the images get worse by more than one point" in text
    assert text.endswith("Of the other methods, tent is clearly better than source.")


@pytest.mark.parametrize(
    ("half", "p_value", "sure"),
    [(0.03, 0.01, "p = 0.010"), (0.001, 0.2, "p = 0.200"), (0.001, None, "p not defined")],
)
def test_gain_is_clear_only_if_interval_and_p_value_agree(half: float, p_value: float | None, sure: str) -> None:
    text = verdict(results({"mgipt": (0.02, half, p_value)}))
    assert "it is not clear that adaptation helps" in text
    assert "may be due to chance" in text
    assert sure in text


def test_p_is_corrected_for_the_number_of_methods() -> None:
    many = {f"other {i}": (-0.001, 0.01, 0.5) for i in range(8)}
    text = verdict(results({**many, "tent": (-0.02, 0.01, 0.039), "mgipt": (0.02, 0.01, 0.004)}))
    assert "statistically clear (95 % interval +1.00 to +3.00, p = 0.040 corrected for 10 comparisons)" in text
    assert "tent is possibly worse than source" in text
    assert "clearly worse" not in text
    assert "adaptation possibly helps" in verdict(results({**many, "mgipt": (0.02, 0.01, 0.039)}))
    assert "adaptation helps" in verdict(results({"mgipt": (0.02, 0.01, 0.039)}))


def test_images_of_several_rounds_count_once() -> None:
    content = results({"mgipt": (0.02, 0.005, 0.0004)})
    content["stream"] |= {"measured": 60, "measured_images": 20, "rounds": 3}
    assert verdict(content).startswith("On 20 images of 2 sites in 3 rounds, adaptation helps")
    del content["stream"]["measured_images"]  # of an earlier version
    assert verdict(content).startswith("On 20 images of 2 sites in 3 rounds, adaptation helps")


def test_no_method_beats_the_baseline() -> None:
    text = verdict(results({"bn": (-0.03, 0.01, 0.001), "tent": (-0.02, 0.01, 0.002), "mgipt": (-0.001, 0.01, 0.6)}))
    assert "no method has a higher mean DSC than source (80.00 %): adaptation does not help here" in text
    assert "The closest, mgipt, is at 79.90 %" in text
    assert "is not statistically clear" in text
    assert "bn and tent are clearly worse than source" in text
    assert "adaptation helps" not in text


def test_clear_loss_is_called_one() -> None:
    assert "a statistically clear loss" in verdict(results({"mgipt": (-0.02, 0.01, 0.002)}))


def test_groups_of_the_other_methods() -> None:
    gains = {"a": (0.01, 0.001, 0.001), "b": (-0.01, 0.001, 0.001), "c": (0.001, 0.01, 0.5), "d": (0.02, 0.001, 0.001)}
    text = verdict(results(gains))
    assert "a is clearly better than source; b is clearly worse than source; c is not clearly different" in text


def test_without_a_baseline_nothing_is_said_about_gain() -> None:
    text = verdict(results({"mgipt": (0.02, 0.001, 0.001)}, baseline=None))
    assert "mgipt has the highest mean DSC, 82.00 %" in text
    assert "helps is not known" in text


@pytest.mark.parametrize(("count", "words"), [(1, "1 image failed and is"), (2, "2 images failed and are")])
def test_failed_images_are_counted(count: int, words: str) -> None:
    assert words in verdict(results({"mgipt": (0.02, 0.001, 0.001)}, failed=count))
