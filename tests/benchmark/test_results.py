# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from mgipt_monai.benchmark.results import summarise, timing, write_images_csv
from mgipt_monai.report.folder import SCHEMA, SCHEMA_VERSION
from mgipt_monai.stream.summary import worst_tenth
from mgipt_monai.utils.statistics import interval, per_case, wilcoxon


def rows(scores: dict[str, float | None], rounds: int = 1, **more: object) -> list[dict]:
    """Records of a stream; the first letter of a name is its site, a score of None is a failure."""
    made = []
    for number in range(1, rounds + 1):
        for name, score in scores.items():
            row = {"name": name if number == 1 else f"round_{number}/{name}", "site": name[0], "round": number}
            row |= {"seconds": 0.5, "forwards": 2, "backwards": 1, "status": "ok", "peak_memory_mib": 100.0, **more}
            if score is None:
                row |= {"status": "failed", "reason": "broken"}
            else:
                score -= 0.1 * (number - 1)
                row["metrics"] = {"dsc": {"disc": score, "cup": score - 0.2}, "hd95": {"disc": 10 * (1 - score)}}
            made.append(row)
    return made


def test_figures_by_hand() -> None:
    runs = {
        "source": rows({"A1": 0.8, "A2": 0.9, "B1": 0.5, "B2": 0.7}),
        "mgipt": rows({"A1": 0.9, "A2": 0.88, "B1": 0.495, "B2": None}, instance_size=3),
    }
    results = summarise(runs, "source")
    assert results["stream"] == {
        "images": 4,
        "measured": 3,
        "measured_images": 3,
        "rounds": 1,
        "sites": ["A", "B"],
        "failed": [{"name": "B2", "method": "mgipt", "reason": "broken"}],
    }
    source, mgipt = (results["methods"][name]["metrics"]["dsc"] for name in ("source", "mgipt"))
    # the image that failed with one method is left out of both
    assert source["classes"]["disc"] == pytest.approx(np.mean([0.8, 0.9, 0.5]))
    assert source["mean"] == pytest.approx(np.mean([0.7, 0.8, 0.4]))
    assert source["worst_tenth"] == pytest.approx(0.4)
    assert mgipt["sites"]["A"] == {
        "images": 2,
        "mean": pytest.approx(0.79),
        "worst_tenth": pytest.approx(0.78),
        "classes": {"disc": pytest.approx(0.89), "cup": pytest.approx(0.69)},
    }
    against = results["methods"]["mgipt"]["against_baseline"]
    assert against["dsc"]["gain"] == pytest.approx(np.mean([0.1, -0.02, -0.005]))
    # A2 by two points; B1 by half a point is no harm
    assert against["dsc"]["worse"] == pytest.approx(1 / 3)
    assert against["dsc"]["better"] == pytest.approx(1 / 3)
    assert against["hd95"]["gain"] == pytest.approx(-10 * against["dsc"]["gain"])
    assert against["hd95"]["worse"] is None
    assert results["methods"]["mgipt"]["instance_sizes"] == {"3": 3}
    assert results["methods"]["mgipt"]["forwards"] == 2
    assert results["methods"]["source"]["against_baseline"] is None
    assert results["metrics"]["hd95"]["better"] == "lower"


def test_degradation_is_the_first_round_minus_the_mean_of_rounds() -> None:
    results = summarise({"mgipt": rows({"A1": 0.8, "A2": 0.6}, rounds=3)})
    dsc, hd95 = (results["methods"]["mgipt"]["metrics"][name] for name in ("dsc", "hd95"))
    assert dsc["rounds"] == pytest.approx([0.6, 0.5, 0.4])
    assert dsc["degradation"] == pytest.approx(0.1)
    # a distance that grows gets worse as well
    assert hd95["degradation"] == pytest.approx(1.0)
    assert summarise({"mgipt": rows({"A1": 0.8})})["methods"]["mgipt"]["metrics"]["dsc"]["degradation"] is None


def test_an_undefined_distance_leaves_the_image_out_for_every_method_alike() -> None:
    runs = {"source": rows({"A1": 0.8, "A2": 0.9}), "mgipt": rows({"A1": 0.8, "A2": 0.9})}
    runs["mgipt"][1]["metrics"]["hd95"]["disc"] = None
    methods = summarise(runs, "source")["methods"]
    for name in runs:
        assert methods[name]["metrics"]["hd95"]["mean"] == pytest.approx(2.0)
        assert methods[name]["metrics"]["hd95"]["undefined"] == 1
        assert methods[name]["metrics"]["dsc"]["images"] == 2


def test_a_class_that_no_image_has_is_left_out_for_all_methods() -> None:
    runs = {"source": rows({"A1": 0.8, "A2": 0.9}), "mgipt": rows({"A1": 0.7, "A2": 0.9})}
    for run in runs.values():
        run[0]["metrics"]["dsc"]["cup"] = None
    dsc = summarise(runs, "source")["methods"]["mgipt"]["metrics"]["dsc"]
    assert dsc["undefined"] == 0
    assert dsc["mean"] == pytest.approx(np.mean([0.7, 0.8]))


def test_runs_over_other_images_and_lost_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="mgipt ran over other images than source"):
        summarise({"source": rows({"A1": 0.8}), "mgipt": rows({"A2": 0.8})})
    with pytest.raises(ValueError, match="no image was processed by every method"):
        summarise({"source": rows({"A1": None, "A2": 0.8}), "mgipt": rows({"A1": 0.8, "A2": None})})
    with pytest.raises(ValueError, match="baseline 'other' is not one of the runs source"):
        summarise({"source": rows({"A1": 0.8})}, "other")


