# SPDX-License-Identifier: Apache-2.0
"""No run writes over a file that no run wrote, nor outside its folder, whoever names the files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from mgipt_monai.benchmark.results import write_images_csv
from mgipt_monai.data import SaveMaskd, SaveUncertaintyd, check_outputs, find_stream, order_stream
from mgipt_monai.data.datalists import write_datalist
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_site
from mgipt_monai.networks import measure_source_statistics
from mgipt_monai.report import PictureWriter
from mgipt_monai.utils.machine import MachineFailureError
from mgipt_monai.utils.outputs import MANIFEST, OPEN_FILES, OutputFolder
from tests.bundle.conftest import BUNDLE, CONFIGS, QUICK, demo_sites, run_bundle
from tests.conftest import tiny_network

__all__ = ["demo_sites"]

INFERENCE, EVALUATE, TRAIN, BENCHMARK = (
    CONFIGS / f"{name}.yaml" for name in ("inference", "evaluate", "train", "benchmark")
)


def digests(folder: Path) -> dict[str, str]:
    """The content of each file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def mask_of(name: str, key: str = "pred", value: float = 1.0) -> dict:
    return {key: MetaTensor(torch.full((1, 8, 8), value), meta={"filename_or_obj": "eye.png"}), "name": name}


@pytest.fixture
def site(tmp_path: Path, demo_sites: Path) -> Path:
    """A folder of images/ and masks/ with three good photographs, in a folder of its own."""
    return Path(shutil.copytree(demo_sites / "cold_noisy", tmp_path / "in" / "site"))


def equal(site: Path) -> Path:
    return site


def images_folder(site: Path) -> Path:
    return site / "images"


def parent(site: Path) -> Path:
    return site.parent


def child(site: Path) -> Path:
    return site / "out"


def grandchild(site: Path) -> Path:
    return site / "images" / "new" / "out"


def link(site: Path) -> Path:
    target = site.parent.parent / "link"
    target.symlink_to(site)
    return target


def link_above(site: Path) -> Path:
    (site.parent.parent / "above").symlink_to(site.parent)
    return site.parent.parent / "above" / "site" / "masks"


def dotted(site: Path) -> Path:
    return site / "images" / ".." / "images"


@pytest.mark.parametrize("place", [equal, images_folder, parent, child, grandchild, link, link_above, dotted])
@pytest.mark.parametrize("source", ["folder", "glob", "list"])
def test_output_folder_that_overlaps_the_images_is_refused_before_the_first(
    place: Callable[[Path], Path], source: str, tmp_path: Path, site: Path
) -> None:
    dataset = {"folder": site, "glob": f"{site}/images/*.png", "list": tmp_path / "list.json"}[source]
    out = place(site)
    if source != "folder":
        if place is child:
            pytest.skip("beside the images' own folder")
        write_datalist(find_stream(site, labelled=True), tmp_path / "list.json")
    before = digests(site.parent)
    with pytest.raises(
        (ValueError, FileExistsError),
        match=r"the output folder .* (is|holds|lies in) the folder .* of the images|eye_000.png was not written",
    ):
        check_outputs(find_stream(dataset), out, dataset)
    assert digests(site.parent) == before


@pytest.mark.parametrize("overlays", [[], [EVALUATE], [EVALUATE, BENCHMARK], [TRAIN]])
@pytest.mark.parametrize("place", [equal, link])
def test_runs_of_the_bundle_leave_their_images_as_they_were(
    overlays: list[Path], place: Callable[[Path], Path], site: Path
) -> None:
    before = digests(site.parent)
    done = run_bundle([INFERENCE, *overlays], check=False, dataset_dir=site, output_dir=place(site), **QUICK)
    assert done.returncode != 0
    assert re.search("the output folder .* is the folder .* of the images", done.stderr)
    assert digests(site.parent) == before


def test_folders_beside_each_other_are_fine_also_where_one_name_begins_like_the_other(
    tmp_path: Path, site: Path
) -> None:
    for name in ("out", "site_out", "site2"):
        check_outputs(find_stream(site), site.parent / name, site)
    run_bundle([INFERENCE], dataset_dir=site, output_dir=site.parent / "site_masks", limit=1, **QUICK)
    assert (site.parent / "site_masks" / "eye_000.png").is_file()


