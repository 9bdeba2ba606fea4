# SPDX-License-Identifier: Apache-2.0
"""The command ``mgipt``: it does what MONAI's own command does, and says what is wrong before any work."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import mgipt_monai
from mgipt_monai import RecordFile, Source, cli, find_stream
from mgipt_monai.bundle_runs import BundleRun, as_path, errors_last, read_settings
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from mgipt_monai.installed import find_config, installed, overlays, presets
from mgipt_monai.methods import Commissioned, InterpolationWeights, SiteSetting
from mgipt_monai.networks.correction import Correction
from mgipt_monai.utils.outputs import MANIFEST
from mgipt_monai.utils.provenance import fingerprint
from tests.bundle.conftest import BUNDLE, ONE_THREAD, QUICK, ROOT
from tests.conftest import without_times
from tests.module_runs import run_module

SMALL = [word for key, value in QUICK.items() for word in (f"--{key}", value)]


def mgipt(*words: object, fails: bool = False) -> subprocess.CompletedProcess:
    done = run_module("mgipt_monai", [str(word) for word in words])
    assert bool(done.returncode) == fails, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def last_line(done: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of three photographs of 64 px, with masks."""
    folder = tmp_path_factory.mktemp("sites")
    write_demo_stream(folder, [CAMERAS["warm_vignetted"], CAMERAS["cold_noisy"]], count=3, size=64)
    return folder


@pytest.fixture(scope="module")
def photographs(sites: Path) -> Path:
    return sites / "cold_noisy" / "images"


@pytest.fixture
def settings(photographs: Path, tmp_path: Path) -> list[str]:
    """The least that predict takes."""
    return ["predict", str(photographs), str(tmp_path / "masks"), *SMALL]


def test_predict_writes_what_the_printed_command_of_monai_writes(photographs: Path, tmp_path: Path) -> None:
    # a folder whose name MONAI would take for a number, and one with characters of the shell and of its configs
    source = tmp_path / "2024"
    source.symlink_to(photographs)
    masks = tmp_path / "masks of #1's site"
    words = ["predict", source, masks, "--config", "methods/vptta", "guard", "--preset", "fast", *SMALL]
    words += ["--sites", "None", "--seed", "3", "--limit=2"]
    mgipt(*words)
    here = {path.name: path.read_bytes() for path in masks.glob("*.png")}
    rows = without_times(masks / "records.jsonl")
    assert len(here) == len(rows) == 2
    for path in masks.iterdir():
        path.unlink()

    command = mgipt(*words, "--print-command").stdout
    assert not list(masks.iterdir())
    python, dash_m, module, *arguments = shlex.split(command)
    assert (python, dash_m, module) == ("python", "-m", "monai.bundle")
    done = run_module(module, arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name: path.read_bytes() for path in masks.glob("*.png")} == here
    assert without_times(masks / "records.jsonl") == rows


def test_evaluate_trains_and_measures_source_images(sites: Path, tmp_path: Path) -> None:
    weights = tmp_path / "trained" / "model.pt"
    small = ["--spatial_size", "[64,64]"]
    mgipt("train", sites, weights.parent, "--sites", "[cold_noisy]", "--max_epochs", "2", *small)
    done = mgipt(
        "evaluate", sites, tmp_path / "out", "--weights", weights, "--limit", 1, "--config", "methods/bn", *small
    )
    assert "worst tenth" in done.stdout
    assert "demo's" not in done.stderr
    assert all("dsc" in row["metrics"] for row in RecordFile(tmp_path / "out" / "records.jsonl").read())
    for name in ("source-statistics", "calibrate"):
        mgipt(name, sites / "cold_noisy", tmp_path / f"{name}.pt", "--weights", weights, *small)
        mgipt_monai.SourceStatistics.load(tmp_path / f"{name}.pt")
    ttn = tmp_path / "ttn.pt"
    words = ["--weights", weights, "--sites", "[cold_noisy]", *small]
    mgipt("interpolation-weights", sites, ttn, "--select_channels", True, *words)
    assert {float(each) for layer in InterpolationWeights.load(ttn).layers.values() for each in layer} == {0.0, 1.0}
    mgipt("interpolation-weights", sites, ttn, "--max_epochs", 1, *words)
    mgipt("evaluate", sites, tmp_path / "ttn", "--config", "methods/ttn", "--interpolation_path", ttn, *words)
    assert all(row["forwards"] == 2 for row in RecordFile(tmp_path / "ttn" / "records.jsonl").read())
    words[1] = installed() / "models" / "model.pt"  # another network
    done = mgipt(
        "evaluate", sites, tmp_path / "x", "--config", "methods/ttn", "--interpolation_path", ttn, *words, fails=True
    )
    assert "was made with other weights" in done.stderr


