# SPDX-License-Identifier: Apache-2.0
"""The package does without what only some parts need, and those parts say so at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mgipt_monai import cli
from mgipt_monai.installed import require

BLOCKED = ("matplotlib", "jinja2", "scipy", "py_sod_metrics", "nnunetv2")


def test_package_is_imported_without_the_extras() -> None:
    # None in sys.modules: Python then takes the package for absent
    block = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{block}; import mgipt_monai.data.published, mgipt_monai.cli, mgipt_monai.demo"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--folder", "out"], 'matplotlib, which is not installed: pip install "mgipt_monai[demo]"'),
        (["benchmark", "in", "out"], "matplotlib, jinja2, scipy, pysodmetrics, which are not installed: "),
        (["protocol", "odoc", "--dataset_dir", "in", "--checkpoints", "in", "--output_dir", "out"], "pysodmetrics"),
        (["report", "in"], 'jinja2, matplotlib, which are not installed: pip install "mgipt_monai[benchmark]"'),
        (["records", "in/records.jsonl", "--html", "out"], "jinja2, matplotlib"),
        (["compare", "in", "in"], 'scipy, which is not installed: pip install "mgipt_monai[benchmark]"'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_absent_is_named_before_any_work(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for module in BLOCKED:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert 'pip install "mgipt_monai[' in captured.err
    assert not captured.out
    assert not Path("out").exists()


def test_nnunet_is_named_before_any_work() -> None:
    block = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))"
    words = ["nnunet-predict", "-i", "in", "-o", "out", "-m", "model"]
    done = subprocess.run(
        [sys.executable, "-c", f"{block}; from mgipt_monai import cli; cli.main({words})"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    message = 'this needs nnunetv2, which is not installed: pip install "mgipt_monai[nnunet]"'
    assert message in done.stderr.splitlines()[-1]


def test_modules_that_are_needed_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"this needs scipy, which is not installed: pip install \"mgipt_monai"
    ):
        require("benchmark")
    require("benchmark", "jinja2", "matplotlib")
