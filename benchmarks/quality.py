# SPDX-License-Identifier: Apache-2.0
"""How well the expected quality finds bad masks, from the records of labelled streams.

    mgipt evaluate SITES RESULTS --weights WEIGHTS.pt --preset steady --order shuffled
    python benchmarks/quality.py RESULTS/records.jsonl [MORE/records.jsonl ...]

For each stream: the area under the curve with which a score finds the worst tenth of the masks by Dice (.5 is
chance), its rank correlation with the Dice, and for quality the mean difference and mean absolute difference from the
Dice, as it is and calibrated on ten random images (mean of 200 draws, measured on the others). The scores are the
quality of the worst class, the agreement with the mask without adaptation, and one minus the disagreement of the
method's views. The last
column is the error of the mean Dice of the ten images, which knows nothing of the single mask.
With --odd NAMES the share of these images that are flagged, and of all others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr

from mgipt_monai import RecordFile
from mgipt_monai.commissioning.commission import calibrate_quality

DRAWS, LABELLED = 200, 10


def area(scores: np.ndarray, is_bad: np.ndarray) -> float:
    """Return the area under the curve with which low scores find what is bad."""
    ranks, bad = rankdata(-scores), int(is_bad.sum())
    return float((ranks[is_bad].sum() - bad * (bad + 1) / 2) / (bad * (len(scores) - bad)))


def by_class(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """Return the values (images, classes) of a record's entry, NaN where there is none."""
    return np.array([[np.nan if value is None else value for value in row[key].values()] for row in rows])


def line_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the cells of a stream."""
    dice = np.array(
        [[value if value is not None else np.nan for value in row["metrics"]["dsc"].values()] for row in rows]
    )
    means, quality = np.nanmean(dice, axis=1), by_class(rows, "quality")
    is_bad = np.zeros(len(rows), bool)
    is_bad[np.argsort(means)[: max(1, len(rows) // 10)]] = True
    scores = {"quality": quality.min(axis=1), "agreement": by_class(rows, "agreement").min(axis=1)}
    if all(row.get("disagreement") is not None for row in rows):
        scores["disagreement"] = -np.array([row["disagreement"] for row in rows])
    cells = []
    for name in ("quality", "agreement", "disagreement"):
        constant = name not in scores or np.ptp(scores[name]) == 0
        cells.append("-" if constant else f"{area(scores[name], is_bad):.2f}")
        cells.append("-" if constant else f"{spearmanr(scores[name], means).statistic:.2f}")
    generator, errors = np.random.default_rng(0), []
    for _ in range(DRAWS if len(rows) > 2 * LABELLED else 0):
        order = generator.permutation(len(rows))
        chosen, others = order[:LABELLED], order[LABELLED:]
        lines = np.array(calibrate_quality(quality[chosen], dice[chosen]))
        expected = np.clip(lines[:, 0] + lines[:, 1] * quality[others], 0, 1)
        constant = np.nanmean(dice[chosen], axis=0)
        errors.append(
            [
                np.nanmean(expected - dice[others]),
                np.nanmean(np.abs(expected - dice[others])),
                np.nanmean(np.abs(constant - dice[others])),
            ]
        )
    raw = [np.nanmean(quality - dice), np.nanmean(np.abs(quality - dice))]
    calibrated = np.mean(errors, axis=0) if errors else [np.nan] * 3
    return [
        *cells,
        f"{100 * raw[0]:+.1f}",
        f"{100 * raw[1]:.1f}",
        f"{100 * calibrated[0]:+.1f}",
        f"{100 * calibrated[1]:.1f}",
        f"{100 * calibrated[2]:.1f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--odd", nargs="*", default=[], help="what the names of the images begin with that are odd")
    options = parser.parse_args()
    print(
        "| stream | images | quality: AUC | rank | agreement: AUC | rank | disagreement: AUC | rank "
        "| bias, as it is | error | bias, calibrated | error | of the mean |"
    )
    print("|---|" + "--:|" * 12)
    for path in options.records:
        rows = [row for row in RecordFile(path).read() if row["status"] == "ok"]
        is_odd = np.array([row["name"].startswith(tuple(options.odd)) if options.odd else False for row in rows])
        usual = [row for row, odd in zip(rows, is_odd, strict=True) if not odd]
        if usual and usual[0].get("metrics"):
            print(f"| {path.parent.name} | {len(usual)} | " + " | ".join(line_of(usual)) + " |")
        flagged = np.array([bool(row.get("elsewhere")) for row in rows])
        if options.odd:
            odd, others = flagged[is_odd].mean(), flagged[~is_odd].mean()
            print(f"flagged: {odd:.0%} of {is_odd.sum()} odd images, {others:.1%} of the others")


if __name__ == "__main__":
    main()
