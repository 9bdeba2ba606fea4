# SPDX-License-Identifier: Apache-2.0
"""How often the drift monitor raises a false alarm, and how many images it takes to notice a change.

With simulated signals:

    python benchmarks/drift.py

With real images: the areas, confidence, brightness and contrast of the images of one site, some of which are the
reference, and then those of another site:

    python benchmarks/drift.py --sites SITES --configs configs/fundus_odoc.yaml --ckpt_path WEIGHTS.pt
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from mgipt_monai.commissioning.suggestion import describe, distances_between, spread_sample
from mgipt_monai.methods import DriftMonitor

ROOT = Path(__file__).parents[1]
INFERENCE = ROOT / "bundle" / "configs" / "inference.yaml"
Values = Mapping[str, np.ndarray]
"""A signal's name to the values of all images."""


def first_alarm(monitor: DriftMonitor, values: Values) -> float:
    """Return the number of the image, from 1, at which a monitor raises its alarm; infinity without one."""
    for number, image in enumerate(zip(*values.values(), strict=True), start=1):
        if monitor.observe(dict(zip(values, image, strict=True)))["alarm"]:
            return number
    return np.inf


def simulated(
    k: int, before: int, after: int, shift: float, signals: int, repeats: int, false_alarms: float
) -> np.ndarray:
    """Return the first alarm of each repeat, counted from a shift of one of several normal signals after ``before``."""
    alarms = []
    for repeat in range(repeats):
        values = np.random.default_rng(repeat).standard_normal((signals, k + before + after))
        values[0, k + before :] += shift
        named = {f"signal {i}": row for i, row in enumerate(values)}
        monitor = DriftMonitor({name: row[:k].tolist() for name, row in named.items()}, false_alarms, seed=repeat)
        alarms.append(first_alarm(monitor, {name: row[k:] for name, row in named.items()}) - before)
    return np.array(alarms)


def signals_of(image: Tensor, logits: Tensor, head: str) -> dict[str, float]:
    """Return what the monitor watches of an image (C, \\*spatial) and its logits (K, \\*spatial)."""
    if head == "sigmoid":
        masks, confidence = logits > 0, (2 * logits.sigmoid() - 1).abs()
    else:
        masks, confidence = (logits.argmax(0) == torch.arange(1, len(logits))[:, None, None]), logits.softmax(0).amax(0)
    areas = {f"area {number}": mask.float().mean().item() for number, mask in enumerate(masks, start=1)}
    rest = {"confidence": confidence.mean(), "brightness": image.mean(), "contrast": image.std()}
    return {**areas, **{name: float(value) for name, value in rest.items()}}


def loaded(configs: Sequence[Path], **settings: object) -> tuple[nn.Module, str, dict[str, list[dict]]]:
    """Return the network of the bundle, its head, and the images of each site."""
    parser = ConfigParser(ConfigParser.load_config_files([str(INFERENCE), *map(str, configs)]))
    parser.update({"bundle_root": str(ROOT / "bundle"), "device": "$torch.device('cpu')", **settings})
    parser["stream"] = "@found_images"
    parser.get_parsed_content("initialize")
    network, head = parser.get_parsed_content("network").eval(), parser.get_parsed_content("head")
    items: dict[str, list[dict]] = {}
    for item in parser.get_parsed_content("dataset"):
        items.setdefault(item["site"], []).append(item)
    return network, head, items


def measured(configs: Sequence[Path], **settings: object) -> dict[str, tuple[Values, Tensor]]:
    """Return each site's signals, with the network of the bundle, not adapted, and its images' distances."""
    network, head, items = loaded(configs, **settings)
    found = {}
    for site, of_site in items.items():
        with torch.no_grad():
            images = [item["image"].as_tensor() for item in of_site]
            rows = [signals_of(image, network(image[None])[0], head) for image in images]
        values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        found[site] = values, distances_between(describe(network, of_site, head))
    return found


def between_sites(
    reference: Values, other: Values, k: int, before: int, repeats: int, false_alarms: float
) -> np.ndarray:
    """Return the first alarm of each repeat, counted from the change to another site after ``before`` images."""
    alarms = []
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        own, others = shuffled(reference, rng), shuffled(other, rng)
        stream = {name: np.concatenate([row[k : k + before], others[name]]) for name, row in own.items()}
        alarms.append(first_alarm(started(own, k, false_alarms, repeat), stream) - before)
    return np.array(alarms)


