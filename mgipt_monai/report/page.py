# SPDX-License-Identifier: Apache-2.0
"""The report of a benchmark: one self-contained HTML page, generated from the files of its folder.

Run as ``python -m mgipt_monai.report OUT``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mgipt_monai.utils.outputs import output_file

try:
    import jinja2
    import matplotlib  # noqa: F401 (the charts need it)
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the report needs {error.name}: pip install mgipt_monai[benchmark]") from error

from .charts import charts_of, gain_figure
from .examples import chosen_images
from .folder import BenchmarkFolder
from .styles import method_styles
from .tables import percent, points, site_table, summary_table
from .verdict import measured_images, verdict

__all__ = ["page_environment", "write_gain_chart", "write_report"]


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into the folder of a benchmark; the same files give the same page.

    Sections without data are omitted: comparison with a baseline, rounds, times, prompts, pictures.

    Returns:
        Path of the page.

    Raises:
        FileExistsError: if a ``report.html`` stands there that no run wrote.
        FileNotFoundError: if the folder has no ``results.json``.
        ValueError: if that file has another schema or version.
    """
    benchmark = BenchmarkFolder.read(folder)
    methods = benchmark.adapting if benchmark.baseline is not None else []
    template = page_environment().get_template("report.html.j2")
    html = template.render(
        results=benchmark.results,
        about={"data": "", "network": "", "weights": "", **benchmark.results.get("about", {})},
        dates=_dates(benchmark),
        images=_images(benchmark.results["stream"]),
        lines={m: values["about"] for m, values in benchmark.results["methods"].items() if values.get("about")},
        timing=benchmark.timing,
        verdict=verdict(benchmark.results),
        summary=summary_table(benchmark),
        sites=site_table(benchmark),
        charts=list(charts_of(benchmark)),
        chosen={method: images for method in methods if (images := chosen_images(benchmark, method))},
    )
    output, name = output_file(benchmark.path / "report.html")
    with output.writing(name) as part:
        part.write_text(html, encoding="utf-8", errors="replace")
    return benchmark.path / name


def write_gain_chart(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Draw the change in DSC of each image from the baseline into a picture, whose ending sets its format.

    Raises:
        FileExistsError: if a file stands there that no run wrote.
        ValueError: if the benchmark has no baseline, or the format is not one that matplotlib writes.
    """
    benchmark = BenchmarkFolder.read(folder)
    figure = gain_figure(benchmark, method_styles(benchmark.methods, benchmark.required_baseline))
    output, name = output_file(path)
    with output.writing(name) as part:
        figure.savefig(part, dpi=80, metadata={"Software": None} if name.endswith(".png") else None)
    return Path(path)


def _dates(benchmark: BenchmarkFolder) -> str:
    """Return the first and the last day (UTC) of the records; empty if they have no times."""
    days = sorted({row["time"][:10] for rows in benchmark.records.values() for row in rows if row.get("time")})
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""


def _images(stream: dict[str, Any]) -> str:
    """Say how many images there are, in how many rounds, and how many are measured."""
    rounds, measured = stream["rounds"], measured_images(stream)
    count = round(stream["images"] / rounds)
    text = f"{count} in {rounds} rounds" if rounds > 1 else str(count)
    return text if measured == count and stream["measured"] == stream["images"] else f"{text}, {measured} measured"


def page_environment(package: str = "mgipt_monai.report") -> jinja2.Environment:
    """Return the jinja2 environment of a package's templates."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "json": _json}
    return environment


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
