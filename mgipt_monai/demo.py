# SPDX-License-Identifier: Apache-2.0
"""The demo: three cameras that the source network has never seen, without and with test-time adaptation.

Run as ``mgipt demo``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from torch import Tensor

from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from mgipt_monai.installed import find_config, installed, require
from mgipt_monai.report import Example, draw_examples
from mgipt_monai.stream.summary import image_means

__all__ = ["main", "run_method"]

UNSEEN = ("low_contrast", "warm_vignetted", "cold_noisy")


def run_method(bundle: Path, overlays: list[Path], dataset_dir: Path, output_dir: Path) -> dict[str, dict[str, Any]]:
    """Run the bundle over a labelled stream, as ``python -m monai.bundle run`` does.

    Args:
        bundle: the bundle's folder.
        overlays: configs merged into its ``inference.yaml`` and ``evaluate.yaml``.
        dataset_dir: the sites.
        output_dir: where masks, records and figures go.

    Returns:
        Per image name its record, and under ``image``, ``adapted_image``, ``pred`` and ``label`` its arrays (C, H, W).
    """
    configs = [bundle / "configs" / "inference.yaml", bundle / "configs" / "evaluate.yaml", *overlays]
    workflow = ConfigWorkflow(
        config_file=[str(path) for path in configs],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(dataset_dir),
        sites=list(UNSEEN),
        output_dir=str(output_dir),
        overwrite=True,  # the demo may be run again
    )
    workflow.initialize()
    seen: dict[str, dict[str, Any]] = {}

    def remember(engine: Engine) -> None:
        state: Any = engine.state  # ignite's has no idea of what MONAI and this package add
        (output,) = state.output
        image = output["image"].as_tensor()
        prompt = getattr(workflow.inferer.method, "instance_prompt", None)
        arrays = {"image": image, "adapted_image": image if prompt is None else prompt(image[None])[0]}
        arrays |= {key: output[key] for key in ("pred", "label")}
        seen[state.record["name"]] = state.record | {k: _array(v) for k, v in arrays.items()}

    workflow.evaluator.add_event_handler(Events.ITERATION_COMPLETED, remember)
    workflow.run()
    return seen


def _array(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu())


def _dsc(record: dict[str, Any]) -> float:
    return image_means(record)["dsc"]


def _table(source: dict[str, dict], adapted: dict[str, dict]) -> str:
    lines = [
        f"{'camera':<16}{'images':>7}{'source DSC':>12}{'MGIPT DSC':>12}{'gain':>7}{'worse by > 1':>14}{'s/image':>9}"
    ]
    for camera in (*UNSEEN, "all"):
        names = [name for name, record in source.items() if camera in (record["site"], "all")]
        before, after = (100 * np.array([_dsc(run[name]) for name in names]) for run in (source, adapted))
        worse = int((after < before - 1).sum())
        seconds = np.median([adapted[name]["seconds"] for name in names])
        lines.append(
            f"{camera:<16}{len(names):>7}{before.mean():>12.2f}{after.mean():>12.2f}{(after - before).mean():>+7.2f}"
            f"{worse:>14}{seconds:>9.2f}"
        )
    return "\n".join(lines)


def _examples(source: dict[str, dict], adapted: dict[str, dict]) -> list[Example]:
    """Per camera the images of the best, the median and the worst change."""
    examples = []
    for camera in UNSEEN:
        names = [name for name, record in source.items() if record["site"] == camera]
        names.sort(key=lambda name: _dsc(adapted[name]) - _dsc(source[name]))
        for what, name in (("best", names[-1]), ("median", names[len(names) // 2]), ("worst", names[0])):
            one, other = source[name], adapted[name]
            examples.append(
                Example(
                    f"{camera}, {what} change",
                    other["image"],
                    other["adapted_image"],
                    one["label"],
                    one["pred"],
                    other["pred"],
                    _dsc(one),
                    _dsc(other),
                )
            )
    return examples


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the stream, run it without and with adaptation, print the table and draw the figure."""
    parser = argparse.ArgumentParser(
        prog="mgipt demo",
        description="Three cameras that the network has never seen, without and with adaptation: a table and a figure.",
        epilog="example: mgipt demo --count 4 (half a minute on two cores)",
    )
    parser.add_argument("--bundle", type=Path, default=installed(), help="the bundle's folder (default: `mgipt path`)")
    parser.add_argument(
        "--folder", type=Path, default=Path("mgipt_demo"), help="where everything is written (default %(default)s)"
    )
    parser.add_argument("--count", type=int, default=16, help="photographs of each camera (default %(default)s)")
    options = parser.parse_args(arguments)
    require("demo")

    sites = options.folder / "sites"
    write_demo_stream(sites, [CAMERAS[name] for name in UNSEEN], options.count, seed=0)
    source = run_method(options.bundle, [find_config("methods/source")], sites, options.folder / "source")
    adapted = run_method(options.bundle, [], sites, options.folder / "mgipt")

    figure = options.folder / "demo.png"
    draw_examples(_examples(source, adapted), figure, columns=3)
    print(f"\n{_table(source, adapted)}\n\nfigure: {figure}\nmasks, records: {options.folder / 'mgipt'}")


if __name__ == "__main__":
    main()
