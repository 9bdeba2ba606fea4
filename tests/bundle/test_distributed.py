# SPDX-License-Identifier: Apache-2.0
"""Two streams under ``torchrun``, against runs of one stream each."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from monai.bundle import ConfigWorkflow

from mgipt_monai import RecordFile, StreamSummary, load_state
from tests.bundle.conftest import BUNDLE, CONFIGS, QUICK, run_bundle
from tests.conftest import without_times

CONFIG_FILES = [CONFIGS / "inference.yaml", CONFIGS / "evaluate.yaml"]
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run_alone(dataset_dir: Path, site: str, output_dir: Path) -> None:
    flow = ConfigWorkflow(
        config_file=[str(config) for config in CONFIG_FILES],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(dataset_dir),
        output_dir=str(output_dir),
        sites=[site],
        spatial_size=[64, 64],
        **{"instance_prompt#steps": 1},
    )
    flow.initialize()
    # one site has an image that fails
    with suppress(RuntimeError):
        flow.run()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, demo_sites: Path) -> Path:
    """Two sites, of three photographs and of four, the last of which cannot be read."""
    root = Path(shutil.copytree(demo_sites, tmp_path_factory.mktemp("uneven") / "sites"))
    (root / "warm_vignetted" / "images" / "eye_003.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"junk" * 20)
    shutil.copy(root / "warm_vignetted" / "masks" / "eye_002.png", root / "warm_vignetted" / "masks" / "eye_003.png")
    return root


def test_each_site_is_as_alone_and_the_summary_is_of_both(tmp_path: Path, sites: Path) -> None:
    both = tmp_path / "both"
    configs = [*CONFIG_FILES, "configs/distributed.yaml"]
    done = run_bundle(configs, check=False, launcher=TWO_PROCESSES, dataset_dir=sites, output_dir=both, **QUICK)
    assert done.returncode != 0
    said = "1 of 7 images failed, the others are done:\n  warm_vignetted/eye_003: "
    assert said in done.stdout  # once in the log, of the first process
    assert done.stdout.count("images failed") == 1
    assert f"StreamFailedError: {said.splitlines()[0]}" in done.stderr

    # the larger site goes to the first process
    summary = StreamSummary()
    for rank, site in enumerate(("warm_vignetted", "cold_noisy")):
        alone = tmp_path / site
        run_alone(sites, site, alone)
        assert without_times(both / f"records_{rank}.jsonl") == without_times(alone / "records.jsonl")
        states = [load_state(both / f"adaptation_state_{rank}.pt"), load_state(alone / "adaptation_state.pt")]
        assert str(states[0]) == str(states[1])
        masks = [path.relative_to(alone) for path in alone.rglob("*.png")]
        assert len(masks) == 3
        for mask in masks:
            assert (both / mask).read_bytes() == (alone / mask).read_bytes()
        for row in RecordFile(both / f"records_{rank}.jsonl").read():
            summary.add(row)
    assert json.loads((both / "summary.json").read_text()) == summary.figures()
    assert done.stdout.count("stream of 6 images done") == 1


def test_processes_with_a_folder_each_average_their_prompts(tmp_path: Path, demo_sites: Path) -> None:
    # of three images and of two
    folder = f"$'{demo_sites}/' + ['cold_noisy', 'warm_vignetted'][idist.get_rank()]"
    done = run_bundle(
        [CONFIG_FILES[0], "configs/distributed.yaml"],
        launcher=TWO_PROCESSES,
        dataset_dir=folder,
        output_dir=f"$'{tmp_path}/' + str(idist.get_rank())",
        limit="$3 - idist.get_rank()",
        share_by="none",
        average_every=2,
        **QUICK,
    )
    assert done.stdout.count("averaged the prompts of 2 processes after 2 images") == 2
    states = [load_state(tmp_path / str(rank) / f"adaptation_state_{rank}.pt") for rank in (0, 1)]
    assert [state["position"] for state in states] == [3, 2]
    figures = json.loads((tmp_path / "0" / "summary.json").read_text())
    assert [figures[site]["images"] for site in ("cold_noisy", "warm_vignetted", "all")] == [3, 2, 5]
    assert not (tmp_path / "1" / "summary.json").exists()
