# SPDX-License-Identifier: Apache-2.0
"""Compares site correction with variants, and label-free signals of its gain: the tables of docs/results/steady.md.

The configs are those of `python -m monai.bundle run`; run it from the repository root. Each view of an image is
predicted once and fused in all variants. Prints the DSC compared with no adaptation, and the correlation of label-free
signals with the gain:

    python benchmarks/site_study.py configs/fundus_odoc.yaml --dataset_dir SITES --ckpt_path WEIGHTS.pt \\
      --sites rimone_r2,drishti_gs --limit 40

With --rule the evidence and the correction are those of a network's own rule (`mgipt site-rule`). With --site_prompts
there are also prompts that are learnt over the stream on top of site correction, and MGIPT, whose gain they are after.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from monai.metrics import compute_dice
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

from mgipt_monai import MGIPT
from mgipt_monai.networks import GlobalPrompts, InstancePrompt, SiteNorms, SiteRule, SiteStatistics
from mgipt_monai.stream.summary import worst_tenth
from mgipt_monai.utils.statistics import shares

ROOT = Path(__file__).parents[1]
CONFIGS = [str(ROOT / "bundle" / "configs" / name) for name in ("inference.yaml", "evaluate.yaml")]
SOURCE_WEIGHTS = (0.9, 0.8, 0.6, 0.0)
PROMPT_SIDES = (1, 3)
TRUSTS = ((1, 1), (2, 1), (3, 1), (1.75, 2), (2, 2), (2.5, 2), (3, 2), (3, 4))
HIGH = 0.2
"""Evidence from which a gated site prompt takes a step: with a trust of 2.5, a weight of a quarter."""


@dataclass
class SitePrompt:
    """Prompts of a site, learnt over its images on top of site correction.

    Args:
        sides: of the prompts.
        lr: of their step at each image.
        steps: at all images, those with ``high`` evidence, or all with the learning rate times the ``weight``.
        loss: alignment loss with the features normalised by the ``site`` or, as MGIPT's, by the ``instance``.
    """

    sides: tuple[int, ...] = (5,)
    lr: float = 0.05
    steps: str = "high"
    loss: str = "site"

    def __post_init__(self) -> None:
        self.prompts = GlobalPrompts(self.sides, lr=self.lr)

    def __str__(self) -> str:
        sides = ", ".join(map(str, self.sides))
        return f"prompts of side {sides}, lr {self.lr:g}, steps: {self.steps}, loss: {self.loss}"

    def learn_and_predict(self, norms: SiteNorms, site: SiteStatistics, image: Tensor, evidence: float) -> Tensor:
        """Take the image's step, and return the mean logits of the prompted image, corrected to the site."""
        self.prompts.lr = self.lr * (min(1.0, (2.5 * evidence) ** 2) if self.steps == "weight" else 1.0)
        with norms.corrected_to(site):
            if self.prompts.lr > 0 and (self.steps != "high" or evidence >= HIGH):
                normalization = "calibrated" if self.loss == "site" else "instance"
                with torch.enable_grad():
                    self.prompts.step(image, lambda prompted: norms.loss(prompted, normalization))
            return norms.predict(self.prompts(image), "calibrated").mean(dim=0, keepdim=True)


def site_prompts() -> list[SitePrompt]:
    """Return those to compare, new."""
    return [
        SitePrompt(steps="all"),
        SitePrompt(),
        SitePrompt(lr=0.005),
        SitePrompt((1,)),
        SitePrompt(steps="weight"),
        SitePrompt((3, 5, 7), steps="all", loss="instance"),
        SitePrompt((3, 5, 7), loss="instance"),
    ]


def views(
    norms: SiteNorms, site: SiteStatistics, image: Tensor, prompts: bool, learnt: Sequence[SitePrompt] = ()
) -> tuple[dict[str, Tensor], float]:
    """Return the predictions of an image with each set of statistics, and the evidence for another site."""
    norms.start(image)
    site.begin()
    seen = {"source": norms.predict(image), "source, flipped": norms.predict(image.flip(-1)).flip(-1)}
    for norms.source_weight in SOURCE_WEIGHTS:
        seen[f"image, source weight {norms.source_weight}"] = norms.predict(image, "calibrated")
    norms.source_weight = 0.8
    seen["image, flipped"] = norms.predict(image.flip(-1), "calibrated").flip(-1)
    with norms.corrected_to(site, observe=True):
        seen["site"] = norms.predict(image, "calibrated")
    evidence = site.evidence
    with norms.corrected_to(site, image_share=0.2):
        seen["site and image"] = norms.predict(image, "calibrated")
    if prompts:
        with norms.corrected_to(site):
            for side in PROMPT_SIDES:
                prompt = InstancePrompt(range(1, side + 1, 2), early_stop=False)
                with torch.enable_grad():
                    prompt.tune(image, lambda prompted: norms.loss(prompted, "calibrated"), lambda _: 0.0)
                seen[f"site, prompt of side {side}"] = norms.predict(prompt(image), "calibrated")
    for one in learnt:
        seen[f"site, {one}"] = one.learn_and_predict(norms, site, image, evidence)
    site.end()
    return seen, evidence


