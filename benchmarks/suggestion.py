# SPDX-License-Identifier: Apache-2.0
"""What a correction gains that is fitted to suggested images, compared with random ones.

The correction is one offset per class, which is added to the unadapted network's logits: the one with the highest mean
Dice on the labelled images. Its gain is that in Dice, in points, on the images of the site that are not labelled. The
network has a sigmoid head, and the images have its input's size.

The error is that of the Dice without correction on the labelled images, as an estimate of the site's: its root mean
square over the choices, in points.

    python benchmarks/suggestion.py --sites SITES --configs configs/fundus_odoc.yaml --ckpt_path WEIGHTS.pt
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from mgipt_monai.commissioning.suggestion import Description, describe, distances_between, spread_sample

ROOT = Path(__file__).parents[1]
CONFIGS = [ROOT / "bundle" / "configs" / name for name in ("inference.yaml", "evaluate.yaml")]
OFFSETS = np.arange(-6, 6.01, 0.25)
NONE = len(OFFSETS) // 2


def curve(logits: Tensor, label: Tensor) -> np.ndarray:
    """Return the Dice (K, offsets) of an image's logits (K, \\*spatial) with each offset added."""
    rows = []
    for values, mask in zip(logits.flatten(1).numpy(), label.flatten(1).numpy() > 0, strict=True):
        # a pixel is in the mask where its logit is above minus the offset
        predicted, both = (len(v) - np.searchsorted(np.sort(v), -OFFSETS, "right") for v in (values, values[mask]))
        rows.append(2 * both / np.maximum(predicted + mask.sum(), 1))
    return np.stack(rows)


def gain(curves: np.ndarray, labelled: Sequence[int]) -> float:
    """Return the gain on the images that are not labelled, in points."""
    rest = np.setdiff1d(np.arange(len(curves)), labelled)
    best = curves[labelled].mean(0).argmax(-1)
    return 100 * float(np.mean([curves[rest, j, i].mean() - curves[rest, j, NONE].mean() for j, i in enumerate(best)]))


def measured(configs: Sequence[Path], **settings: object) -> dict[str, tuple[list[Description], np.ndarray]]:
    """Return the descriptions of each site's images, and their Dice curves (images, K, offsets)."""
    parser = ConfigParser(ConfigParser.load_config_files([str(path) for path in (*CONFIGS, *configs)]))
    parser.update({"bundle_root": str(ROOT / "bundle"), "device": "$torch.device('cpu')", **settings})
    parser["stream"] = "@found_images"
    parser.get_parsed_content("initialize")
    network = parser.get_parsed_content("network").eval()
    items: dict[str, list[dict]] = {}
    for item in parser.get_parsed_content("dataset"):
        items.setdefault(item["site"], []).append(item)
    found = {}
    for site, of_site in items.items():
        with torch.no_grad():
            curves = [curve(network(item["image"].as_tensor()[None])[0], item["label"].as_tensor()) for item in of_site]
        found[site] = describe(network, of_site), np.stack(curves)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", required=True, help="folder of sites with images and masks")
    parser.add_argument("--names", help="comma-separated sites to use (default all)")
    parser.add_argument("--k", type=int, nargs="+", default=[5, 10, 20], help="labelled images (default %(default)s)")
    parser.add_argument("--draws", type=int, default=200, help="choices of either kind (default %(default)s)")
    parser.add_argument("--configs", nargs="*", type=Path, default=[], help="config overlays, such as that of the task")
    parser.add_argument("--ckpt_path", help="source weights (default: those of the bundle)")
    options = parser.parse_args(arguments)
    names = None if options.names is None else options.names.split(",")
    settings = {} if options.ckpt_path is None else {"ckpt_path": options.ckpt_path}
    sites = measured(options.configs, dataset_dir=options.sites, sites=names, **settings)
    print("| site | k | labelled images | gain | 5th percentile | 95th percentile | error |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for (site, (described, curves)), k in itertools.product(sites.items(), options.k):
        count, distances = len(described), distances_between(described)
        dice = 100 * curves[:, :, NONE].mean(1)
        choices = {
            "random": [np.random.default_rng(i).choice(count, k, replace=False) for i in range(options.draws)],
            "suggested": [spread_sample(distances, k, range(count), seed) for seed in range(options.draws)],
        }
        for name, chosen in choices.items():
            found = [gain(curves, labelled) for labelled in chosen]
            cells = [f"{value:+.2f}" for value in (np.mean(found), *np.quantile(found, [0.05, 0.95]))]
            error = np.sqrt(np.mean([(dice[labelled].mean() - dice.mean()) ** 2 for labelled in chosen]))
            print(f"| {site} | {k} | {name} | {' | '.join(cells)} | {error:.2f} |", flush=True)


if __name__ == "__main__":
    main()