NAMES = {
    "up": "../outside",
    "up twice": "a/../../outside",
    "up to an input": "../in/site/images/eye_000",
    "absolute": "{tmp}/outside",
    "up on Windows": "..\\outside",
    "empty": " ",
    "a folder": "a/",
    "here": ".",
    "null": "a\0b",
    "long": "a" * 300,
    "the state": "adaptation_state.pt/eye",
    "the records": "records.jsonl/eye",
    "the summary": "Summary.JSON/eye",
    "the list of what was written": f"{MANIFEST}/eye",
    "a part": ".part-1-x/eye",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_name_in_a_list_that_leaves_the_folder_is_refused_before_the_run_and_by_each_writer(
    name: str, tmp_path: Path, site: Path
) -> None:
    name = name.format(tmp=tmp_path) if "{" in name else name
    (tmp_path / "list.json").write_text(
        json.dumps({"testing": [{"image": str(site / "images" / "eye_000.png"), "name": name}]})
    )
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=r"eye_000.png: the name "):
        find_stream(tmp_path / "list.json")
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError)):
        SaveMaskd("pred", out)(mask_of(name))
    with pytest.raises((ValueError, OSError)):
        SaveUncertaintyd("map", out)(mask_of(name, "map"))
    with pytest.raises((ValueError, OSError)), OutputFolder(out).writing(name):
        pass
    assert digests(tmp_path) == before


def test_site_in_a_list_that_leaves_the_folder_is_refused(tmp_path: Path, site: Path) -> None:
    (tmp_path / "list.csv").write_text("image,site\nin/site/images/eye_000.png,../../outside\n")
    with pytest.raises(ValueError, match=r"'../../outside/eye_000' leaves its folder"):
        find_stream(tmp_path / "list.csv")


def test_run_over_a_list_with_such_a_name_writes_nothing(tmp_path: Path, site: Path) -> None:
    victim = site / "images" / "eye_001.png"
    entries = [{"image": str(victim), "name": "../in/site/images/eye_000"}]
    (tmp_path / "list.json").write_text(json.dumps({"testing": entries}))
    before = digests(site.parent)
    done = run_bundle(
        [INFERENCE], check=False, dataset_dir=tmp_path / "list.json", output_dir=tmp_path / "out", **QUICK
    )
    assert done.returncode != 0
    assert "leaves its folder: remove the .. in it" in done.stderr
    assert digests(site.parent) == before


def test_link_in_the_output_folder_leads_no_writer_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "eye.png").write_bytes(b"precious")
    for name in ("out", "pictures"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "site").symlink_to(tmp_path / "elsewhere")
    before = digests(tmp_path / "elsewhere")
    for save in (SaveMaskd("pred", tmp_path / "out"), SaveUncertaintyd("pred", tmp_path / "out")):
        with pytest.raises(ValueError, match="through a link: remove the link"):
            save(mask_of("site/eye"))
    with pytest.raises(ValueError, match="through a link"):
        check_outputs([{"image": "in/eye.png", "name": "site/eye"}], tmp_path / "out")
    camera = CAMERAS["cold_noisy"]
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / camera.name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="through a link"):
        write_demo_site(tmp_path / "sites", camera, count=1, seed=0, size=32)
    assert digests(tmp_path / "elsewhere") == before


def test_link_in_place_of_a_file_or_of_the_list_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eye.png").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError, match=r"eye.png was not written by a run"):
        SaveMaskd("pred", tmp_path / "out")(mask_of("eye"))
    (tmp_path / "out" / MANIFEST).symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError, match="is a link, which no run makes"):
        SaveMaskd("pred", tmp_path / "out")(mask_of("other"))
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.skipif(not os.path.isdir(OPEN_FILES), reason="the system has no paths that lead through open folders")
@pytest.mark.parametrize("exchanged", ["before the folder is opened", "while it is written", "before it gets its name"])
@pytest.mark.parametrize("folder", ["out/site", "out"])
def test_folder_that_is_exchanged_for_a_link_after_the_check_leads_no_writer_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, exchanged: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "site").mkdir()
    (elsewhere / "site" / "eye.txt").write_text("of somebody else")
    output = OutputFolder(tmp_path / "out")
    output.prepare()
    with output.writing("site/first.txt") as part:
        part.write_text("a mask")
    real = tmp_path / "moved"

    def exchange() -> None:
        (tmp_path / folder).rename(real)
        (tmp_path / folder).symlink_to(elsewhere / "site" if folder == "out/site" else elsewhere)

    check = OutputFolder.check

    def check_then_exchange(self: OutputFolder, name: str) -> None:
        check(self, name)
        exchange()

    if exchanged == "before the folder is opened":
        monkeypatch.setattr(OutputFolder, "check", check_then_exchange)
    before = digests(elsewhere)

    def write() -> None:
        with output.writing("site/eye.txt") as part:
            part.write_text("first half")
            if exchanged == "while it is written":
                exchange()
                with part.open("a") as file:
                    file.write(", second half")
            if exchanged == "before it gets its name":
                monkeypatch.setattr("os.fsync", lambda _: monkeypatch.undo() or exchange())

    with pytest.raises((ValueError, MachineFailureError), match=r"link|replaced"):
        write()
    assert digests(elsewhere) == before
    assert not list(tmp_path.rglob(".part-*"))
    assert not list(real.rglob("eye.txt"))


