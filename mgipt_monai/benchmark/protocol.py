# SPDX-License-Identifier: Apache-2.0
"""A published protocol in one command: each site in turn is the source, and the others are its stream.

Run as ``mgipt protocol odoc --dataset_dir SITES --checkpoints CHECKPOINTS --output_dir RESULTS``, followed by overrides
as for ``python -m monai.bundle run``.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import ensure_tuple

from mgipt_monai.benchmark import overlaid_method
from mgipt_monai.benchmark.comparison import markdown_table
from mgipt_monai.benchmark.results import METRICS
from mgipt_monai.data import find_stream
from mgipt_monai.report.tables import TITLES
from mgipt_monai.utils.files import atomic_path

__all__ = ["PROTOCOL", "protocol_rows", "run_protocol", "write_tables"]

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


PROTOCOL = "protocol.json"
"""The file that names a protocol's sources, in order, and the published figures."""

Row = dict[str, Any]


def protocol_rows(
    runs: Mapping[str, Mapping[str, Any] | None],
    metric: str = "dsc",
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Row]:
    """Return one row per method: its figure for each source in the first round, and the means over the sources.

    A source's figure is the mean over all images of its stream, of an image's mean over classes. Over the sources it is
    the plain mean, None while one of them is not done. With several rounds there are also the mean over all rounds and
    ``degradation``, the first round less that mean (for distances the other way round: positive is worse).

    Args:
        runs: source to what its ``results.json`` holds, None where it is not done yet.
        metric: one of the metrics there. Those in [0, 1] are given in percent.
        published: method to published ``first`` (round), mean of three ``rounds``, and ``degradation``, where known.

    Raises:
        ValueError: if the runs are not of one protocol: other methods, or another number of rounds.
    """
    done = {source: run for source, run in runs.items() if run is not None}
    first = next(iter(done.values()), {"methods": {}, "stream": {"rounds": 1}})
    rounds = first["stream"]["rounds"]
    for source, run in done.items():
        if (list(run["methods"]), run["stream"]["rounds"]) != (list(first["methods"]), rounds):
            raise ValueError(
                f"{source} ran other methods or rounds than {next(iter(done))}: run the protocol once more with the "
                "settings of one of them"
            )

    scale = 100 if _reading(metric)["percent"] else 1
    rows = []
    for method in first["methods"]:
        of_sources = [run and run["methods"][method]["metrics"].get(metric) for run in runs.values()]
        starts = [values and scale * values["rounds"][0] for values in of_sources]
        row = {"method": method, **dict(zip(runs, starts, strict=True)), "mean": _mean(starts)}
        if rounds > 1:
            row[f"mean of {rounds} rounds"] = _mean([v and scale * fmean(v["rounds"]) for v in of_sources])
            row["degradation"] = _mean([v and scale * v["degradation"] for v in of_sources])
        if published:
            of_paper = published.get(method, {})
            row["published"] = of_paper.get("first")
            if rounds == 3:
                row["published, mean of 3 rounds"] = of_paper.get("rounds")
                row["published, degradation"] = of_paper.get("degradation")
        rows.append(row)
    return rows


def write_tables(folder: str | os.PathLike) -> str:
    """Write ``table.md`` (two decimals) and ``table.csv`` (all) of a protocol's folder; return the Markdown.

    The cells of a source that is not done yet are empty, and so are the means.

    Raises:
        FileNotFoundError: if it is no folder of a protocol.
        ValueError: as :func:`protocol_rows`.
    """
    folder = Path(folder)
    if not (folder / PROTOCOL).is_file():
        raise FileNotFoundError(f"there is no {PROTOCOL} in {folder}: give the output folder of `mgipt protocol`")
    protocol = json.loads((folder / PROTOCOL).read_text(encoding="utf-8"))
    runs = {source: _results(folder / source) for source in protocol["sources"]}
    published = protocol["published"]
    tables = {metric: protocol_rows(runs, metric, published.get(metric)) for metric in published or ("dsc",)}
    parts = []
    for metric, rows in tables.items():
        unit = "%" if _reading(metric)["percent"] else _reading(metric)["unit"]
        parts.append(f"{TITLES.get(metric, metric)}, {unit}, by source site:")
        parts.append(markdown_table([{key: _written(value) for key, value in row.items()} for row in rows]))
    parts.append("\n".join(_counts(source, run) for source, run in runs.items()))
    text = "\n\n".join(parts) + "\n"
    with atomic_path(folder / "table.md") as part:
        part.write_text(text, encoding="utf-8")
    _write_csv(folder / "table.csv", [{"metric": metric, **row} for metric, rows in tables.items() for row in rows])
    return text


def _reading(metric: str) -> dict[str, Any]:
    return METRICS.get(metric, METRICS["dsc"])


def _results(folder: Path) -> dict[str, Any] | None:
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else fmean(values)


def _written(value: str | float | None) -> str:
    return f"{value:.2f}" if isinstance(value, float) else value or ""


def _counts(source: str, run: Mapping[str, Any] | None) -> str:
    if run is None:
        return f"- {source}: not done yet"
    stream = run["stream"]
    failed = f", {stream['images'] - stream['measured']} of them failed with a method and left out of all"
    images = f"- {source}: {stream['images']} images of {', '.join(stream['sites'])}"
    return images + (failed if stream["images"] != stream["measured"] else "")


def _write_csv(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables of a folder anew and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="output folder of mgipt_monai.benchmark.protocol")
    print(write_tables(parser.parse_args(arguments).folder))


if __name__ == "__main__":
    main()
