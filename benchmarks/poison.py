# SPDX-License-Identifier: Apache-2.0
"""The effect of images that do not belong to a stream on those that do, without and with the guard.

Every fifth image of the stream is poison, and one kind repeats an image many times. The good images and their order
are the same in all runs. Prints their mean DSC:

    python benchmarks/poison.py --sites SITES --limit 20 --configs configs/fundus_odoc.yaml --ckpt_path WEIGHTS.pt

With ``--after N``, N good images are followed by an attack of many poison images and by N other good ones. Prints the
change of the mean DSC of the latter, and of the first five of them, against the same stream without the attack:

    python benchmarks/poison.py --after 20 --sites SITES --names SITE --configs configs/fundus_odoc.yaml \\
      --ckpt_path WEIGHTS.pt

``--orders M`` repeats that in M random orders of the site's images, each with a seed of its own, and prints the mean
change with its 95 % interval. ``--clean`` compares streams without poison, with and without the memory of sites.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from monai.data import create_test_image_2d
from monai.metrics import compute_dice
from PIL import Image
from scipy import stats
from torch.nn import functional

from mgipt_monai import MGIPT, AdaptationMethod, RecordFile, StreamFailedError, find_stream
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_stream
from mgipt_monai.networks import InstancePrompt
from mgipt_monai.stream.summary import image_means

ROOT = Path(__file__).parents[1]
CONFIGS = [ROOT / "bundle" / "configs" / name for name in ("inference.yaml", "evaluate.yaml")]
GUARD = ROOT / "configs" / "guard.yaml"
EVERY = 5
MIXED = ("black", "white", "noise", "organ", "nan")
KINDS = (*MIXED, "mixed", "repeat")
ATTACKS = {"creep": 40, "creep_dark": 40, "alternate": 30, "dark": 150, "noise": 30, "organ": 30}
"""Kinds of attack with their number of images."""
CHANGED = ("creep", "creep_dark", "alternate", "dark")
"""Attacks with changed good images; the others are poison as above."""
PRESETS: dict[str, tuple[Path, ...]] = {
    "default": (),
    "steady": (ROOT / "configs" / "presets" / "steady.yaml",),
    "guard": (GUARD,),
}
Item = dict[str, Any]
Loader = Callable[[Item], tuple[torch.Tensor, torch.Tensor]]


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


def attacking(kind: str, number: int, count: int, picture: np.ndarray) -> np.ndarray:
    """Return a good image as one of an attack.

    Args:
        kind: ``creep``: brighter and brighter until most of it is white; ``creep_dark``: darker and darker until most
            of it is black; ``alternate``: too dark and too bright in turn; ``dark``: nearly black with fresh noise.
        number: number of the image in the attack, from 0.
        count: number of images in the attack.
        picture: the good image, values 0 to 255.
    """
    share = (number + 1) / count
    changed = {
        "creep": lambda: picture * (1 + 3 * share),
        "creep_dark": lambda: picture - 150 * share,
        "alternate": lambda: picture + (150 if number % 2 else -120),
        "dark": lambda: 0.1 * picture + np.random.default_rng(number).normal(0, 8, picture.shape),
    }[kind]()
    return np.clip(changed.round(), 0, 255).astype("uint8")


def attack(kind: str, good: Sequence[Item], folder: Path, size: int, organs: Sequence[str]) -> list[Item]:
    """Write the images of an attack and return their items; those that come out constant are left out."""
    count, items = ATTACKS[kind], []
    for number in range(count):
        if kind in CHANGED:
            item = good[0 if kind == "dark" else number % len(good)]
            values = attacking(kind, number, count, np.asarray(_picture(item["image"])).astype("float64"))
            path = str(folder / f"{kind}_{number:04d}.png")
            if values.min() == values.max():
                continue
            Image.fromarray(values).save(path)
        else:
            path = write_poison(kind, folder, number, size, organs)
        items.append({"image": path, "label": good[0]["label"], "site": "poison", "name": f"poison/{number:04d}"})
    return items


def adapt(stream: Sequence[Item], configs: Sequence[Path], **settings: Any) -> tuple[AdaptationMethod, Loader]:
    """Build the bundle's method, adapt it to a stream, and return it with what reads further items."""
    workflow = ConfigWorkflow(
        config_file=[str(path) for path in configs],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(ROOT / "bundle"),
        output_dir="unused",
        **settings,
    )
    workflow.parser["handlers"], workflow.parser["evaluator#summary_path"] = [], None
    workflow.parser["stream"] = list(stream)
    workflow.initialize()
    get: Callable[[str], Any] = workflow.parser.get_parsed_content
    method, transform = get("method"), get("preprocessing")

    def load(item: Item) -> tuple[torch.Tensor, torch.Tensor]:
        read = transform(dict(item))
        return read["image"].as_tensor()[None], read["label"].as_tensor()[None]

    with only_learning(method):
        for item in stream:
            method(load(item)[0])
    tune_once(method)
    return method, load