def test_full_disk_is_reported_with_the_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as found, OutputFolder(tmp_path / "out").writing("a/x") as part:
        part.write_text("mask")
    assert found.value.filename == str(tmp_path / "out" / "a" / "x")


def test_link_in_place_of_a_file_of_a_run_is_refused_also_after_an_earlier_run(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    folder.prepare()
    folder.claim("records.jsonl")
    (tmp_path / "other.jsonl").write_text("of somebody else")
    (tmp_path / "out" / "records.jsonl").symlink_to(tmp_path / "other.jsonl")
    with pytest.raises(FileExistsError, match=r"records\.jsonl was not written by a run"):
        OutputFolder(tmp_path / "out").claim("records.jsonl")


def test_output_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    SaveMaskd("pred", tmp_path / "out")(mask_of("site/eye"))
    assert (tmp_path / "disk" / "site" / "eye.png").is_file()


def test_foreign_file_is_kept_and_named_and_a_file_of_a_run_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    SaveMaskd("pred", out)(mask_of("own"))
    (out / "foreign.png").write_bytes(b"drawn by hand")
    with pytest.raises(FileExistsError, match=r"out/foreign.png was not written by a run"):
        SaveMaskd("pred", out)(mask_of("foreign"))
    assert (out / "foreign.png").read_bytes() == b"drawn by hand"
    first = (out / "own.png").read_bytes()
    SaveMaskd("pred", out)(mask_of("own", value=0.0))
    assert (out / "own.png").read_bytes() != first


def test_mask_that_somebody_corrected_is_kept(tmp_path: Path) -> None:
    SaveMaskd("pred", tmp_path)(mask_of("eye"))
    corrected = np.asarray(Image.open(tmp_path / "eye.png")).copy()
    corrected[0, 0] = 0
    Image.fromarray(corrected).save(tmp_path / "eye.png")
    with pytest.raises(FileExistsError, match="or was changed since"):
        SaveMaskd("pred", tmp_path)(mask_of("eye"))
    items = [{"image": "in/eye.png", "name": "eye"}]
    with pytest.raises(FileExistsError, match="or was changed since"):
        check_outputs(items, tmp_path)
    check_outputs(items, tmp_path, resume=True)  # it is done


def test_list_of_what_was_written_holds_no_name_and_survives_a_line_cut_off(tmp_path: Path) -> None:
    SaveMaskd("pred", tmp_path)(mask_of("Ann Lee/left"))
    text = (tmp_path / MANIFEST).read_bytes()
    assert b"Ann" not in text
    (tmp_path / MANIFEST).write_bytes(text + b"3f9c")
    SaveMaskd("pred", tmp_path)(mask_of("second"))
    for name in ("Ann Lee/left", "second"):
        SaveMaskd("pred", tmp_path)(mask_of(name, value=0.0))


def test_second_run_over_the_same_folder_works_and_a_foreign_file_stops_it_before_the_first_image(
    tmp_path: Path, site: Path
) -> None:
    settings = {
        "dataset_dir": site,
        "output_dir": tmp_path / "out",
        "save_uncertainty": True,
        "overwrite": True,
        **QUICK,
    }
    run_bundle([INFERENCE], **settings)
    masks = digests(tmp_path / "out")
    run_bundle([INFERENCE], **settings)
    assert {name: masks[name] for name in masks if name.endswith(".png")} == {
        name: value for name, value in digests(tmp_path / "out").items() if name.endswith(".png")
    }
    (tmp_path / "out" / "eye_002.png").write_bytes(b"drawn by hand")
    before = digests(tmp_path / "out")
    done = run_bundle([INFERENCE], check=False, **settings)
    assert done.returncode != 0
    assert "eye_002.png was not written by a run, or was changed since" in done.stderr
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["records.jsonl", "summary.json", "adaptation_state.pt", "records.key"])
def test_file_of_somebody_else_with_the_name_of_a_runs_own_is_kept(name: str, tmp_path: Path, site: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    done = run_bundle([INFERENCE], check=False, dataset_dir=site, output_dir=tmp_path / "out", **QUICK)
    assert done.returncode != 0
    assert f"{name} was not written by a run" in done.stderr
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_folder_of_an_earlier_version_without_a_list_can_be_resumed(tmp_path: Path, site: Path) -> None:
    settings = {"dataset_dir": site, "output_dir": tmp_path / "out", **QUICK}
    run_bundle([INFERENCE], limit=2, **settings)
    (tmp_path / "out" / MANIFEST).unlink()
    done = run_bundle([INFERENCE], check=False, limit=2, resume=True, **settings)
    assert "was not written by a run" not in done.stderr


def test_weights_in_the_way_of_a_training_or_of_statistics_are_kept(tmp_path: Path, site: Path) -> None:
    (tmp_path / "out").mkdir()
    torch.save(tiny_network().state_dict(), tmp_path / "out" / "model.pt")
    before = digests(tmp_path / "out")
    done = run_bundle(
        [INFERENCE, TRAIN], check=False, dataset_dir=site, output_dir=tmp_path / "out", max_epochs=1, **QUICK
    )
    assert done.returncode != 0
    assert "model.pt was not written by a run" in done.stderr
    statistics = measure_source_statistics(tiny_network(), [torch.rand(1, 3, 16, 16)])
    with pytest.raises(FileExistsError, match=r"model.pt is not a statistics file, and not overwritten"):
        statistics.save(tmp_path / "out" / "model.pt")
    assert digests(tmp_path / "out") == before
    for _ in range(2):
        statistics.save(tmp_path / "statistics.pt")


def test_exports_keep_files_of_somebody_else(tmp_path: Path) -> None:
    exports: dict[str, Callable[[Path], object]] = {
        "list.json": lambda path: write_datalist([{"image": "eye.png"}], path),
        "images.csv": lambda path: write_images_csv({"source": [{"name": "eye"}]}, path),
    }
    for name, export in exports.items():
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"{name} was not written by a run"):
            export(tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
        for _ in range(2):
            export(tmp_path / name)


def test_pictures_of_the_report_stay_in_their_folder(tmp_path: Path) -> None:
    from ignite.engine import Engine

    engine = Engine(lambda _engine, _batch: None)
    engine.state.output = [{key: torch.ones(1, 8, 8) for key in ("image", "pred", "label")}]
    engine.state.record = {"name": "../../outside"}
    with pytest.raises(ValueError, match="leaves its folder"):
        PictureWriter(tmp_path / "a" / "b", reference=tmp_path / "c")(engine)
    assert not list(tmp_path.rglob("*outside*"))


COLLISIONS = {
    "double slash": [("a.png", "x/y"), ("b.png", "x//y")],
    "dot": [("a.png", "x/y"), ("b.png", "x/./y")],
    "capitals": [("a.png", "Eye"), ("b.png", "eye")],
    "umlauts": [("a.png", "\u00e4"), ("b.png", "a\u0308")],
    "a file and its folder": [("a.png", "x"), ("b.png", "x.png/y")],
}


@pytest.mark.parametrize("pairs", COLLISIONS.values(), ids=COLLISIONS.keys())
def test_names_that_fall_together_on_some_system_are_found_before_the_run(
    pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    entries = [{"image": image, "name": name} for image, name in pairs]
    (tmp_path / "list.json").write_text(json.dumps({"testing": entries}))
    with pytest.raises(ValueError, match=r"a.png.*(would both|would) be written"):
        find_stream(tmp_path / "list.json")


def test_round_and_uncertainty_that_fall_together_with_a_name_are_found_before_the_run(tmp_path: Path) -> None:
    items = [{"image": f"in/{name}.png", "name": name, "site": ""} for name in ("eye", "round_2/eye")]
    order_stream(items)
    with pytest.raises(ValueError, match=r"would both be written as round_2/eye"):
        order_stream(items, rounds=2)
    items = [{"image": f"in/{name}.png", "name": name, "site": ""} for name in ("eye", "eye_uncertainty")]
    check_outputs(items, tmp_path / "out")
    with pytest.raises(ValueError, match="would both be written as eye_uncertainty"):
        check_outputs(items, tmp_path / "out", uncertainty=True)


DIES_WRITING = """
import os, sys
from mgipt_monai.utils.files import atomic_path
with atomic_path(sys.argv[1]) as part:
    part.write_bytes(b"half")
    os._exit(9)
"""


def test_what_a_killed_process_left_half_written_is_cleared_at_the_next_start(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DIES_WRITING, str(tmp_path / "out" / "site" / "eye.png")], check=False)
    (left,) = tmp_path.rglob(".part-*")
    others = left.with_name(re.sub(r"-\d+-", f"-{os.getppid()}-", left.name, count=1))
    others.write_bytes(b"another process is writing")
    check_outputs([{"image": "in/eye.png", "name": "eye"}], tmp_path / "out")
    assert list(tmp_path.rglob(".part-*")) == [others]


def test_label_of_the_demo_bundle_is_beside_its_fingerprint() -> None:
    text = (BUNDLE / "models" / "model.pt.sha256").read_text()
    assert text.split()[0] == hashlib.sha256((BUNDLE / "models" / "model.pt").read_bytes()).hexdigest()