def test_suggest_writes_a_datalist_for_the_masks_and_nothing_else(photographs: Path, tmp_path: Path) -> None:
    path = tmp_path / "to_label.json"
    words = ["suggest", photographs, path, "--spatial_size", "[64,64]"]
    done = mgipt(*words, "-k", 2)
    chosen = find_stream(path)
    assert len(chosen) == 2
    assert [line.split(": ")[0][4:] for line in done.stdout.splitlines()[-2:]] == [item["name"] for item in chosen]
    assert {file.name for file in tmp_path.iterdir()} == {path.name, MANIFEST}
    first = path.read_bytes()
    mgipt(*words, "--k", 2)
    assert path.read_bytes() == first
    assert "-k" in mgipt("suggest", "--help").stdout
    other = tmp_path / "other.json"
    other.write_text("mine")
    for words, message in (
        ([photographs, other], "was not written by a run"),
        ([photographs, tmp_path / "list.txt"], "must end in .json"),
        ([photographs, path, "-k", "2", "--k", "3"], "k is given twice"),
        ([photographs, path, "-k", "0"], "k must be at least 1"),
    ):
        assert message in last_line(mgipt("suggest", *words, fails=True))
    assert other.read_text() == "mine"


def test_export_writes_what_other_programs_load(tmp_path: Path) -> None:
    network = BundleRun([BUNDLE / "configs" / "inference.yaml"]).value("network_def")
    mgipt_monai.load_source_weights(network, installed() / "models" / "model.pt")
    network.eval()
    offset = Correction(torch.tensor([1.0, -2.0]), temperature=0.5)
    site = SiteSetting(fingerprint(network), {"class": "Source"}, offset)
    (tmp_path / "site").mkdir()
    site.save(tmp_path / "site" / "site.pt")
    image, settings = torch.rand(1, 3, 64, 64), ["--device", "cpu"]
    expected = Commissioned(Source(network), site)(image)
    for ending, load in (("ts", torch.jit.load), ("pt", lambda path: torch.load(path, weights_only=True))):
        path = tmp_path / "out" / f"network.{ending}"
        done = mgipt("export", tmp_path / "site", path, *settings)
        assert done.stdout.splitlines()[-1] == str(path)
        found = load(path)
        if ending == "pt":
            network.load_state_dict(found)
            found = network
        assert torch.allclose(found.eval()(image), expected, atol=1e-5)
    other = tmp_path / "other.ts"
    other.write_text("mine")
    for words, message in (
        ([tmp_path / "site", other], "was not written by a run"),
        ([tmp_path / "site", tmp_path / "network.trt"], "must end in .ts (TorchScript), .onnx (ONNX) or .pt"),
        ([tmp_path, tmp_path / "new.ts"], "commissioning deployed no correction"),
        ([tmp_path / "site", tmp_path / "new.ts", "--weights", path], "was commissioned with other weights"),
    ):
        assert message in last_line(mgipt("export", *words, *settings, fails=True))
    assert other.read_text() == "mine"
    assert not (tmp_path / "new.ts").exists()