def within_a_site(
    values: Values,
    k: int,
    repeats: int,
    false_alarms: float,
    distances: Tensor | None = None,
    in_order: bool = False,
) -> np.ndarray:
    """Return the first alarm of each repeat on a site's own images.

    Args:
        values: of the site.
        k: reference images, drawn at random.
        repeats: number of draws.
        false_alarms: stated rate.
        distances: of the site's images, to take suggested ones as the reference instead.
        in_order: whether the other images come in the order of their names, not at random.
    """
    alarms = []
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        count = len(next(iter(values.values())))
        order = rng.permutation(count)
        first = order[:k] if distances is None else spread_sample(distances, k, range(count), repeat)
        rest = np.setdiff1d(np.arange(count), first) if in_order else order[~np.isin(order, first)]
        own = {name: row[[*first, *rest]] for name, row in values.items()}
        stream = {name: row[k:] for name, row in own.items()}
        alarms.append(first_alarm(started(own, k, false_alarms, repeat), stream))
    return np.array(alarms)


def started(values: Values, k: int, false_alarms: float, seed: int) -> DriftMonitor:
    """Return a monitor whose reference is the first ``k`` images."""
    return DriftMonitor({name: row[:k].tolist() for name, row in values.items()}, false_alarms, seed=seed)


def shuffled(values: Values, rng: np.random.Generator) -> Values:
    """Return the images in random order."""
    order = rng.permutation(len(next(iter(values.values()))))
    return {name: row[order] for name, row in values.items()}


def cells(alarms: np.ndarray) -> str:
    """Return cells: alarms before the change and after it, in percent, and when the half and 90 % of these were."""
    true = alarms[alarms >= 1]
    late = [f"{q:.0f}" if np.isfinite(q) else "-" for q in np.quantile(true, [0.5, 0.9], method="higher")]
    return f"{100 * np.mean(alarms < 1):.1f} | {100 * np.mean(np.isfinite(true)):.0f} | {late[0]} | {late[1]}"


def simulation(options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of two tables: false alarms, and the delay of true ones."""
    yield f"| k | signals | false alarms in {options.images} images, % |\n|--:|--:|--:|"
    for k in options.k:
        alarms = simulated(k, 0, options.images, 0.0, options.signals, options.repeats, options.false_alarms)
        yield f"| {k} | {options.signals} | {100 * np.mean(np.isfinite(alarms)):.1f} |"
    yield "\n| k | images before | shift, spreads | false alarms, % | noticed, % | median | 90th percentile |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    for k, before, shift in itertools.product(options.k, (0, 50), (0.5, 1.0, 2.0)):
        alarms = simulated(k, before, 200, shift, options.signals, options.repeats // 4, options.false_alarms)
        yield f"| {k} | {before} | {shift} | {cells(alarms)} |"


def real(options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of a table of the sites."""
    names = None if options.names is None else options.names.split(",")
    settings = {} if options.ckpt_path is None else {"ckpt_path": options.ckpt_path}
    sites = measured(options.configs, dataset_dir=options.sites, sites=names, **settings)
    rate = options.false_alarms
    yield "| site | images | k | random order: alarms, % | suggested reference: alarms, % | by name: alarms, % |"
    yield "|---|--:|--:|--:|--:|--:|"
    for (site, (values, distances)), k in itertools.product(sites.items(), options.k):
        ways: list[dict] = [{}, {"distances": distances}, {"in_order": True}]
        alarms = [within_a_site(values, k, options.repeats, rate, **way) for way in ways]
        shares = " | ".join(f"{100 * np.mean(np.isfinite(each)):.1f}" for each in alarms)
        yield f"| {site} | {len(distances)} | {k} | {shares} |"
    yield "\n| site | then | k | images before | false alarms, % | noticed, % | median | 90th percentile |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for (site, other), k, before in itertools.product(itertools.permutations(sites, 2), options.k, (0, 30)):
        alarms = between_sites(sites[site][0], sites[other][0], k, before, options.repeats // 4, rate)
        yield f"| {site} | {other} | {k} | {before} | {cells(alarms)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[5, 10, 20], help="labelled images (default %(default)s)")
    parser.add_argument("--images", type=int, default=1000, help="images without drift (default %(default)s)")
    parser.add_argument("--signals", type=int, default=1, help="independent signals (default %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=500, help="of each stream; a quarter with a change (default %(default)s)"
    )
    parser.add_argument("--false_alarms", type=float, default=0.05, help="stated rate (default %(default)s)")
    parser.add_argument("--sites", help="folder of sites (default: simulated signals)")
    parser.add_argument("--names", help="comma-separated sites to use (default all)")
    parser.add_argument("--configs", nargs="*", type=Path, default=[], help="config overlays, such as that of the task")
    parser.add_argument("--ckpt_path", help="source weights (default: those of the bundle)")
    options = parser.parse_args(arguments)
    for line in real(options) if options.sites else simulation(options):
        print(line, flush=True)


if __name__ == "__main__":
    logging.getLogger("mgipt_monai.commissioning").setLevel(logging.ERROR)  # each alarm is a line of the log
    main()
