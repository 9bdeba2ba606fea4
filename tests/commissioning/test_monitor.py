# SPDX-License-Identifier: Apache-2.0
"""The drift monitor keeps its rate of false alarms, notices changes, and resumes as if it had not stopped."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest

from mgipt_monai.methods import DriftMonitor
from mgipt_monai.methods.drift_monitor import FIRST_SHIFTS, _Signal


def normal(seed: int, count: int, shift: float = 0.0, spread: float = 1.0) -> list[float]:
    return (shift + spread * np.random.default_rng(seed).standard_normal(count)).tolist()


def watching(seed: int = 0, k: int = 10, **settings) -> DriftMonitor:
    return DriftMonitor({"area": normal(seed, k), "confidence": normal(seed + 1, k)}, seed=seed, **settings)


def alarms(monitor: DriftMonitor, *values: list[float]) -> Iterator[bool]:
    for image in zip(*values, strict=True):
        yield monitor.observe(dict(zip(("area", "confidence"), image, strict=True)))["alarm"]


def test_p_values_are_valid_and_independent_before_and_after_the_horizon() -> None:
    found = np.array(
        [
            [monitor.observe({"area": value})["p"]["area"] for value in normal(1000 + seed, 60)]
            for seed in range(400)
            for monitor in [watching(seed, k=5, horizon=20)]
        ]
    )
    for part in (found[:, :15], found[:, 15:]):
        assert all((part <= share).mean() < share + 0.015 for share in (0.1, 0.2, 0.4, 0.7))
    assert (found[:, 15:] <= 0.2).mean() > 0.1  # and useful
    assert abs(np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("kind", ["normal", "ties", "heavy tails"])
def test_false_alarms_are_at_most_as_many_as_stated(kind: str) -> None:
    raised = 0
    for seed in range(200):
        values = np.random.default_rng(seed).standard_normal(210)
        values = {"normal": values, "ties": np.round(values), "heavy tails": values**5}[kind].tolist()
        monitor = DriftMonitor({"area": values[:10]}, false_alarms=0.2, horizon=40, seed=seed)
        raised += any(monitor.observe({"area": value})["alarm"] for value in values[10:])
    # 20 % stated: 54 alarms or more would be one chance in a hundred
    assert raised < 54


@pytest.mark.parametrize(
    ("change", "before", "most"),
    [
        ({"shift": 3.0}, 0, 15),
        ({"shift": -3.0}, 0, 15),
        ({"shift": 3.0}, 150, 15),
        ({"spread": 5.0}, 150, 60),
    ],
)
def test_a_change_is_noticed(change: dict, before: int, most: int) -> None:
    monitor = watching()
    clean = normal(2, before), normal(3, before)
    changed = normal(4, most), normal(5, most, **change)
    assert not any(alarms(monitor, *clean))
    assert any(alarms(monitor, *changed))
    assert monitor.alarm == "confidence"


def test_alarm_stays_on_until_reset(caplog: pytest.LogCaptureFixture) -> None:
    monitor = watching()
    list(alarms(monitor, normal(2, 15), normal(3, 15, shift=4.0)))
    assert list(alarms(monitor, normal(4, 50), normal(5, 50))) == [True] * 50
    assert [record.message for record in caplog.records] == [
        "the images have changed since commissioning, by their confidence"
    ]
    monitor.reset()
    assert (monitor.images, monitor.alarm) == (0, None)
    assert monitor.adaptation_state() == watching().adaptation_state()


def test_record_is_plain_and_says_what_was_seen() -> None:
    found = watching().observe({"area": 0.0, "confidence": math.nan, "other": 1.0})
    assert json.loads(json.dumps(found)) == found
    assert found["signals"] == {"area": 0.0}
    assert 0 < found["p"]["area"] < 1
    assert found["limit"] == pytest.approx(math.log10(20))
    assert (found["alarm"], found["signal"] in ("area", "confidence")) == (False, True)


def test_absent_signals_leave_a_signal_as_it_is() -> None:
    monitor = watching()
    before = monitor.adaptation_state()["signals"]
    for signals in ({}, {"area": math.nan}, {"area": None}, {"area": math.inf, "unknown": 3.0}):
        monitor.observe(signals)
    after = monitor.adaptation_state()
    assert after["images"] == 4
    assert after["signals"] == before


def test_resuming_equals_not_stopping() -> None:
    whole, first = watching(horizon=25), watching(horizon=25)
    values = normal(2, 60), normal(3, 60, shift=0.7)
    records = [whole.observe({"area": a, "confidence": c}) for a, c in zip(*values, strict=True)]
    for a, c in zip(*(row[:30] for row in values), strict=True):
        first.observe({"area": a, "confidence": c})
    second = watching(horizon=25)
    second.load_adaptation_state(json.loads(json.dumps(first.adaptation_state())))
    rest = [second.observe({"area": a, "confidence": c}) for a, c in zip(*(row[30:] for row in values), strict=True)]
    assert rest == records[30:]
    assert second.adaptation_state() == whole.adaptation_state()


def test_state_has_a_bounded_size_and_is_a_copy() -> None:
    monitor = watching(horizon=30)
    sizes = []
    for images in (20, 200):
        list(alarms(monitor, normal(images, images), normal(images + 1, images)))
        state = monitor.adaptation_state()
        sizes.append({key: len(part) for key, part in state["signals"]["area"].items() if isinstance(part, list)})
    assert sizes[0] == sizes[1] == {"values": 30, "ties": 30, "counts": 31, "first": len(FIRST_SHIFTS), "later": 7}
    state["signals"]["area"]["counts"][0] += 1
    assert monitor.adaptation_state() != state


@pytest.mark.parametrize(
    "path",
    [
        ("images", -1),
        ("images", 3.5),
        ("alarm", "brightness"),
        ("signals", {}),
        ("signals", "area", 3),
        ("signals", "area", "seen", 41),
        ("signals", "area", "values", [0.0]),
        ("signals", "area", "values", 0, math.nan),
        ("signals", "area", "values", 0, 1e9),
        ("signals", "area", "values", 0, "0"),
        ("signals", "area", "ties", 0, 2.0),
        ("signals", "area", "counts", 0, 1),
        ("signals", "area", "first", 0, -1.0),
        ("signals", "area", "later", 0, math.inf),
        ("signals", "area", "later", None),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(path: tuple) -> None:
    monitor = watching()
    list(alarms(monitor, normal(2, 40), normal(3, 40)))
    before = monitor.adaptation_state()
    damaged = copy.deepcopy(before)
    *keys, last, value = path
    place = damaged
    for key in keys:
        place = place[key]
    place[last] = value
    with pytest.raises(ValueError, match=r"state|lacks|dict"):
        monitor.load_adaptation_state(damaged)
    assert monitor.adaptation_state() == before


def test_state_of_another_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="another reference"):
        watching(0).load_adaptation_state(watching(1).adaptation_state())


@pytest.mark.parametrize(
    ("reference", "settings", "words"),
    [
        ({"a": [1.0, 2.0]}, {"false_alarms": 0.0}, "false_alarms"),
        ({"a": [1.0, 2.0]}, {"horizon": 1}, "horizon"),
        ({"a": [1.0, 2.0, 3.0]}, {"horizon": 2}, "3 reference values"),
        ({"a": [1.0, 2.0]}, {"seed": -1}, "seed"),
        ({"a": [1.0, math.nan, None]}, {}, "no signal"),
        ({}, {}, "no signal"),
    ],
)
def test_wrong_settings_fail_at_construction(reference: dict, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DriftMonitor(reference, **settings)


@pytest.mark.parametrize("horizon", [200, 12])
def test_no_bet_gains_on_average(horizon: int) -> None:
    # the same past, and then one image at each possible rank
    values = [*normal(2, 30), *normal(3, 30, shift=2.0)]
    signal = _Signal([(value, 0.0) for value in normal(0, 8)])
    for value in values:
        signal.add(value, 0.5, horizon)
    money = signal.evidence
    edges = sorted(value for value, _ in signal.bag)
    ranks, after = [], []
    for place in [edges[0] - 1, *(np.add(edges[1:], edges[:-1]) / 2), edges[-1] + 1]:
        one = copy.deepcopy(signal)
        low, high = one.add(float(place), 0.5, horizon)
        ranks.append(high - low)
        after.append(one.evidence)
    assert sum(ranks) == pytest.approx(1)
    assert np.dot(ranks, after) == pytest.approx(money, rel=1e-6)
