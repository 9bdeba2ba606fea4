# SPDX-License-Identifier: Apache-2.0
"""Runs a published protocol: each site in turn is the source, and the others form its stream.

Run as ``mgipt protocol odoc --dataset_dir SITES --checkpoints CHECKPOINTS --output_dir RESULTS``, followed by overrides
as for ``python -m monai.bundle run``.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import ensure_tuple

from mgipt_monai.benchmark import overlaid_method
from mgipt_monai.benchmark.comparison import markdown_table
from mgipt_monai.benchmark.results import metric_info
from mgipt_monai.bundle_runs import errors_last, read_settings, split_settings
from mgipt_monai.data import find_stream
from mgipt_monai.installed import find_config, installed, require
from mgipt_monai.report.tables import TITLES
from mgipt_monai.utils.files import write_csv
from mgipt_monai.utils.outputs import OutputFolder, check_apart

__all__ = ["PROTOCOL", "protocol_rows", "run_protocol", "write_tables"]

CONFIGS = ("inference", "evaluate", "benchmark")
PROTOCOL = "protocol.json"
"""File in the output folder with the sources of a protocol, in order, and the published results."""

Row = dict[str, Any]


def run_protocol(
    *overlays: str,
    dataset_dir: str | os.PathLike[str],
    checkpoints: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    bundle_root: str | os.PathLike[str] = "bundle",
    sources: Sequence[str] | None = None,
    variants: str | Sequence[str] = (),
    **overrides: Any,
) -> str:
    """Run the benchmark once per source, over the other sites in a fixed order, and write a table of all results.

    An interrupted run is resumed. ``output_dir`` gets a benchmark folder with a report for each source, and
    ``table.md`` and ``table.csv``, which are rewritten after each source.

    Args:
        overlays: configs on top of the bundle's inference, evaluate and benchmark configs. Their ``sites``, or those in
            ``overrides``, are the sites in order; null uses all sites in alphabetical order. ``published`` are
            published results to compare with.
        dataset_dir: folder of the labelled sites.
        checkpoints: folder with the source networks as ``<site>.pt``, or a pattern such as
            ``TRAINED/{site}/model.pt``.
        output_dir: folder to write to.
        bundle_root: folder of the bundle.
        sources: the sites to use as sources; None uses all. A source need not be one of ``sites``.
        variants: overlays, or a glob pattern of overlays such as ``configs/ablations/*.yaml``. Each adds a row: the
            ``method`` of the configs with this overlay on top, with the name of the file.
        overrides: any value of the configs, such as ``rounds=3``, ``compare=["source", "mgipt"]`` or ``limit=40``.

    Returns:
        The table in Markdown.

    Raises:
        FileExistsError: before anything is run, if files stand in ``output_dir`` that no run wrote.
        FileNotFoundError: before anything is run, with all missing sites, checkpoints and variants and how to get them.
        ValueError: if two rows would have the same name, a source has no stream, or ``output_dir`` overlaps with
            ``dataset_dir``.
    """
    bundle, output = Path(bundle_root), Path(output_dir)
    files = [*(str(bundle / "configs" / f"{name}.yaml") for name in CONFIGS), *map(str, overlays)]
    config = ConfigParser.load_config_files(files)
    sites = overrides.pop("sites", config["sites"])
    sites = _present_sites(dataset_dir) if sites is None else list(ensure_tuple(sites))
    sources = sites if sources is None else list(ensure_tuple(sources))
    weights = {source: _checkpoint(checkpoints, source) for source in sources}
    rows = _variant_rows(variants, taken=config["methods"])
    _check(dataset_dir, sites, weights)
    if os.path.isdir(dataset_dir):
        check_apart(output, [dataset_dir])
    folder = OutputFolder(output)
    folder.prepare()
    folder.claim(PROTOCOL, "table.md", "table.csv")
    for source in sources:
        OutputFolder(folder.file(source)).claim("results.json")
    with folder.writing(PROTOCOL) as part:
        part.write_text(json.dumps({"sources": sources, "published": config.get("published", {})}) + "\n")
    for source in sources:  # results of an earlier run may have other rows
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


def protocol_rows(
    runs: Mapping[str, Mapping[str, Any] | None],
    metric: str = "dsc",
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Row]:
    """Return one row per method: its result for each source in the first round, and the mean over the sources.

    The result for a source is the mean over the images of its stream of their means over classes. The mean over the
    sources is None until all of them are done. For several rounds there are also the mean over all rounds and
    ``degradation``, the first round minus that mean (the reverse for distances: positive is worse).

    Args:
        runs: source to the content of its ``results.json``; None if it is not done yet.
        metric: one of the metrics there. Those in [0, 1] are returned in percent.
        published: method to the published ``first`` (round), mean of three ``rounds``, and ``degradation``, if known.

    Raises:
        ValueError: if the runs differ in their methods or number of rounds.
    """
    done = {source: run for source, run in runs.items() if run is not None}
    first = next(iter(done.values()), {"methods": {}, "stream": {"rounds": 1}})
    rounds = first["stream"]["rounds"]
    for source, run in done.items():
        if (list(run["methods"]), run["stream"]["rounds"]) != (list(first["methods"]), rounds):
            raise ValueError(
                f"{source} ran other methods or rounds than {next(iter(done))}: run the protocol again with the "
                "settings of one of them"
            )

    scale = 100 if metric_info(metric)["percent"] else 1
    rows = []
    for method in first["methods"]:
        by_source = {
            source: run["methods"][method]["metrics"].get(metric) if run is not None else None
            for source, run in runs.items()
        }
        starts = {source: scale * values["rounds"][0] if values else None for source, values in by_source.items()}
        row: Row = {"method": method, **starts, "mean": _mean(starts.values())}
        if rounds > 1:
            done_sources = [values or None for values in by_source.values()]
            row[f"mean of {rounds} rounds"] = _mean(v and scale * fmean(v["rounds"]) for v in done_sources)
            row["degradation"] = _mean(v and scale * v["degradation"] for v in done_sources)
        if published:
            of_paper = published.get(method, {})
            row["published"] = of_paper.get("first")
            if rounds == 3:
                row["published, mean of 3 rounds"] = of_paper.get("rounds")
                row["published, degradation"] = of_paper.get("degradation")
        rows.append(row)
    return rows


def write_tables(folder: str | os.PathLike[str]) -> str:
    """Write ``table.md`` (two decimals) and ``table.csv`` (all decimals) of a protocol; return the Markdown.

    The cells of a source that is not done yet are empty, as are the means.

    Raises:
        FileNotFoundError: if the folder is not that of a protocol.
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
        unit = "%" if metric_info(metric)["percent"] else metric_info(metric)["unit"]
        parts.append(f"{TITLES.get(metric, metric)}, {unit}, by source site:")
        parts.append(markdown_table([{key: _formatted(value) for key, value in row.items()} for row in rows]))
    parts.append("\n".join(_counts(source, run) for source, run in runs.items()))
    text = "\n\n".join(parts) + "\n"
    output = OutputFolder(folder)
    output.claim("table.md", "table.csv")
    with output.writing("table.md") as part:
        part.write_text(text, encoding="utf-8", errors="replace")
    with output.writing("table.csv") as part:
        write_csv(part, [{"metric": metric, **row} for metric, rows in tables.items() for row in rows])
    return text


def _run(files: list[str], rows: dict[str, str], settings: dict[str, Any]) -> None:
    """Run the benchmark of one source, with further rows for the variants."""
    workflow = ConfigWorkflow(config_file=files, workflow_type="infer", **settings)
    workflow.initialize()
    benchmark, network = (workflow.parser.get_parsed_content(part) for part in ("benchmark", "network"))
    for name, overlay in rows.items():
        benchmark.methods[name] = overlaid_method(workflow.parser, overlay, network)
    workflow.run()


def _present_sites(dataset_dir: str | os.PathLike[str]) -> list[str]:
    return list(dict.fromkeys(item["site"] for item in find_stream(dataset_dir)))


def _checkpoint(checkpoints: str | os.PathLike[str], source: str) -> str:
    pattern = os.fspath(checkpoints)
    return (pattern if "{site}" in pattern else os.path.join(pattern, "{site}.pt")).replace("{site}", source)


def _variant_rows(variants: str | Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """Return the overlay files of the variants by name."""
    patterns = ensure_tuple(variants)
    found = {pattern: sorted(glob.glob(pattern)) for pattern in patterns}
    if absent := [pattern for pattern, files in found.items() if not files]:
        raise FileNotFoundError(f"there is no overlay at {', '.join(absent)}: give files or a glob pattern as variants")
    files = [file for pattern in patterns for file in found[pattern]]
    rows = {Path(file).stem: file for file in files}
    if len(rows) < len(files) or rows.keys() & set(taken):
        names = [*taken, *(Path(file).stem for file in files)]
        raise ValueError(f"two rows would have the same name: {', '.join(names)}")
    return rows


def _check(dataset_dir: str | os.PathLike[str], sites: Sequence[str], weights: dict[str, str]) -> None:
    """Raise an error that names everything that is missing, before hours of work."""
    present = _present_sites(dataset_dir) if os.path.exists(dataset_dir) else []
    problems = []
    if absent := [site for site in sites if site not in present]:
        problems.append(
            f"there are no images of {', '.join(absent)} in {dataset_dir}: convert them with `mgipt published`, or "
            "list the sites that you have with --sites"
        )
    if absent := [path for path in weights.values() if not os.path.isfile(path)]:
        problems.append(
            f"there is no checkpoint {', '.join(absent)}: copy the published ones there, train them with `mgipt train`"
            ", or list the sources that you have with --sources"
        )
    if problems:
        raise FileNotFoundError("; ".join(problems) + " (docs/how-to/reproduce-the-paper.md)")
    if alone := [source for source in weights if not set(sites) - {source}]:
        raise ValueError(f"there is no site but the source {alone[0]}: give at least one other site to adapt to")


def _results(folder: Path) -> dict[str, Any] | None:
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _mean(values: Iterable[float | None]) -> float | None:
    given = list(values)
    defined = [value for value in given if value is not None]
    return fmean(defined) if len(defined) == len(given) else None


def _formatted(value: str | float | None) -> str:
    return f"{value:.2f}" if isinstance(value, float) else value or ""


def _counts(source: str, run: Mapping[str, Any] | None) -> str:
    if run is None:
        return f"- {source}: not done yet"
    stream = run["stream"]
    failed = f", {stream['images'] - stream['measured']} of them failed with a method and excluded for all"
    images = f"- {source}: {stream['images']} images of {', '.join(stream['sites'])}"
    return images + (failed if stream["images"] != stream["measured"] else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `mgipt protocol`: run a protocol, or rewrite the tables of an earlier run; print the tables."""
    parser = argparse.ArgumentParser(
        prog="mgipt protocol",
        usage="mgipt protocol CONFIG ... --dataset_dir SITES --checkpoints FOLDER --output_dir RESULTS "
        "[--KEY VALUE ...]\n"
        "       mgipt protocol RESULTS",
        description="Run the benchmark once per source site and write a table of all results, or rewrite that table.",
        epilog="example: mgipt protocol odoc --dataset_dir sites --checkpoints trained --output_dir results --rounds 3",
        allow_abbrev=False,
    )
    parser.add_argument(
        "overlays", nargs="+", metavar="CONFIG", help="odoc, polyp, or config files; or RESULTS of an earlier run"
    )
    parser.add_argument("--dataset_dir", metavar="SITES", help="folder of the labelled sites")
    parser.add_argument("--checkpoints", metavar="FOLDER", help="with SITE.pt, or a pattern: trained/{site}/model.pt")
    parser.add_argument("--output_dir", metavar="RESULTS", help="folder to write to")
    parser.add_argument(
        "--bundle_root", "--bundle", default=installed(), metavar="FOLDER", help="default: `mgipt path`"
    )
    parser.add_argument("--sources", type=DefaultParseValue, help="sites to use as sources (default all)")
    parser.add_argument(
        "--variants", type=DefaultParseValue, default=(), help="overlays, one more row each: ablations/*.yaml"
    )
    parser.add_argument_group("any key of the bundle's configs", '--rounds 3, --compare "[source, mgipt]", --limit 40')
    own = ["--help", "--dataset_dir", "--checkpoints", "--output_dir", "--bundle_root", "--bundle"]
    own += ["--sources", "--variants"]
    rest, written = split_settings(sys.argv[1:] if arguments is None else arguments, own)
    options = vars(parser.parse_args(rest))
    given = options.pop("overlays")
    needed = ("dataset_dir", "checkpoints", "output_dir")
    if len(given) == 1 and Path(given[0]).is_dir() and not any(options[key] for key in needed):
        print(write_tables(given[0]))
        return
    if absent := [f"--{key}" for key in needed if not options[key]]:
        parser.error(f"the following arguments are required: {', '.join(absent)}")
    require("benchmark")
    overlays = [str(find_config(name, "protocols")) for name in given]
    options["variants"] = [_variants(pattern) for pattern in ensure_tuple(options["variants"])]
    bundle = Path(options["bundle_root"]) / "configs"
    config = ConfigParser.load_config_files([*(str(bundle / f"{name}.yaml") for name in CONFIGS), *overlays])
    settings = read_settings(written, config, own)
    options |= {key: None if value == "$None" else value for key, value in settings.items()}
    print(run_protocol(*overlays, **options))


def _variants(pattern: str) -> str:
    """Return the pattern if files match it, otherwise that of installed overlays."""
    return pattern if glob.glob(pattern) else str(installed("configs") / pattern.removeprefix("configs/"))


if __name__ == "__main__":
    with errors_last(resumes="the same command"):
        main()
