# SPDX-License-Identifier: Apache-2.0
"""The summary of record files: its table, its alerts, its page."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from mgipt_monai.report import record_summary as records
from mgipt_monai.report.record_page import record_charts
from mgipt_monai.report.record_summary import alerts, read_records, record_table

START = datetime(2026, 1, 30, 8, tzinfo=timezone.utc)


def row(i: int, **changes) -> dict:
    time = (START + timedelta(hours=i)).isoformat(timespec="seconds")
    loss = 1.0 + 0.1 * (i % 5)
    made = {"name": f"{i}", "site": "A", "status": "ok", "time": time, "seconds": 0.5, "forwards": 25, "backwards": 17}
    made |= {"loss_before": loss, "loss_after": loss / 2, "prompt_norm": 0.1, "decision": "adapted", "learned": True}
    return made | changes


def failed(i: int) -> dict:
    return {"name": f"{i}", "site": "A", "status": "failed", "reason": "empty", "seconds": 0.1, "time": row(i)["time"]}


def old(i: int) -> dict:
    return {"name": f"{i}", "site": "B", "status": "ok", "seconds": 1.5, "metrics": {"dsc": {"disc": 0.9, "cup": None}}}


def write(path: Path, rows: list[dict], tail: bytes = b"") -> Path:
    path.write_bytes("".join(json.dumps(each) + "\n" for each in rows).encode() + tail)
    return path


def test_table_by_hand() -> None:
    rows = [row(0), row(1, decision="unadapted", learned=False, seconds=1.5), failed(2), row(50), old(1)]
    heads, *lines = record_table(rows, "month")
    assert heads == ["site", "month", "images", "failed", "adapted", "unadapted", "learned", "s/image", "F", "DSC"]
    assert lines == [
        ["A", "2026-01", "2", "1", "1", "1", "1", "1.00", "42.0", "-"],
        ["A", "2026-02", "1", "0", "1", "0", "1", "0.50", "42.0", "-"],
        ["B", "-", "1", "0", "-", "-", "-", "1.50", "-", "90.00"],
        ["all", "", "4", "1", "2", "1", "2", "1.00", "42.0", "90.00"],
    ]
    assert [line[1] for line in record_table(rows, "day")[1:3]] == ["2026-01-30", "2026-02-01"]


def test_steady_stream_has_no_alerts() -> None:
    assert alerts([row(i) for i in range(200)]) == []
    assert alerts([]) == []


@pytest.mark.parametrize(
    ("latest", "words"),
    [
        ([failed(i) for i in range(120, 122)], "2 of the latest 20 images failed"),
        (
            [row(i, decision="unadapted") for i in range(120, 125)],
            "the guard fell back for 25 % of the latest 20 images, 0 % of the 100 before",
        ),
        (
            [row(i, loss_before=9.0) for i in range(120, 140)],
            "standard deviations above that of the 120 before: another scanner, or other images?",
        ),
        ([row(120, prompt_norm=16.5)], "prompts are 16.5 from ones: consider a rollback or a new stream"),
        ([row(150)], "no image for 1.3 days after 2026-02-04 07:00 UTC"),
    ],
)
def test_each_alert_by_hand(latest: list[dict], words: str) -> None:
    (alert,) = alerts([*(row(i) for i in range(120)), *latest])
    assert alert.endswith(words)


def monitored(i: int, alarm: bool, site: str = "A") -> dict:
    evidence = 1.5 if alarm else 0.1 * i
    monitor = {
        "alarm": alarm,
        "signal": "brightness",
        "evidence_against": evidence,
        "limit": 1.3,
        "p": {},
        "signals": {},
    }
    return row(i, site=site, monitor=monitor)


def test_alarm_for_drift_says_since_when_and_what_to_do() -> None:
    rows = [monitored(i, alarm=i >= 5) for i in range(8)]
    (alert,) = alerts(rows)
    assert alert == (
        "the images of A have changed (brightness), at 5 at the latest: label ten images from after 5 and run mgipt "
        "commission again; until then the certificate does not hold"
    )
    # without a monitor in between, and at another site
    assert alerts([*rows, row(8), monitored(9, alarm=False, site="B")]) == [alert]
    assert alerts([*rows, monitored(8, alarm=False)]) == []
    again = [*rows, monitored(8, alarm=False), monitored(9, alarm=True), monitored(9, alarm=True, site="B")]
    assert [found.split(" (")[0] for found in alerts(again)] == [
        "the images of A have changed",
        "the images of B have changed",
    ]
    assert "at 9 at the latest" in alerts(again)[0]


def test_page_shows_evidence_of_drift(tmp_path: Path) -> None:
    path = write(tmp_path / "records.jsonl", [monitored(0, alarm=False), row(1), monitored(2, alarm=True)])
    records.main([str(path), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Evidence of drift</h2>" in page
    assert "run mgipt commission again" in page


def test_table_and_chart_agree_on_what_was_adapted() -> None:
    rows = [row(0, decision="adapted"), row(1, decision="unadapted"), row(2, decision="adapted"), failed(3)]
    undecided = [{key: value for key, value in one.items() if key != "decision"} for one in map(row, range(4, 6))]
    assert record_table(rows + undecided)[-1][2:6] == ["5", "1", "2", "1"]
    assert "1 failed, 2 no decision, 1 unadapted, 2 adapted" in record_charts(rows + undecided)[0].alt
    assert "0 failed, 2 no decision." in record_charts(undecided)[0].alt


@pytest.mark.parametrize("monitor", [3, {}, {"alarm": "yes"}, {"alarm": True, "evidence_against": "much"}])
def test_a_monitor_with_other_types_does_no_harm(tmp_path: Path, monitor: object) -> None:
    path = write(tmp_path / "records.jsonl", [row(0), row(1, monitor=monitor)])
    records.main([str(path), "--html", str(tmp_path / "page.html")])


def test_quality_is_drawn_and_odd_images_are_an_alert() -> None:
    rows = [row(i, quality={"disc": 0.9, "cup": 0.7}, elsewhere=False) for i in range(5)]
    assert "Quality" in [chart.title for chart in record_charts(rows)]
    assert "Quality" not in [chart.title for chart in record_charts([row(0), row(1)])]
    assert not [alert for alert in alerts(rows) if "unlike" in alert]
    rows[-1] |= {"elsewhere": True, "name": "A/brain"}
    assert "1 of the latest 5 images are unlike those before, the last one A/brain" in " ".join(alerts(rows))


@pytest.mark.parametrize("figures", [{"quality": {"disc": None}}, {"quality": [0.5]}, {"agreement": {"disc": "all"}}])
def test_figures_that_are_no_numbers_are_no_record(tmp_path: Path, figures: dict) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"name": "a", "status": "ok", "seconds": 1.0, **figures}) + "\n")
    assert read_records([path]) == ([], 1)


def test_changes_below_the_limits_are_no_alerts() -> None:
    rows = [*(row(i) for i in range(120)), failed(120), *(row(i, decision="unadapted") for i in range(121, 124))]
    assert alerts([*rows, row(124, prompt_norm=15.9), row(147)]) == []


def test_few_images_are_not_compared_with_others() -> None:
    assert alerts([row(i, decision="unadapted", loss_before=float(i + 1)) for i in range(30)]) == []


def test_many_gaps_are_counted() -> None:
    found = alerts([row(i + 100 * (i // 10)) for i in range(80)])
    assert len(found) == 6
    assert found[-1] == "2 more such gaps before those"


def test_unreadable_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    bad = [b"\xff\xfe", b"3", b"[]", b'{"name": "no status"}', b'{"status": "ok", "seconds": "long"}']
    bad += [b'{"status": "ok", "time": "yesterday"}', b'{"status": "ok", "time": "2026-01-01T00:00:00"}', b'{"status']
    path = write(tmp_path / "records.jsonl", [row(0), row(1)], b"\n" + b"\n".join(bad))
    rows, skipped = read_records([path])
    assert ([each["name"] for each in rows], skipped) == (["0", "1"], len(bad))


def test_files_are_merged_by_time_where_all_have_one(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", [row(0), row(2)])
    two = write(tmp_path / "2.jsonl", [row(1), row(3)])
    assert [each["name"] for each in read_records([one, two])[0]] == ["0", "1", "2", "3"]
    three = write(tmp_path / "3.jsonl", [old(9)])
    assert [each["name"] for each in read_records([two, one, three])[0]] == ["1", "3", "0", "2", "9"]


@pytest.mark.parametrize(
    ("rows", "charts"),
    [
        ([row(i) for i in range(30)], 3),
        ([old(i) for i in range(3)], 1),
        ([failed(i) for i in range(3)], 1),
        ([row(0), old(1)], 3),
        ([], 0),
    ],
    ids=["new", "old", "failed", "mixed", "empty"],
)
def test_command_prints_and_writes_one_page(
    tmp_path: Path, rows: list[dict], charts: int, capsys: pytest.CaptureFixture
) -> None:
    path = write(tmp_path / "records.jsonl", rows)
    pages = []
    for _ in range(2):
        records.main([str(path), "--html", str(tmp_path / "page.html")])
        pages.append((tmp_path / "page.html").read_bytes())
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:3] == ["site", "month", "images"]
    assert pages[0] == pages[1]
    page = pages[0].decode()
    assert "http" not in page
    assert page.count("<img") == charts


def test_page_escapes_what_records_say(tmp_path: Path) -> None:
    path = write(tmp_path / "records.jsonl", [row(0, site="<b>A")])
    records.main([str(path), "--by", "day", "--html", str(tmp_path / "page.html")])
    assert "&lt;b&gt;A" in (tmp_path / "page.html").read_text()


def test_absent_file_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        records.main(["absent.jsonl"])
    assert "absent.jsonl" in capsys.readouterr().err
