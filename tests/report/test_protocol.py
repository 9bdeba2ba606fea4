# SPDX-License-Identifier: Apache-2.0
"""The protocol's table, from made-up results whose figures can be worked out by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mgipt_monai.benchmark import summarise
from mgipt_monai.benchmark.protocol import main, protocol_rows, write_tables


def results(scores: dict[str, list[list[float]]], failed: int = 0) -> dict:
    """Results of methods over a stream, given per method and round the DSC of each image."""
    runs = {}
    for method, rounds in scores.items():
        rows = []
        for number, values in enumerate(rounds, 1):
            for i, value in enumerate(values):
                row = {"name": f"{f'round_{number}/' if number > 1 else ''}B/{i}", "site": "B", "round": number}
                metrics = {"dsc": {"disc": value + 0.1, "cup": value - 0.1}, "hd95": {"disc": 10 * number}}
                rows.append({**row, "status": "ok", "metrics": metrics, "seconds": 1.0})
        for row in rows[:failed]:
            row |= {"status": "failed", "reason": "broken", "metrics": {}}
        runs[method] = rows
    return summarise(runs)


def protocol(folder: Path, runs: dict[str, dict | None], published: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "protocol.json").write_text(json.dumps({"sources": list(runs), "published": published or {}}))
    for source, run in runs.items():
        if run is not None:
            (folder / source).mkdir()
            (folder / source / "results.json").write_text(json.dumps(run))
    return folder


A = results({"source": [[0.5, 0.7]], "mgipt": [[0.6, 0.9]]})
B = results({"source": [[0.3, 0.3, 0.6]], "mgipt": [[0.2, 0.5, 0.8]]})
PUBLISHED = {"dsc": {"mgipt": {"first": 72.35, "rounds": 71.0, "degradation": 0.07}}}


def test_a_row_has_the_mean_over_images_for_each_source_and_the_mean_over_sources() -> None:
    source, mgipt = protocol_rows({"A": A, "B": B})
    assert source == {
        "method": "source",
        "A": pytest.approx(60),
        "B": pytest.approx(40),
        "mean": pytest.approx(50),
    }
    assert [mgipt[column] for column in ("A", "B", "mean")] == pytest.approx([75, 50, 62.5])


def test_rounds_give_the_first_their_mean_and_the_degradation() -> None:
    runs = {
        "A": results({"tent": [[0.9], [0.6], [0.3]]}),
        "B": results({"tent": [[0.5], [0.5], [0.8]]}),
    }
    (row,) = protocol_rows(runs, published={"tent": {"first": 68.13, "rounds": 63.01, "degradation": 5.12}})
    assert [row["A"], row["B"], row["mean"]] == pytest.approx([90, 50, 70])
    assert row["mean of 3 rounds"] == pytest.approx((60 + 60) / 2)
    assert row["degradation"] == pytest.approx((30 - 10) / 2)
    paper = ("published", "published, mean of 3 rounds", "published, degradation")
    assert [row[column] for column in paper] == [68.13, 63.01, 5.12]
    # the published mean of three rounds says nothing about two
    runs = {"A": results({"tent": [[0.9], [0.6]]})}
    (row,) = protocol_rows(runs, published={"tent": {"first": 68.13, "rounds": 63.01}})
    assert list(row) == ["method", "A", "mean", "mean of 2 rounds", "degradation", "published"]


def test_distances_are_not_in_percent_and_their_growth_is_degradation() -> None:
    (row,) = protocol_rows({"A": results({"tent": [[0.9], [0.6]]})}, "hd95")
    assert (row["A"], row["mean of 2 rounds"], row["degradation"]) == (10, 15, 5)


def test_a_source_that_is_not_done_leaves_its_cell_and_the_mean_empty(tmp_path: Path) -> None:
    text = write_tables(protocol(tmp_path / "out", {"A": A, "B": None}, PUBLISHED))
    assert "| method | A | B | mean | published |" in text
    assert "| source | 60.00 |  |  |  |" in text
    assert "| mgipt | 75.00 |  |  | 72.35 |" in text
    assert "- B: not done yet" in text


def test_tables_are_written_and_printed_and_failures_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = results({"source": [[0.3, 0.4]], "mgipt": [[0.2, 0.5]]}, failed=1)
    folder = protocol(tmp_path / "out", {"A": A, "B": broken}, PUBLISHED)
    main([str(folder)])
    printed = capsys.readouterr().out
    assert printed.strip() == (folder / "table.md").read_text().strip()
    assert "DSC, %, by source site:" in printed
    assert "- A: 2 images of B\n" in printed
    assert "- B: 2 images of B, 1 of them failed with a method and excluded for all" in printed
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["metric", "method", "A", "B", "mean", "published"]
    assert [(row["metric"], row["method"], row["published"]) for row in rows] == [
        ("dsc", "source", ""),
        ("dsc", "mgipt", "72.35"),
    ]
    assert float(rows[1]["mean"]) == pytest.approx((75 + 50) / 2)


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    other = results({"source": [[0.5]]})
    with pytest.raises(ValueError, match="B ran other methods or rounds than A"):
        protocol_rows({"A": A, "B": other})
    with pytest.raises(FileNotFoundError, match=r"there is no protocol\.json in .*none"):
        write_tables(tmp_path / "none")
