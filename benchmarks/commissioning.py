# SPDX-License-Identifier: Apache-2.0
"""What commissioning gains on a site's other images, and how often a certificate is wrong, over random labelled images.

Each draw labels k random images of a site, commissions on them, and measures the deployed method on the other images.
A certificate is false if the mean metric of the others is below that of no adaptation; its share is that of all draws.

    python benchmarks/commissioning.py --sites SITES --configs configs/fundus_odoc.yaml --ckpt_path WEIGHTS.pt \
        --only rimone_r2 --draws 100 --k 5 10 --fallback steady --results draws.jsonl
    python benchmarks/commissioning.py --results draws.jsonl  # the table again

To make hundreds of draws affordable, the label-free methods predict each site once, in random order, and a draw takes
its images' predictions from there. In use, a method has seen the k images instead. What is fitted is fitted in each
draw. Interrupted, the same command goes on. The second table has the cross-validated gain of each
candidate on the labelled images, which is what the choice is made by.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from mgipt_monai import commission
from mgipt_monai.commissioning import CANDIDATES, trial
from mgipt_monai.commissioning.trial import NOTHING, Trial, score
from mgipt_monai.networks.correction import Correction

ROOT = Path(__file__).parents[1]
CONFIGS = [ROOT / "bundle" / "configs" / f"{name}.yaml" for name in ("inference", "evaluate", "commission")]


class Site:
    """A site's images, the network, and what each label-free method predicts on them."""

    def __init__(self, parser: ConfigParser, name: str) -> None:
        self.name = name
        self.network = parser.get_parsed_content("network").eval().requires_grad_(False)
        self.head = parser.get_parsed_content("head")
        self.classes = parser.get_parsed_content("class_names")
        items, images = parser.get_parsed_content("stream"), parser.get_parsed_content("dataset")
        self.cases = [
            {"image": case["image"].as_tensor(), "label": case["label"].as_tensor(), "name": item["name"]}
            for case, item in zip(images, items, strict=True)
            if item["site"] == name
        ]
        self.logits: dict[str, list[Tensor]] = {}

    def predictions(self, base: str, build: Any) -> list[Tensor]:
        """Return the base's logits of each image, predicted in one random order."""
        if base not in self.logits:
            method, logits = build(self.network), {}
            for index in np.random.default_rng(0).permutation(len(self.cases)):
                logits[int(index)] = method(self.cases[index]["image"][None])
            self.logits[base] = [logits[index] for index in range(len(self.cases))]
        return self.logits[base]

    def values(self, logits: Sequence[Tensor], chosen: Sequence[int], metric: str) -> np.ndarray:
        """Return the metric of the chosen images, mean over classes."""
        cases = [self.cases[index] for index in chosen]
        scored = [
            score(each, case["label"][None], self.head, metric, 2.0)[0]
            for each, case in zip(logits, cases, strict=True)
        ]
        return np.array([np.nanmean(each) for each in scored])