def dice(method: AdaptationMethod, load: Loader, stream: Sequence[Item]) -> np.ndarray:
    """Return the DSC in percent of each image of a stream, adapting to it."""
    found = []
    for item in stream:
        image, label = load(item)
        logits = functional.interpolate(method(image), size=label.shape[2:], mode="bilinear")
        found.append(100 * compute_dice((logits > 0).float(), label).nan_to_num(1.0).mean().item())
    return np.array(found)


def tune_once(method: AdaptationMethod) -> None:
    """Let MGIPT tune the instance prompt of each image once: it does not depend on the images before."""
    mgipt = getattr(method, "method", method)  # guarded or not
    if not isinstance(mgipt, MGIPT):
        return
    prompt, tune, known = mgipt.instance_prompt, mgipt.instance_prompt.tune, {}

    def remembered(image: torch.Tensor, *functions: Any) -> Any:
        key = (image.numpy().tobytes(), method.images_seen)
        if key not in known:
            known[key] = tune(image, *functions), prompt.amplitude
        found, prompt.amplitude = known[key]
        return found

    prompt.tune = remembered


@contextlib.contextmanager
def only_learning(method: AdaptationMethod) -> Iterator[None]:
    """Leave out the instance prompts, from which nothing is learnt; a guard needs them."""
    if not isinstance(method, MGIPT):
        yield
        return
    prompt, method.instance_prompt = method.instance_prompt, InstancePrompt(sizes=())
    try:
        yield
    finally:
        method.instance_prompt = prompt


def after(
    good: Sequence[Item], rest: Sequence[Item], kinds: Sequence[str], folder: Path, organs: Sequence[str],
    configs: Sequence[Path], **settings: Any,
) -> Iterator[tuple[str, float, np.ndarray]]:  # fmt: skip
    """Measure how attacks change the DSC of the good images after them.

    Args:
        good: good images; the attacks come after the first half.
        rest: other images of the site, which the attacks change.
        kinds: attacks.
        folder: where poison is written.
        organs: images of another organ.
        configs: the bundle's configs.
        settings: of the bundle.

    Yields:
        Each attack, the mean DSC without it, and the change of the DSC of each image after it.
    """
    half, size = len(good) // 2, Image.open(good[0]["image"]).width
    method, load = adapt(good[:half], configs, **settings)
    state = copy.deepcopy(method.adaptation_state())
    clean = dice(method, load, good[half:])
    for kind in kinds:
        method.load_adaptation_state(copy.deepcopy(state))
        with only_learning(method):
            for item in attack(kind, rest, folder, size, organs):
                with contextlib.suppress(ValueError):  # refused
                    method(load(item)[0])
        # the place in the stream seeds the jitter: what differs then is the attack's doing alone
        method.images_seen = half
        yield kind, float(clean.mean()), dice(method, load, good[half:]) - clean


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


def clean(stream: Sequence[Item], configs: Sequence[Path], **settings: Any) -> Iterator[tuple[str, float, np.ndarray]]:
    """Yield the number of images, the mean DSC without the memory of sites, and the change of each image with it."""
    method, load = adapt([], configs, **settings)
    remembering = getattr(method, "method", method)
    with_memory = dice(method, load, stream)
    remembering.memory = None
    method.reset()
    without = dice(method, load, stream)
    yield str(len(stream)), float(without.mean()), with_memory - without


def interval(values: Sequence[float]) -> str:
    """Return the mean of several orders with its 95 % interval (Student's), or the only value."""
    mean = np.mean(values)
    if len(values) == 1:
        return f"{mean:+.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def orders(items: Sequence[Item], count: int | None) -> Iterator[tuple[Sequence[Item], dict[str, Any]]]:
    """Yield the items in random orders with the bundle's seed; without a count, as they are."""
    if count is None:
        yield items, {}
        return
    for order in range(count):
        yield [items[i] for i in np.random.default_rng(order).permutation(len(items))], {"seed": order}