def test_rounds_of_an_image_are_averaged_before_statistics() -> None:
    assert per_case([1, 2, 3, 5], ["B", "A", "B", "A"]).tolist() == [2, 3.5]
    one = {"source": rows({f"A{i}": 0.5 for i in range(9)}), "mgipt": rows({f"A{i}": 0.5 + i / 50 for i in range(9)})}
    three = {
        "source": rows({f"A{i}": 0.5 for i in range(9)}, rounds=3),
        "mgipt": rows({f"A{i}": 0.5 + i / 50 for i in range(9)}, rounds=3),
    }
    values = [summarise(runs, "source")["methods"]["mgipt"]["against_baseline"]["dsc"] for runs in (one, three)]
    # three times the same images are no more evidence than once
    assert values[0]["p_value"] == pytest.approx(values[1]["p_value"])
    assert values[0]["interval"] == pytest.approx(values[1]["interval"])
    assert (values[0]["worse"], values[0]["better"]) == (values[1]["worse"], values[1]["better"])
    found = summarise(three, "source")
    dsc = found["methods"]["mgipt"]["metrics"]["dsc"]
    assert (found["stream"]["measured"], found["stream"]["measured_images"]) == (27, 9)
    assert (dsc["images"], dsc["sites"]["A"]["images"]) == (9, 9)
    assert dsc["worst_tenth"] == pytest.approx(0.3)  # the mean of the worst image's rounds


def test_unit_of_distances_is_named_where_it_is_known() -> None:
    runs = {"source": rows({"A1": 0.8})}
    assert summarise(runs)["metrics"]["hd95"]["unit"] == "mm or pixels"
    assert summarise(runs, unit="mm")["metrics"]["hd95"]["unit"] == "mm"
    assert summarise(runs, unit="mm")["metrics"]["dsc"]["unit"] == ""


def test_statistics() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, 200)
    low, high = interval(values, seed=0)
    assert [low, high] == interval(values, seed=0) != interval(values, seed=1)
    # the normal approximation of the mean's interval
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(200), rel=0.1)
    assert interval(values[:1], seed=0) is None
    assert wilcoxon(np.zeros(5)) is None
    assert wilcoxon(np.arange(1.0, 6.0)) == pytest.approx(2 / 2**5)
    assert worst_tenth(np.arange(20.0)) == 0.5
    assert worst_tenth(np.arange(20.0), higher_is_better=False) == 18.5


def test_results_have_the_documented_schema() -> None:
    runs = {"source": rows({"A1": 0.8, "B1": 0.9}, rounds=2), "mgipt": rows({"A1": 0.7, "B1": None}, rounds=2)}
    results = {"schema": SCHEMA, "version": SCHEMA_VERSION, **summarise(runs, "source")}
    results["settings"] = {"seed": 0, "reset_at_site": False, "weights": "00", "methods": {"source": {}, "mgipt": {}}}
    for figures in results["methods"].values():
        figures["prompts"] = {"1 x 1": [[[1.0]]]}
    schema = json.loads((Path(__file__).parents[2] / "docs" / "reference" / "results.schema.json").read_text())
    jsonschema.validate(json.loads(json.dumps(results, allow_nan=False)), schema)
    del results["methods"]["mgipt"]["metrics"]["dsc"]["interval"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(results, schema)


def test_images_csv_and_timing(tmp_path: Path) -> None:
    runs = {"source": rows({"A1": 0.8, "A2": None}, peak_memory_mib=50.0), "mgipt": rows({"A1": 0.5, "A2": 0.5})}
    write_images_csv(runs, tmp_path / "images.csv")
    with (tmp_path / "images.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["name"], row["method"], row["status"]) for row in found] == [
        ("A1", "source", "ok"),
        ("A2", "source", "failed"),
        ("A1", "mgipt", "ok"),
        ("A2", "mgipt", "ok"),
    ]
    assert float(found[0]["dsc_mean"]) == pytest.approx(0.7)
    assert (found[1]["dsc_disc"], found[1]["reason"]) == ("", "broken")
    methods = timing(runs)["methods"]
    assert methods["source"] == {"seconds": {"mean": 0.5, "median": 0.5}, "peak_memory_mib": 50.0}


def test_no_cell_of_the_table_is_a_formula(tmp_path: Path) -> None:
    names = ["=1+1", "+1", "-1", "@sum", "\tx", "\rx", "\nx", "eye", "'=1", ""]
    records = [{"name": name, "site": name, "status": "ok", "metrics": {"dsc": {"disc": -0.5}}} for name in names]
    write_images_csv(
        {"=method": [*records, {"name": "eye", "status": "failed", "reason": "=cmd|' /C calc'!A0"}]}, tmp_path / "t.csv"
    )
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert not [cell for row in found for cell in row.values() if cell.startswith(("=", "+", "@", "\t", "\r", "\n"))]
    assert [row["name"].removeprefix("'") for row in found[:8]] == names[:8]
    assert [row["name"] for row in found[8:]] == ["'=1", "", "eye"]
    assert found[0]["method"] == "'=method"
    assert float(found[0]["dsc_disc"]) == -0.5


def test_tables_of_a_protocol_hold_no_formula_either(tmp_path: Path) -> None:
    from mgipt_monai.utils.files import write_csv

    write_csv(tmp_path / "t.csv", [{"=HYPERLINK(1)": "=1", "mean": 2.5}])
    assert (tmp_path / "t.csv").read_text().splitlines() == ["'=HYPERLINK(1),mean", "'=1,2.5"]
