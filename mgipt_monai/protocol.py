# SPDX-License-Identifier: Apache-2.0
"""A published protocol in one command: each site in turn is the source, and the others are its stream.

Run as ``python -m mgipt_monai.protocol configs/protocols/odoc.yaml --dataset_dir SITES --checkpoints CHECKPOINTS
--output_dir RESULTS``, followed by overrides as for ``python -m monai.bundle run``. See docs/reproduce.md.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import ensure_tuple

from mgipt_monai.benchmark import overlaid_method
from mgipt_monai.data import find_stream
from mgipt_monai.report.protocol import PROTOCOL, write_tables
from mgipt_monai.state_file import atomic_path

__all__ = ["run_protocol"]

CONFIGS = ("inference", "evaluate", "benchmark")


def run_protocol(
    *overlays: str,
    dataset_dir: str | os.PathLike,
    checkpoints: str | os.PathLike,
    output_dir: str | os.PathLike,
    bundle_root: str | os.PathLike = "bundle",
    sources: Sequence[str] | None = None,
    variants: str | Sequence[str] = (),
    **overrides: Any,
) -> str:
    """Run the benchmark once for each source, over the other sites in their fixed order, and tabulate all.

    A run that was interrupted goes on where it stopped. Each source's folder in ``output_dir`` is that of a benchmark,
    with its report; beside them are ``table.md`` and ``table.csv``, written anew after each source.

    Args:
        overlays: configs laid over the bundle's inference, evaluate and benchmark configs. ``sites`` in them, or in
            ``overrides``, are the sites in order; null takes all in alphabetical order. ``published`` are figures to
            stand beside.
        dataset_dir: the labelled sites.
        checkpoints: a folder with the source networks as ``<site>.pt``, or a pattern, ``TRAINED/{site}/model.pt``.
        output_dir: where to write to.
        bundle_root: the bundle's folder.
        sources: the sites to take as sources; None takes all. A source need not be one of ``sites``.
        variants: overlays, or a glob pattern of them, each of which makes one more row: the configs' ``method`` with
            that overlay on top, named by the file. Such as ``configs/ablations/*.yaml``.
        overrides: any value of the configs, such as ``rounds=3``, ``compare=["source", "mgipt"]`` or ``limit=40``.

    Returns:
        The table in Markdown.

    Raises:
        FileNotFoundError: before anything runs, naming all sites, checkpoints and variants that are missing and how to
            get them.
        ValueError: if two rows would have one name, or there is no stream for a source.
    """
    bundle, output = Path(bundle_root), Path(output_dir)
    files = [*(str(bundle / "configs" / f"{name}.yaml") for name in CONFIGS), *map(str, overlays)]
    config = ConfigParser.load_config_files(files)
    sites = overrides.pop("sites", config["sites"])
    sites = _present_sites(dataset_dir) if sites is None else list(ensure_tuple(sites))
    sources = sites if sources is None else list(ensure_tuple(sources))
    weights = {source: _checkpoint(checkpoints, source) for source in sources}
    rows = _rows(variants, taken=config["methods"])
    _check(dataset_dir, sites, weights)
    with atomic_path(output / PROTOCOL) as part:
        part.write_text(json.dumps({"sources": sources, "published": config.get("published", {})}) + "\n")
    for source in sources:  # an earlier run may have had other rows
        (output / source / "results.json").unlink(missing_ok=True)
    for source in sources:
        settings = {
            "bundle_root": str(bundle),
            "dataset_dir": str(dataset_dir),
            "sites": [site for site in sites if site != source],
            "ckpt_path": weights[source],
            "output_dir": str(output / source),
        }
        _run(files, rows, {**overrides, **settings})
        table = write_tables(output)
    return table


def _run(files: list[str], rows: dict[str, str], settings: dict[str, Any]) -> None:
    """Run the benchmark of one source with the variants' rows."""
    workflow = ConfigWorkflow(config_file=files, workflow_type="infer", **settings)
    workflow.initialize()
    benchmark, network = (workflow.parser.get_parsed_content(part) for part in ("benchmark", "network"))
    for name, overlay in rows.items():
        benchmark.methods[name] = overlaid_method(workflow.parser, overlay, network)
    workflow.run()


def _present_sites(dataset_dir: str | os.PathLike) -> list[str]:
    return list(dict.fromkeys(item["site"] for item in find_stream(dataset_dir)))


def _checkpoint(checkpoints: str | os.PathLike, source: str) -> str:
    pattern = os.fspath(checkpoints)
    return (pattern if "{site}" in pattern else os.path.join(pattern, "{site}.pt")).replace("{site}", source)


def _rows(variants: str | Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """Return from a variant's name to its file."""
    patterns = ensure_tuple(variants)
    found = {pattern: sorted(glob.glob(pattern)) for pattern in patterns}
    if absent := [pattern for pattern, files in found.items() if not files]:
        raise FileNotFoundError(f"there is no overlay at {', '.join(absent)}: give files or a glob pattern as variants")
    files = [file for pattern in patterns for file in found[pattern]]
    rows = {Path(file).stem: file for file in files}
    if len(rows) < len(files) or rows.keys() & set(taken):
        raise ValueError(f"two rows would have one name: {', '.join([*taken, *(Path(file).stem for file in files)])}")
    return rows


def _check(dataset_dir: str | os.PathLike, sites: Sequence[str], weights: dict[str, str]) -> None:
    """Raise an error that names all that is missing, before hours of work."""
    present = _present_sites(dataset_dir) if os.path.exists(dataset_dir) else []
    problems = []
    if absent := [site for site in sites if site not in present]:
        problems.append(
            f"there are no images of {', '.join(absent)} in {dataset_dir}: write them there with "
            "`python -m mgipt_monai.data.published`, or name the sites that you have with --sites"
        )
    if absent := [path for path in weights.values() if not os.path.isfile(path)]:
        problems.append(
            f"there is no checkpoint {', '.join(absent)}: put the published ones there, or train them with "
            "bundle/configs/train.yaml, or name the sources that you have with --sources"
        )
    if problems:
        raise FileNotFoundError("; ".join(problems) + " (docs/reproduce.md)")
    if alone := [source for source in weights if not set(sites) - {source}]:
        raise ValueError(f"there is no site but the source {alone[0]}: give at least one other to adapt to")


if __name__ == "__main__":
    try:
        fire.Fire(run_protocol)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