def print_after(
    options: argparse.Namespace, sites: str | Path, names: Sequence[str] | None, folder: Path, organs: Sequence[str],
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """Print the table of ``--after`` or ``--clean``."""
    if options.clean:
        print("| preset | site | images | DSC without memory | change with it | worst image |")
        print("|---|---|--:|--:|--:|--:|")
    else:
        print("| preset | site | attack | DSC without | change | first five | worst image |")
        print("|---|---|---|--:|--:|--:|--:|")
    if options.no_memory:
        settings = {**settings, "memory": None}
    stream = find_stream(sites, sites=names, labelled=True)
    for preset, site in itertools.product(options.presets, dict.fromkeys(item["site"] for item in stream)):
        items = [item for item in stream if item["site"] == site]
        configs = [*CONFIGS, *options.configs, *PRESETS[preset]]
        found: dict[str, list[tuple[float, np.ndarray]]] = {}
        for number, (ordered, seed) in enumerate(orders(items, options.orders)):
            place = folder / preset / site / str(number)
            place.mkdir(parents=True)
            if options.clean:
                results = clean(ordered[: options.clean], configs, **settings, **seed)
            elif options.orders is None:
                # every third image, so that the images come from all of the site
                good, rest = ordered[::3][: 2 * options.after], ordered[1::3]
                results = after(good, rest, options.attacks, place, organs, configs, **settings)
            else:
                half = min(options.after, len(ordered) // 3)
                good, rest = ordered[: 2 * half], ordered[2 * half :]
                results = after(good, rest, options.attacks, place, organs, configs, **settings, **seed)
            for kind, dsc, change in results:
                found.setdefault(kind, []).append((dsc, change))
        for kind, pairs in found.items():
            changes = [change for _, change in pairs]
            mean, first = (interval([c[part].mean() for c in changes]) for part in (slice(None), slice(5)))
            row = [preset, site, kind, f"{np.mean([dsc for dsc, _ in pairs]):.2f}", mean]
            worst = f"{min(c.min() for c in changes):+.2f}"
            print("|", " | ".join([*row, worst] if options.clean else [*row, first, worst]), "|", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", help="folder of sites with images and masks (default: photographs of the demo)")
    parser.add_argument("--names", help="comma-separated sites to use (default all)")
    parser.add_argument("--limit", type=int, default=8, help="good images per site (default %(default)s)")
    parser.add_argument("--organ", help="images of another organ (default: synthetic images)")
    parser.add_argument("--kinds", help=f"comma-separated kinds of poison: {', '.join(KINDS)} (default all)")
    parser.add_argument("--after", type=int, help="measure this number of good images after an attack")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="comma-separated attacks (default %(default)s)")
    parser.add_argument("--presets", default=",".join(PRESETS), help="comma-separated presets (default %(default)s)")
    parser.add_argument("--orders", type=int, help="with --after or --clean: number of random orders of each site")
    parser.add_argument("--clean", type=int, help="compare this number of good images with and without the memory")
    parser.add_argument("--no_memory", action="store_true", help="with --after: without the memory of sites")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--repeats", type=int, default=500, help="copies of the repeated image (default %(default)s)")
    parser.add_argument("--configs", nargs="*", type=Path, default=[], help="config overlays, such as that of the task")
    parser.add_argument("--ckpt_path", help="source weights (default: those of the bundle)")
    options = parser.parse_args(arguments)
    for name, known in (("kinds", KINDS), ("attacks", ATTACKS), ("presets", PRESETS)):
        chosen = (getattr(options, name) or ",".join(known)).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"no {', '.join(sorted(unknown))} in --{name}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    if options.threads:
        torch.set_num_threads(options.threads)
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
        if options.after or options.clean:
            print_after(options, sites, names, folder, organs, settings)
            return
        good = find_stream(sites, sites=names, labelled=True, limit=options.limit)
        (folder / "poison").mkdir()
        size = Image.open(good[0]["image"]).width
        lines = []
        for guard in (False, True):
            configs = [*CONFIGS, *options.configs, *([GUARD] if guard else [])]
            clean_records = run(good, configs, folder / f"clean_{guard}", **settings)
            clean = {r["name"]: 100 * image_means(r)["dsc"] for r in clean_records}
            for kind in options.kinds:
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