def test_benchmark_writes_a_report_that_the_other_commands_read(sites: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = mgipt("benchmark", sites, out, "--compare", "[source, mgipt]", "--limit", "1", *SMALL)
    assert "the network is the demo's" in done.stderr
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert mgipt("report", out).stdout.strip() == str(out / "report.html")
    assert (out / "report.html").read_bytes() == page
    table = mgipt("compare", out).stdout
    assert mgipt("compare", out / "source", out / "mgipt").stdout.split("\n\n")[0] == table.split("\n\n")[0]
    assert "cold_noisy" in mgipt("records", out / "mgipt" / "records.jsonl").stdout
    assert "images done: 2" in mgipt("state", "show", out / "mgipt" / "adaptation_state.pt").stdout
    assert "there is no metric iou: choose from dsc" in last_line(mgipt("compare", out, "--metric", "iou", fails=True))


def test_protocol_takes_names_and_writes_its_tables_anew(sites: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "cold_noisy.pt").symlink_to(BUNDLE / "models" / "model.pt")
    words = ["--checkpoints", tmp_path / "checkpoints", "--output_dir", tmp_path / "out", "--compare", "[source,mgipt]"]
    words += ["--sources", "[cold_noisy]", "--variants", "configs/ablations/aip_*.yaml", "--limit", "1", *SMALL]
    done = mgipt("protocol", "guard", "--dataset_dir", sites, *words)
    assert "| aip_only |" in done.stdout
    assert done.stdout.endswith(mgipt("protocol", tmp_path / "out").stdout)
    done = mgipt("protocol", "guard", "--dataset_dir", sites, *words, "--limt", "1", fails=True)
    assert last_line(done).startswith("error: there is no key limt in the configs (did you mean limit?)")
    assert "--output_dir" in last_line(mgipt("protocol", "odoc", "--dataset_dir", sites, fails=True))


def test_failed_images_are_the_last_lines(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").symlink_to(photographs / "eye_000.png")
    (tmp_path / "in" / "bad.png").write_text("no image")
    words = ["predict", tmp_path / "in", tmp_path / "out", *SMALL, "--overwrite", "True"]
    done = mgipt(*words, fails=True)
    assert done.stderr.splitlines()[-2] == "error: 1 of 2 images failed, the others are done:"
    assert "bad.png cannot be read as an image" in last_line(done)
    assert "ERROR mgipt_monai.stream.progress: image 1: bad failed" in done.stdout
    assert "terminating" not in done.stdout
    done = mgipt(*words, "--debug", fails=True)
    assert "Traceback" in done.stderr
    (tmp_path / "in" / "bad.png").rename(tmp_path / "in" / "worse.png")  # it now comes when there is a progress bar
    words += ["--stop_on_failure", "True"]
    assert "worse.png cannot be read as an image" in last_line(mgipt(*words, fails=True))
    assert "terminating" in mgipt(*words, "--debug", fails=True).stdout


def test_weights_that_do_not_fit_end_with_the_fix(settings: list[str], tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    done = mgipt(*settings, "--weights", tmp_path / "w.pt", fails=True)
    assert "w.pt does not fit the network UNet" in last_line(done)
    assert "set network_def" in last_line(done)


def test_a_file_that_is_no_image_ends_training_in_one_line(photographs: Path, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "site" / folder).mkdir(parents=True)
        (tmp_path / "site" / folder / "a.png").write_text("no image")
    (tmp_path / "site" / "images" / "b.png").symlink_to(photographs / "eye_000.png")
    words = ["train", tmp_path / "site", tmp_path / "out"]
    assert "1 of 2 images have no mask, the first " in last_line(mgipt(*words, fails=True))
    (tmp_path / "site" / "masks" / "b.png").symlink_to(photographs.parent / "masks" / "eye_000.png")
    assert last_line(mgipt(*words, fails=True)).endswith("copy it again, or convert it to PNG or NIfTI")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--colour_mode", "RGB"], "there is no key colour_mode in the configs (did you mean color_mode?)"),
        (["--weigths", "w.pt"], "(did you mean weights?)"),
        (["--guard#warm_up", "5"], "--guard#warm_up cannot be set: guard is None in the configs"),
        (["--handlers#7#resume", "True"], "--handlers#7#resume cannot be set"),
        (["--resume", "false"], "--resume is True or False, got false"),
        (["--limit"], "--limit has no value"),
        (["--limit", "null"], "write --limit None"),
        (["--preset", "stedy"], "there is no preset stedy (did you mean steady?): choose from paper, fast"),
        (["--config", "bn"], "there is no config bn (did you mean methods/bn?)"),
        (["--config", "my.yaml"], "there is no config my.yaml: give a .yaml or .json file, or one of "),
        (["--weights", "none.pt"], "there are no weights at none.pt: give --weights"),
        (["--bundle", "nowhere"], "there is no nowhere/configs/inference.yaml: give --bundle a folder such as"),
        (["--output_dir", "elsewhere"], "output_dir is given twice"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_any_work(
    words: list[str], message: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*settings, *words])
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "masks").exists()


def test_folders_that_are_none_are_refused(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, message in (
        (["absent", str(tmp_path / "out")], "there is nothing at absent: give a folder of images"),
        ([str(photographs), __file__], f"{__file__} is a file: give a folder to write to"),
        ([str(photographs / "*.jpg"), str(tmp_path / "out")], "there is nothing at"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["predict", *words])
        assert message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit) as caught:
        cli.main(["predict", str(photographs)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("the following arguments are required: MASKS")


def test_commands_have_help_with_an_example(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    names = [*cli.BUNDLE_COMMANDS, *cli.ALIASES, *cli.MODULES, *cli.FOLDER_COMMANDS]
    for name in names:
        assert name in listed or name in cli.ALIASES
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        if name.startswith("nnunet") and find_spec("nnunetv2") is None:
            assert 'pip install "mgipt_monai[nnunet]"' in capsys.readouterr().err
            continue
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert f"example: mgipt {cli.ALIASES.get(name, name)} " in shown or name == "path"
        assert f"usage: mgipt {cli.ALIASES.get(name, name)} " in shown
    assert cli.main([]) == 2
    assert capsys.readouterr().out == listed
    assert cli.main(["predcit"]) == 2
    assert "there is no command predcit (did you mean predict?)" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mgipt {mgipt_monai.__version__}\n"


def test_examples_of_the_help_are_commands(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BundleRun, "check", lambda run: None)
    monkeypatch.setattr(cli, "_check_masks", lambda run: None)
    monkeypatch.setattr(cli, "find_config", lambda name: find_config("guard" if name == "my_network.yaml" else name))
    for command in cli.BUNDLE_COMMANDS.values():
        cli.main([*shlex.split(command.example)[1:], "--print-command"])
        assert capsys.readouterr().out.startswith("python -m monai.bundle run --config_file ")


def test_init_copies_what_runs_and_never_writes_over(settings: list[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mgipt("init", mine)
    links = [path for path in mine.rglob("*") if path.is_symlink()]
    assert not links
    assert {path.name for path in (mine / "bundle" / "models").iterdir()} == {"model.pt", "model.pt.sha256"}
    for name, path in overlays().items():
        assert (mine / "configs" / f"{name}.yaml").read_bytes() == path.read_bytes()
    inference = mine / "bundle" / "configs" / "inference.yaml"
    inference.write_text(inference.read_text().replace("limit: null", "limit: 1"))
    done = mgipt("init", mine, fails=True)
    assert "nothing is written over" in last_line(done)
    mgipt(*settings, "--bundle", mine / "bundle", "--config", mine / "configs" / "methods" / "source.yaml")
    assert len(RecordFile(tmp_path / "masks" / "records.jsonl").read()) == 1


@pytest.mark.parametrize(
    "words",
    [["--config", "guard", "methods/bn", "in", "out"], ["in", "--config", "guard", "methods/bn", "out"]],
    ids=str,
)
def test_folders_behind_the_configs_are_folders(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    cli.main(["predict", *words, "--print-command"])
    printed = capsys.readouterr().out
    assert "guard.yaml','" in printed
    assert "--dataset_dir in --output_dir out" in printed
    with pytest.raises(SystemExit):
        cli.main(["predict", "--config", "guard", "methods/bn"])
    assert "required: IMAGES, MASKS: put them before --config, which takes" in capsys.readouterr().err


def test_path_prints_folders(capsys: pytest.CaptureFixture) -> None:
    for words, folder in (([], "bundle"), (["bundle"], "bundle"), (["configs"], "configs")):
        cli.main(["path", *words])
        assert capsys.readouterr().out == f"{ROOT / folder}\n"


def test_configs_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = installed("configs")
    for name in ("guard", "guard.yaml", "configs/guard.yaml"):
        assert find_config(name).samefile(root / "guard.yaml")
    assert find_config("odoc", "protocols") == root / "protocols" / "odoc.yaml"
    monkeypatch.chdir(tmp_path)
    Path("guard.yaml").write_text("guard: null")
    assert find_config("guard.yaml") == Path("guard.yaml")
    assert find_config("guard") == root / "guard.yaml"
    assert presets()["paper"] is None
    assert presets()["steady"] == root / "presets" / "steady.yaml"


def test_values_are_read_as_monai_reads_them() -> None:
    config = {"sites": None, "lr": 0.1, "resume": False, "network_def": {"channels": [1]}}
    written = {"sites": "[a,b]", "lr": "1e-3", "resume": None, "network_def::channels": "[8, 16]"}
    assert read_settings(written, config) == {
        "sites": ["a", "b"],
        "lr": 0.001,
        "resume": True,
        "network_def::channels": [8, 16],
    }
    assert read_settings({"resume": "$1 > 0", "run_id": "1", "sites": "None"}, config) == {
        "resume": "$1 > 0",
        "run_id": "1",
        "sites": "$None",
    }


def test_any_path_stays_itself_in_a_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output_dir: out")
    for path in ("a#b", "@a", "$a", "%a@b#c", "plain", "it's", 'two "words"#', "back\\slash#"):
        assert BundleRun([tmp_path / "c.yaml"], {"output_dir": as_path(path)}).value("output_dir") == path


def test_errors_of_a_program_are_named_and_what_is_optional_ends_with_its_fix(capsys: pytest.CaptureFixture) -> None:
    from monai.utils import optional_import

    absent, _ = optional_import("no_such_module", descriptor="{}: pip install it")
    for error, message in (
        (lambda: {}["a"], "error: KeyError: 'a' (--debug shows where)\n"),
        (lambda: absent.anything, "error: import no_such_module: pip install it (No module named 'no_such_module').\n"),
    ):
        with pytest.raises(SystemExit), errors_last():
            error()
        assert capsys.readouterr().err == message


def test_ctrl_c_ends_with_one_line_and_the_run_goes_on(photographs: Path, tmp_path: Path) -> None:
    words = ["predict", photographs, tmp_path, "--spatial_size", "[64,64]", "--preset", "steady", "--rounds", "20"]
    command = [sys.executable, "-m", "mgipt_monai", *map(str, words)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ONE_THREAD,
        # a shell's background jobs, and what they start, ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    records, until = tmp_path / "records.jsonl", time.monotonic() + 120
    while not (records.exists() and records.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: what is done is kept, and --resume True goes on from there"
    assert "Traceback" not in out + err
    assert "terminating" not in out
    assert len(RecordFile(records).read()) < 60
    mgipt(*words, "--resume", "True")
    assert len(RecordFile(records).read()) == 60