def drawn_once(site: Site, labelled: Sequence[int], rest: Sequence[int], settings: dict[str, Any]) -> dict[str, Any]:
    """Commission on the labelled images and measure the others."""
    places = {site.cases[index]["name"]: index for index in labelled}

    class FromCache(Trial):
        def _predict(self, build: Any, correction: Correction) -> Any:
            base = next((name for name, known in self.known.items() if known is build), None)
            if base is None or correction.norms or correction.prompts:
                return super()._predict(build, correction)
            everywhere = site.predictions(base, build)
            method = build(self.network)
            return [everywhere[places[case.name]] for case in self.cases], 0.0, method

        def run(self, wanted: Any, bases: Any) -> None:
            self.known = bases
            super().run(wanted, bases)

    module: Any = sys.modules["mgipt_monai.commissioning.commission"]  # a function has the same name
    trial.fit_temperature = lambda *_: 1.0  # changes no mask
    plain, module.Trial = module.Trial, FromCache
    try:
        result = commission(site.network, [site.cases[index] for index in labelled], head=site.head, **settings)
    finally:
        module.Trial = plain
    metric = settings["metric"]
    before = site.values([site.logits[NOTHING][index] for index in rest], rest, metric)
    row = next(row for row in result.table if row.name == result.chosen)
    correction = Correction() if result.setting is None else result.setting.correction
    if correction.norms or correction.prompts:
        network = correction.to_network(site.network)
        if row.base != NOTHING:
            raise ValueError("the script measures norms and prompts on the base none only")
        with torch.no_grad():
            logits = [network(correction.to_image(site.cases[index]["image"][None])) for index in rest]
    else:
        logits = [site.logits[row.base][index] for index in rest]
    gains = site.values([correction.to_logits(each) for each in logits], rest, metric) - before
    return {
        "certified": result.certified,
        "chosen": result.chosen,
        "gain": float(gains.mean()),
        "expected": result.gain,
        "lower_bound": result.lower_bound,
        "harmed": float((gains < -0.01).mean()),
        "candidates": {each.name: [each.gain, each.lower, each.upper] for each in result.table},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, in points and percent."""
    lines = [
        "| network, site | k | draws | gain [5th percentile] | harmed | certified | false | chosen |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((f"{row['network']}, {row['site']}", row["k"]), []).append(row)
    for (name, k), of_cell in sorted(cells.items(), key=lambda cell: (cell[0][1], cell[0][0])):
        gains = 100 * np.array([row["gain"] for row in of_cell])
        shares = [
            100 * np.mean(values)
            for values in (
                [row["harmed"] for row in of_cell],
                [row["certified"] for row in of_cell],
                [row["certified"] and row["gain"] < 0 for row in of_cell],
            )
        ]
        names = [row["chosen"] for row in of_cell]
        most = sorted(set(names), key=names.count, reverse=True)[:2]
        chosen = ", ".join(f"{each} {100 * names.count(each) / len(names):.0f} %" for each in most)
        lines.append(
            f"| {name} | {k} | {len(of_cell)} | {gains.mean():+.1f} [{np.percentile(gains, 5):+.1f}] "
            f"| {shares[0]:.0f} % | {shares[1]:.0f} % | {shares[2]:.0f} % | {chosen} |"
        )
    for k in sorted({k for _, k in cells}):
        means = [
            (np.mean([row["gain"] for row in of_cell]), np.mean([row["harmed"] for row in of_cell]))
            for (_, size), of_cell in cells.items()
            if size == k
        ]
        gain, harm = 100 * np.mean(means, axis=0)
        lines.append(f"| mean | {k} | | {gain:+.2f} | {harm:.1f} % | | | |")
    return "\n".join(lines)


def ablation(rows: Sequence[dict[str, Any]]) -> str:
    """Return the mean cross-validated gain of each candidate as a Markdown table, in points."""
    names = list(dict.fromkeys(name for row in rows for name in row["candidates"] if name != NOTHING))
    lines = ["| network, site | k | " + " | ".join(names) + " |", "|---|--:|" + "--:|" * len(names)]
    for key in sorted({(row["k"], row["network"], row["site"]) for row in rows}):
        of_cell = [row["candidates"] for row in rows if (row["k"], row["network"], row["site"]) == key]
        means = [np.mean([row[name][0] for row in of_cell if name in row]) for name in names]
        lines.append(f"| {key[1]}, {key[2]} | {key[0]} | " + " | ".join(f"{100 * mean:+.1f}" for mean in means) + " |")
    return "\n".join(lines)


def main() -> None:
    """Make the draws that the results lack, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="file of draws, one a line; continued")
    parser.add_argument("--sites", type=Path)
    parser.add_argument("--only", nargs="+", help="sites to take")
    parser.add_argument("--configs", nargs="*", default=[], type=Path)
    parser.add_argument("--ckpt_path", type=Path)
    parser.add_argument("--k", nargs="+", type=int, default=[5, 10, 20])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--fallback", default="steady")
    parser.add_argument("--bound", default="student")
    parser.add_argument("--metric", default="dice", choices=["dice", "surface_dice"], help="at 2 pixels")
    parser.add_argument("--most", type=int, default=0, help="of the other images, to measure at most; 0 means all")
    options = parser.parse_args()
    logging.getLogger("mgipt_monai").setLevel(logging.WARNING)
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    if options.sites is not None:
        done = {(row["network"], row["site"], row["k"], row["draw"]) for row in rows}
        settings = {key: getattr(options, key) for key in ("candidates", "fallback", "bound", "metric")}
        config = ConfigParser(ConfigParser.load_config_files([str(path) for path in (*CONFIGS, *options.configs)]))
        config.update({"bundle_root": str(ROOT / "bundle"), "dataset_dir": str(options.sites)})
        config.update({"ckpt_path": str(options.ckpt_path), "stream": "@found_images", "commission_mode": "new"})
        config.update({"sites": options.only, "device": "$torch.device('cpu')"})
        config.get_parsed_content("initialize")
        sites = [Site(config, name) for name in options.only]
        for draw in range(options.draws):
            for site, k in [(site, k) for k in options.k for site in sites]:
                name = options.ckpt_path.stem
                if (name, site.name, k, draw) in done:
                    continue
                order = np.random.default_rng([draw, k]).permutation(len(site.cases))
                rest = order[k : k + options.most] if options.most else order[k:]
                found = drawn_once(site, order[:k].tolist(), rest.tolist(), settings)
                rows.append({"network": name, "site": site.name, "k": k, "draw": draw, **found})
                with options.results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows), ablation(rows), sep="\n\n")


if __name__ == "__main__":
    main()
