# SPDX-License-Identifier: Apache-2.0
"""What the documents say holds: their Python runs, their links and files exist, their commands and options too."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser

from mgipt_monai import cli
from mgipt_monai.benchmark.protocol import run_protocol
from tests.bundle.conftest import ONE_THREAD

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bundle/docs/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
NOT_RUN = "<!-- not run"
BLOCK = re.compile(
    rf"^(?P<note>{NOT_RUN}[^\n]*\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE
)
NAMED = re.compile(
    r"(?<![\w/])((?:bundle/configs|configs|mgipt_monai|tests|docs|benchmarks|examples|label)/[\w/.-]+"
    r"\.(?:yaml|py|md|json|png|jpg|ipynb|txt))"
)
PROTOCOL = ("inference", "evaluate", "benchmark")
OPTIONS = {"config_file", "bundle_root", "tracking"}


def of(*pages: Path, language: str) -> list:
    """Return a parameter for each page that has blocks of a language."""
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)))
        for page in pages
        if any(block["language"] == language for block in blocks(page))
    ]


def blocks(page: Path) -> list[re.Match]:
    return list(BLOCK.finditer(page.read_text()))


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as Python-Markdown and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in a page's blocks for the shell."""
    for block in blocks(page):
        if block["language"] == "bash":
            for line in block["code"].replace("\\\n", "").splitlines():
                yield shlex.split(re.sub(r"(^|\s)#.*", "", line))  # an option of the bundle may have a # in it


@pytest.mark.parametrize("page", of(*PAGES, language="python"))
def test_python_of_a_page_runs_in_one_go(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(page):
        if block["language"] == "python" and not block["note"]:
            exec(block["code"], names)


def test_every_host_takes_five_lines_at_most() -> None:
    _given, *hosts = blocks(DOCS / "how-to" / "other-hosts.md")
    assert len(hosts) == 9
    assert max(sum(bool(line) for line in block["code"].splitlines()) for block in hosts) <= 5


@pytest.mark.parametrize("page", of(*PAGES, language="yaml"))
def test_yaml_of_a_page_is_a_config(page: Path) -> None:
    for block in blocks(page):
        if block["language"] == "yaml":
            assert isinstance(yaml.safe_load(block["code"]), dict)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_reads_well_in_any_editor(page: Path) -> None:
    assert {block["language"] for block in blocks(page)} <= {"bash", "python", "text", "yaml"}
    long = [line for line in prose(page).splitlines() if len(line) > 120 and not line.lstrip().startswith(("|", "!["))]
    assert not long
    assert not re.search(r"\bTTA\b", prose(page)), "write test-time adaptation"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
        # a page of the site is read without the files around it
        assert DOCS not in page.parents or DOCS in target.parents, link


# the changelog names files as they were
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    places = (ROOT, ROOT / "bundle") if "bundle" in page.parts else (ROOT,)
    missing = {name for name in NAMED.findall(page.read_text()) if not any((place / name).exists() for place in places)}
    assert not missing


class UnderstoodError(BaseException):
    """A command's options and configs are good; next would be its images and weights, which are not there."""


def understood(run: cli.BundleRun) -> None:
    raise UnderstoodError


@pytest.mark.parametrize("page", of(*PAGES, language="bash"))
def test_commands_that_a_page_gives_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.BundleRun, "check", understood)
    for words in command_lines(page):
        if "monai.bundle" in words:
            of_the_bundle = {"dataset_dir", "evaluator", "dataset", "dataloader", "validate"}
            check_keys(words, configs=bundle_configs(words), free=of_the_bundle)
        elif "mgipt" in words:
            name, *arguments = words[words.index("mgipt") + 1 :]
            if name == "init":
                assert cli.main([name, *arguments]) == 0
            elif name in cli.BUNDLE_COMMANDS:
                for word in arguments:
                    if word.startswith("./"):  # the reader's own config
                        Path(word).parent.mkdir(exist_ok=True)
                        Path(word).write_text("seed: 0\n")
                in_a_loop = [word.replace("$method", "bn") for word in arguments]
                with pytest.raises(UnderstoodError):
                    cli.main([name, *in_a_loop])
            elif name == "protocol":
                overlays = [ROOT / word for word in arguments if word.startswith("configs/") and "*" not in word]
                check_keys(
                    words,
                    [*(ROOT / "bundle" / "configs" / f"{base}.yaml" for base in PROTOCOL), *overlays],
                    free=set(inspect.signature(run_protocol).parameters),
                )


def bundle_configs(words: list[str]) -> list[Path]:
    """Return the configs of a run of MONAI's own command; those of another bundle are left out."""
    given = words[words.index("--config_file") + 1]
    files = ast.literal_eval(given) if given.startswith("[") else [given]
    places = {"$(mgipt path configs)/": "configs/", "$(mgipt path)/": "bundle/"}
    for word, folder in places.items():
        files = [file.replace(word, folder) for file in files]
    files = [f"bundle/{file}" if (ROOT / "bundle" / file).exists() else file for file in files]
    return [ROOT / file for file in files if not file.startswith("BUNDLE/")]


def check_keys(words: list[str], configs: list[Path], free: set[str]) -> None:
    assert all(config.exists() for config in configs), words
    config = ConfigParser.load_config_files([str(config) for config in configs]) if configs else {}
    roots = {key.lstrip("+").partition("#")[0] for key in config}
    for word in words:
        if word.startswith("--") and word not in ("--standalone", "--nproc_per_node"):
            root, *rest = word[2:].split("#")
            assert root in roots | free | OPTIONS, word
            entry = config.get(root)
            if root in free and entry is None:  # the other bundle's
                continue
            for key in rest[:-1]:  # the last one may be new: an argument that the config leaves at its default
                entry = entry[int(key)] if isinstance(entry, list) else entry[key]
            assert not rest or root in free or isinstance(entry, (dict, list)), f"{word}: nothing there to set it in"


def test_commands_that_the_pages_give_exist() -> None:
    asked = {words[words.index("mgipt") + 1] for page in PAGES for words in command_lines(page) if "mgipt" in words}
    asked |= {name for page in PAGES for name in re.findall(r"`mgipt ([a-z-]+)", prose(page))}
    known = {*cli.BUNDLE_COMMANDS, *cli.ALIASES, *cli.MODULES, *cli.FOLDER_COMMANDS}
    assert asked - {"--version"} <= known
    # and the other way round: no command without a word about it
    assert known <= asked


def test_readme_is_short_and_warns_before_it_installs() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1300
    assert "make demo" in text
    assert "make test" in text
    first, _, _ = text.partition("## Install")
    assert len(first.splitlines()) < 45, "the table of presets and its warning are seen without scrolling"
    assert all(name in first for name in ("`paper`", "`fast`", "`steady`", "no adaptation", "`guard`", "can harm"))


def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "reference" / "results.schema.json").exists()
    assert "MGIPT" in (tmp_path / "reference" / "api" / "methods.html").read_text()


def test_demo_prints_its_table_and_draws_its_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mgipt_monai", "demo", "--folder", str(tmp_path), "--count", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(camera in done.stdout for camera in ("low_contrast", "warm_vignetted", "cold_noisy", "all"))
    assert (tmp_path / "demo.png").stat().st_size > 50_000
    assert len(list((tmp_path / "mgipt").rglob("*.png"))) == 3
