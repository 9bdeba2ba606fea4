# SPDX-License-Identifier: Apache-2.0
"""Compares parts of site correction in networks without batch norm: tables of docs/results/steady-instance-norm.md.

The configs are those of `python -m monai.bundle run`; run it from the repository root. Prints gain over no adaptation
and harm of the corrected image's prediction alone and fused with the source's by half of the evidence, for the tone,
for the amplitudes, for both, and for both without a gate; and for both with other shares of the evidence:

    python benchmarks/look_study.py configs/hippocampus.yaml configs/shifts/contrast.yaml --norm instance \\
      --dataset_dir test.json --ckpt_path WEIGHTS.pt --statistics STATISTICS.pt --limit 16
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from site_study import CONFIGS, ROOT, dice
from torch import Tensor

from mgipt_monai import SourceStatistics
from mgipt_monai.methods.site_correction import TRUST_OF_LOOK
from mgipt_monai.networks import SiteStatistics
from mgipt_monai.networks.look import SiteLook, SourceLook
from mgipt_monai.utils.statistics import shares

VARIANTS = {
    "tone": (("tone",), True),
    "amplitudes": (("amplitudes",), True),
    "both": (("amplitudes", "tone"), True),
    "both, no gate": (("amplitudes", "tone"), False),
}
TRUSTS = (0.25, 0.35, 0.5, 0.7, 1.0)
"""Shares of the evidence that fuse both with the source."""


class PartOfLook(SiteLook):
    """Corrects some parts of the look, with or without the gate."""

    def __init__(self, source: SourceLook, parts: Sequence[str], gated: bool) -> None:
        super().__init__(source)
        self.parts, self.gated = parts, gated

    def _compare(self, name: str, found: Tensor, site: SiteStatistics) -> tuple[Tensor, Tensor, float]:
        places, change, beyond = super()._compare(name, found, site)
        if name not in self.parts:
            return places, torch.zeros_like(change), 0.0
        if not self.gated:
            change = site._shares[name] * (self._source[name][0] - places)
        return places, change, beyond


def study(configs: Sequence[str], statistics: str, norm: str | None, every: int, **settings: object) -> None:
    """Process the stream and print the table."""
    workflow = ConfigWorkflow(
        config_file=[*CONFIGS, *configs], workflow_type="infer", logging_file=False, bundle_root=str(ROOT / "bundle"),
        stream="@found_images", **({"network_def#norm": norm} if norm else {}), **settings,  # nothing is written
    )  # fmt: skip
    workflow.parser["handlers"], workflow.parser["evaluator#summary_path"] = [], None
    workflow.initialize()
    get: Callable = workflow.parser.get_parsed_content
    network = get("network").eval().requires_grad_(False)
    source = SourceStatistics.load(statistics)
    source.check(network)
    looks = {name: PartOfLook(source.look, *variant) for name, variant in VARIANTS.items()}
    sites = {name: SiteStatistics() for name in looks}
    rows = []
    with torch.no_grad():
        for number, batch in enumerate(get("dataloader")):
            if number % every:
                continue
            image, label = batch["image"].as_tensor(), batch["label"].as_tensor()
            plain = network(image)
            row = {"no adaptation": dice(plain, label)}
            for name, look in looks.items():
                sites[name].begin()
                corrected, evidence = look.correct(image, sites[name])
                sites[name].end()
                logits = plain if corrected is image else network(corrected)
                row[name] = dice(logits, label)
                for trust in TRUSTS if name == "both" else (TRUST_OF_LOOK,):
                    row[f"{name}, fused by {trust:g} of the evidence"] = dice(
                        torch.lerp(plain, logits, trust * evidence), label
                    )
            rows.append(row)
    plain_scores = np.array([row["no adaptation"] for row in rows])
    print(
        f"{len(rows)} images, no adaptation {plain_scores.mean():.2f}",
        "| prediction | gain | harmed | worst image |",
        sep="\n\n",
    )
    print("|---|--:|--:|--:|")
    for name in list(rows[0])[1:]:
        gain = np.array([row[name] for row in rows]) - plain_scores
        print(f"| {name} | {gain.mean():+.2f} | {100 * shares(gain / 100)[0]:.0f} % | {gain.min():+.2f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="config overlays, such as those of the task and a shift")
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--statistics", required=True, help="file of `mgipt source-statistics` for these weights")
    parser.add_argument("--norm", help="norm of the configs' network, such as instance")
    parser.add_argument("--sites", help="comma-separated sites, in this order (default all)")
    parser.add_argument("--limit", type=int, help="at most this number of images per site")
    parser.add_argument("--every", type=int, default=1, help="take every n-th image of the stream")
    options = vars(parser.parse_args(arguments))
    options["sites"] = options["sites"].split(",") if options["sites"] else None
    options = {key: value for key, value in options.items() if value is not None}
    study(options.pop("configs"), options.pop("statistics"), options.pop("norm", None), **options)


if __name__ == "__main__":
    main()