def fusions(
    seen: dict[str, Tensor], evidence: float, learnt: Sequence[SitePrompt] = (), trust: float = 2.5
) -> dict[str, Tensor]:
    """Return the predictions to compare; the trust is that of the predictions of prompts."""
    source, site, both = seen["source"], seen["site"], seen["site and image"]
    compared = {name: logits for name, logits in seen.items() if "flipped" not in name}
    compared["mean of source and its flipped view"] = (source + seen["source, flipped"]) / 2
    compared["half source, half site"] = (source + site) / 2
    weight = min(1.0, (trust * evidence) ** 2)
    for one in learnt:
        prompted = seen[f"site, {one}"]
        compared[f"fused, {one}"] = torch.lerp(source, prompted, weight)
        compared[f"fused, {one}, a third view"] = torch.lerp(source, (site + both + prompted) / 3, weight)
    for trust, power in TRUSTS:
        weight = min(1.0, (trust * evidence) ** power)
        compared[f"fused, trust {trust:g}, power {power:g}"] = torch.lerp(source, (site + both) / 2, weight)
    return compared


def signals(seen: dict[str, Tensor], evidence: float) -> dict[str, float]:
    """Return label-free signals that might predict whether calibration to the image helps."""

    def entropy(logits: Tensor) -> float:
        p = logits.sigmoid()
        near = p.amax(dim=1, keepdim=True).expand_as(p) > 0.1
        both = torch.special.entr(p) + torch.special.entr(1 - p)
        return both[near].mean().item() if near.any() else float(np.log(2))

    def overlap(one: Tensor, other: Tensor) -> float:
        return compute_dice(one.gt(0).flatten(1)[:, None], other.gt(0).flatten(1)[:, None]).nan_to_num(1.0).item()

    source, image = seen["source"], seen["image, source weight 0.8"]
    area = [(logits > 0)[:, -1].sum().item() + 1 for logits in (source, image)]
    return {
        "entropy falls": entropy(source) - entropy(image),
        "agrees more with its flipped view": overlap(image, seen["image, flipped"])
        - overlap(source, seen["source, flipped"]),
        "agreement with the source": overlap(source, image),
        "last structure grows": float(np.log(area[1] / area[0])),
        "evidence of another site": evidence,
    }


def dice(logits: Tensor, label: Tensor) -> float:
    """Return the mean DSC in percent over the structures at mask size, 100 for correctly empty ones."""
    mode = "trilinear" if label.ndim == 5 else "bilinear"
    logits = functional.interpolate(logits, size=label.shape[2:], mode=mode)
    return 100 * compute_dice((logits > 0).float(), label).nan_to_num(1.0).mean().item()


def study(
    configs: Sequence[str], prompts: bool, with_prompts: bool, rule: str | None = None, **settings: object
) -> None:
    """Process the stream and print both tables."""
    workflow = ConfigWorkflow(
        config_file=[*CONFIGS, *configs], workflow_type="infer", logging_file=False, bundle_root=str(ROOT / "bundle"),
        stream="@found_images", **settings,  # nothing is written
    )  # fmt: skip
    workflow.parser["handlers"], workflow.parser["evaluator#summary_path"] = [], None
    workflow.initialize()
    get: Callable = workflow.parser.get_parsed_content
    norms, site = SiteNorms(get("network").eval().requires_grad_(False)), SiteStatistics()
    if rule is not None:
        site.rule = SiteRule.load(rule)
        site.rule.check(norms.network)
    trust = 2.5 if site.rule is None else site.rule.trust
    learnt = site_prompts() if with_prompts else []
    methods = {}
    if with_prompts:
        fast = MGIPT(norms.network, instance_sizes=(1,), steps=2, global_sizes=(5,))
        methods = {"MGIPT": MGIPT(norms.network), "fast": fast}
    rows, told = [], []
    with torch.no_grad():
        for batch in get("dataloader"):
            image, label = batch["image"].as_tensor(), batch["label"].as_tensor()
            seen, evidence = views(norms, site, image, prompts, learnt)
            compared = fusions(seen, evidence, learnt, trust)
            with torch.enable_grad():
                compared |= {name: method(image) for name, method in methods.items()}
            rows.append({name: dice(logits, label) for name, logits in compared.items()})
            told.append({"gain": rows[-1]["image, source weight 0.8"] - rows[-1]["source"], **signals(seen, evidence)})
    source = np.array([row["source"] for row in rows])
    print("| prediction | DSC | gain | worse by > 1 | worst tenth |", "|---|--:|--:|--:|--:|", sep="\n")
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        gain = values - source
        worse, _ = shares(gain / 100)
        print(
            f"| {name} | {values.mean():.2f} | {gain.mean():+.2f} | {100 * worse:.0f} % | {worst_tenth(values):.2f} |"
        )
    print("\n| signal | rank correlation with the gain of calibration to the image |", "|---|--:|", sep="\n")
    for name in list(told[0])[1:]:
        correlation = spearmanr([row[name] for row in told], [row["gain"] for row in told])[0]
        print(f"| {name} | {correlation:+.2f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="config overlays, such as those of the task and a shift")
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--sites", help="comma-separated sites, in this order (default all)")
    parser.add_argument("--limit", type=int, help="at most this number of images per site")
    parser.add_argument("--severity", type=float, help="of configs/shifts/cameras.yaml")
    parser.add_argument("--prompts", action="store_true", help="also with instance prompts on top of site correction")
    parser.add_argument(
        "--site_prompts", action="store_true", help="also with prompts learnt over the stream, and MGIPT"
    )
    parser.add_argument("--rule", help="file of `mgipt site-rule` for these weights")
    options = vars(parser.parse_args(arguments))
    configs, prompts, with_prompts = options.pop("configs"), options.pop("prompts"), options.pop("site_prompts")
    options["sites"] = options["sites"].split(",") if options["sites"] else None
    study(configs, prompts, with_prompts, **{key: value for key, value in options.items() if value is not None})


if __name__ == "__main__":
    main()
