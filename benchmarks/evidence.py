# SPDX-License-Identifier: Apache-2.0
"""How early the evidence of site correction, and betting martingales, notice that images are not the source's.

Half of the source's images are the reference. For each of several random orders, a detector sees either the other half,
where each alarm is false, or the images of another site, at once or after some of the other half:

- the evidence of ``SiteStatistics``: its alarm is above the highest value that it reached in as many random orders of
  the reference; and the same without the first ten images of each stream, where the evidence is unsteady;
- a test martingale (``DriftMonitor``) on the entropy of the unadapted prediction, which is what POEM bets on (Bar et
  al., Protected test-time adaptation via online entropy matching, NeurIPS 2024);
- one on the distance of the image from the source's statistics, the alignment loss of Eq. 2;
- one on both;
- one on all channels of the first norm layer, each one's signed distance from the source in mean and in deviation.

    python benchmarks/evidence.py --dataset_dir SITES --source rimone_r3 --others drishti_gs,rimone_r2 \\
      --configs configs/fundus_odoc.yaml --ckpt_path WEIGHTS.pt
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from drift import Values, cells, first_alarm, loaded
from torch import Tensor

from mgipt_monai.methods import DriftMonitor
from mgipt_monai.methods.weight_updates.losses import entropy
from mgipt_monai.networks import SiteNorms, SiteStatistics

EVIDENCE = {"evidence": 0, "evidence from image 11": 10}
"""Detector to the number of images that it leaves out at a stream's start."""
MARTINGALES = {
    "martingale on the entropy": ["entropy"],
    "martingale on the distance": ["distance"],
    "martingale on both": ["entropy", "distance"],
    "martingale on the channels": ["channel"],
}
"""Detector to the first words of the signals that it bets on."""


def signals_of(norms: SiteNorms, images: Sequence[Tensor], head: str) -> Values:
    """Return what the martingales bet on, for each image (1, C, \\*spatial)."""
    rows = []
    for image in images:
        norms.start(image)
        with norms.signing():
            logits, loss = norms.predict_and_measure(image)
        channels = {f"channel {i}": value for i, value in enumerate(norms.signature.flatten().tolist())}
        rows.append({"entropy": entropy(logits, head).mean().item(), "distance": loss, **channels})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def evidence_along(norms: SiteNorms, images: Sequence[Tensor]) -> np.ndarray:
    """Return the evidence for another site after each image of a stream."""
    site, found = SiteStatistics(), []
    for image in images:
        norms.start(image)
        site.begin()
        with norms.corrected_to(site, observe=True):
            norms.predict_windows(image, "calibrated")
        found.append(site.evidence)
        site.end()
    return np.array(found)


def alarms_of(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the first alarm of each order, by detector and stream, counted from where the other site begins."""
    names = [options.source, *options.others.split(",")]
    settings = {"dataset_dir": options.dataset_dir, "sites": names, "limit": options.limit}
    network, head, items = loaded(options.configs, ckpt_path=options.ckpt_path, **settings)
    norms = SiteNorms(network.requires_grad_(False))
    images = {site: [item["image"].as_tensor()[None] for item in found] for site, found in items.items()}
    signals = {site: signals_of(norms, found, head) for site, found in images.items()}
    streams = ["the source's other half", *(f"{site}{late}" for site in names[1:] for late in ("", " later"))]
    alarms: dict[str, dict[str, list[float]]] = {
        name: {stream: [] for stream in streams} for name in (*EVIDENCE, *MARTINGALES)
    }
    half = len(images[options.source]) // 2
    reference, *_ = np.split(np.random.default_rng(0).permutation(len(images[options.source])), [half])
    own = np.setdiff1d(np.arange(len(images[options.source])), reference)
    orders = [np.random.default_rng(seed) for seed in range(options.repeats)]
    usual = [evidence_along(norms, [images[options.source][i] for i in rng.permutation(reference)]) for rng in orders]
    limits = {name: max(found[skipped:].max() for found in usual) for name, skipped in EVIDENCE.items()}
    print(f"reference: {half} images", *(f"limit of {name}: {limit:.3f}" for name, limit in limits.items()), sep="; ")
    for repeat, rng in enumerate(orders):
        begin = [(options.source, i) for i in rng.permutation(own)]
        for stream in streams:
            site = stream.removesuffix(" later")
            before = begin if site not in images else begin[: options.before] if site != stream else []
            after = [] if site not in images else [(site, i) for i in rng.permutation(len(images[site]))]
            places = before + after
            count = len(before) if after else 0
            found = evidence_along(norms, [images[where][i] for where, i in places])
            for name, skipped in EVIDENCE.items():
                above = np.flatnonzero(found[skipped:] > limits[name])
                alarms[name][stream].append(above[0] + skipped + 1 - count if len(above) else np.inf)
            for name, words in MARTINGALES.items():
                watched = [signal for signal in signals[options.source] if signal.split()[0] in words]
                monitor = DriftMonitor(
                    {signal: signals[options.source][signal][reference].tolist() for signal in watched},
                    options.false_alarms,
                    seed=repeat,
                )
                values = {signal: np.array([signals[where][signal][i] for where, i in places]) for signal in watched}
                alarms[name][stream].append(first_alarm(monitor, values) - count)
    return alarms


def table(options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| stream | detector | false alarms, % | noticed, % | median | 90th percentile |\n|---|---|--:|--:|--:|--:|"
    alarms = alarms_of(options)
    for stream in next(iter(alarms.values())):
        for name, found in alarms.items():
            first = np.array(found[stream])
            if stream.startswith("the source"):
                yield f"| {stream} | {name} | {100 * np.mean(np.isfinite(first)):.0f} | | | |"
            else:
                yield f"| {stream} | {name} | {cells(first)} |"


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True, help="folder of sites")
    parser.add_argument("--source", required=True, help="site that the network was trained on")
    parser.add_argument("--others", required=True, help="other sites, comma-separated")
    parser.add_argument("--configs", nargs="*", type=Path, default=[], help="config overlays, such as that of the task")
    parser.add_argument("--ckpt_path", required=True, help="source weights")
    parser.add_argument("--limit", type=int, help="at most this number of images per site")
    parser.add_argument("--before", type=int, default=30, help="images of the source before a change (%(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="random orders (default %(default)s)")
    parser.add_argument("--false_alarms", type=float, default=0.05, help="stated rate (default %(default)s)")
    for line in list(table(parser.parse_args(arguments))):
        print(line, flush=True)


if __name__ == "__main__":
    logging.getLogger("mgipt_monai.methods").setLevel(logging.ERROR)  # each alarm is a line of the log
    main()
