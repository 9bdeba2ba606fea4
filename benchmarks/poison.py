# SPDX-License-Identifier: Apache-2.0
"""The effect of images that do not belong to a stream on those that do, without and with the guard.

Every fifth image of the stream is poison, and one kind repeats an image many times. The good images and their order
are the same in all runs. Prints their mean DSC:

    python benchmarks/poison.py --sites SITES --limit 20 --configs configs/fundus_odoc.yaml --ckpt_path WEIGHTS.pt
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.bundle import ConfigWorkflow
from monai.data import create_test_image_2d
from PIL import Image

from mgipt_monai import RecordFile, StreamFailedError, find_stream
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from mgipt_monai.stream.summary import image_means

ROOT = Path(__file__).parents[1]
CONFIGS = [ROOT / "bundle" / "configs" / name for name in ("inference.yaml", "evaluate.yaml")]
GUARD = ROOT / "configs" / "guard.yaml"
EVERY = 5
MIXED = ("black", "white", "noise", "organ", "nan")
KINDS = (*MIXED, "mixed", "repeat")
Item = dict[str, Any]


def write_poison(kind: str, folder: Path, index: int, size: int, organs: Sequence[str]) -> str:
    """Write one poison image of a kind, and return its path."""
    rng = np.random.default_rng([index, MIXED.index(kind)])
    path = folder / f"{kind}_{index:04d}.png"
    if kind == "nan":
        path = path.with_suffix(".nii.gz")
        nibabel.save(nibabel.Nifti1Image(np.full((size, size, 1, 3), np.nan, "float32"), np.eye(4)), path)
        return str(path)
    if kind == "organ" and organs:
        picture = _picture(organs[index % len(organs)]).resize((size, size))
    elif kind == "organ":
        slice_of_balls, _ = create_test_image_2d(
            size, size, rad_max=size // 5, random_state=np.random.RandomState(index)
        )
        picture = Image.fromarray((255 * slice_of_balls).astype("uint8")).convert("RGB")
    else:
        shape = (size, size, 3)
        values = {"black": np.zeros(shape), "white": np.full(shape, 255), "noise": rng.integers(0, 256, shape)}[kind]
        picture = Image.fromarray(values.astype("uint8"))
    picture.save(path)
    return str(path)


def _picture(path: str) -> Image.Image:
    if not path.endswith((".nii", ".nii.gz")):
        return Image.open(path).convert("RGB")
    volume = nibabel.load(path).get_fdata()
    middle = volume[:, :, volume.shape[2] // 2]
    return Image.fromarray((255 * (middle - middle.min()) / np.ptp(middle)).astype("uint8")).convert("RGB")


def poisoned(good: Sequence[Item], kind: str, repeats: int, write: Callable[[str, int], str]) -> list[Item]:
    """Return the good items in order with poison in between, whose ``site`` is ``poison``."""
    mask = good[0]["label"]  # required, but its metrics are not used
    stream: list[Item] = []
    if kind == "repeat":
        at = len(good) // 4
        copies = [{**good[at], "site": "poison", "name": f"poison/{i:04d}"} for i in range(repeats)]
        return [*good[: at + 1], *copies, *good[at + 1 :]]
    kinds = itertools.cycle(MIXED if kind == "mixed" else [kind])
    for i, item in enumerate(good, start=1):
        stream.append(item)
        if i % (EVERY - 1) == 0:
            bad = write(next(kinds), i)
            stream.append({"image": bad, "label": mask, "site": "poison", "name": f"poison/{i:04d}"})
    return stream


def run(stream: Sequence[Item], configs: Sequence[Path], folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Run the bundle over a stream and return the records, including those of failed images."""
    folder.mkdir(parents=True)
    datalist = folder / "stream.json"
    datalist.write_text(json.dumps({"testing": list(stream)}))
    workflow = ConfigWorkflow(
        config_file=[str(path) for path in configs],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(ROOT / "bundle"),
        dataset_dir=str(datalist),
        output_dir=str(folder),
        **settings,
    )
    workflow.initialize()
    # black, white and NaN images are expected to fail
    with contextlib.suppress(StreamFailedError):
        workflow.evaluator.run()
    return RecordFile(folder / "records.jsonl").read()


def row(kind: str, guard: bool, records: Sequence[dict[str, Any]], clean: dict[str, float]) -> str:
    """Return one line of the table."""
    good = {r["name"]: 100 * image_means(r)["dsc"] for r in records if r["site"] != "poison"}
    bad = [r for r in records if r["site"] == "poison"]
    refused = sum(r["status"] == "failed" for r in bad)
    taught = sum(r["status"] == "ok" and r.get("learned", True) for r in bad)
    change = np.array([good[name] - clean[name] for name in good])
    return (
        f"| {kind} | {'on' if guard else 'off'} | {len(good)} | {len(bad)} | {refused} | {taught} "
        f"| {np.mean(list(clean.values())):.2f} | {np.mean(list(good.values())):.2f} "
        f"| {change.mean():+.2f} | {change.min():+.2f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", help="folder of sites with images and masks (default: photographs of the demo)")
    parser.add_argument("--names", help="comma-separated sites to use (default all)")
    parser.add_argument("--limit", type=int, default=8, help="good images per site (default %(default)s)")
    parser.add_argument("--organ", help="images of another organ (default: synthetic images)")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help="comma-separated kinds of poison (default %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=500, help="copies of the repeated image (default %(default)s)")
    parser.add_argument("--configs", nargs="*", type=Path, default=[], help="config overlays, such as that of the task")
    parser.add_argument("--ckpt_path", help="source weights (default: those of the bundle)")
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds.split(",")) - set(KINDS):
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    settings = {} if options.ckpt_path is None else {"ckpt_path": options.ckpt_path}
    organs = [item["image"] for item in find_stream(options.organ)] if options.organ else []

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sites = options.sites
        if sites is None:
            sites = folder / "sites"
            write_demo_stream(
                sites, [CAMERAS[n] for n in ("low_contrast", "warm_vignetted", "cold_noisy")], options.limit
            )
        names = options.names.split(",") if options.names else None
        good = find_stream(sites, sites=names, labelled=True, limit=options.limit)
        (folder / "poison").mkdir()
        size = Image.open(good[0]["image"]).width
        lines = []
        for guard in (False, True):
            configs = [*CONFIGS, *options.configs, *([GUARD] if guard else [])]
            clean_records = run(good, configs, folder / f"clean_{guard}", **settings)
            clean = {r["name"]: 100 * image_means(r)["dsc"] for r in clean_records}
            for kind in options.kinds.split(","):
                stream = poisoned(
                    good, kind, options.repeats, lambda k, i: write_poison(k, folder / "poison", i, size, organs)
                )
                records = run(stream, configs, folder / f"{kind}_{guard}", **settings)
                lines.append(row(kind, guard, records, clean))
                print(lines[-1], flush=True)
    print(
        "| poison | guard | good images | poisons | refused | taught | DSC without | DSC with | change | worst image |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|", *lines, sep="\n")


if __name__ == "__main__":
    main()
