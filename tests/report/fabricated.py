# SPDX-License-Identifier: Apache-2.0
"""A small benchmark folder with made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import wilcoxon

from mgipt_monai import RecordFile
from mgipt_monai.report.pictures import ADAPTED, INPUT, MASK, picture_path, write_masks
from mgipt_monai.stream.summary import image_means

SITES = ("A", "B <&> C")
METRICS = {
    "dsc": {"better": "higher", "percent": True, "unit": ""},
    "hd95": {"better": "lower", "percent": False, "unit": "pixels"},
    "asd": {"better": "lower", "percent": False, "unit": "pixels"},
    "e_max": {"better": "higher", "percent": True, "unit": ""},
    "s": {"better": "higher", "percent": True, "unit": ""},
}


def fabricate(
    folder: Path,
    gains: dict[str, float],
    images: int = 4,
    rounds: int = 2,
    baseline: str | None = "source",
    sites: tuple[str, ...] = SITES,
    failed: tuple[str, ...] = (),
    prompts: bool = True,
    pictures: bool = True,
    seed: int = 0,
) -> Path:
    """Write records, results, times and pictures.

    Args:
        folder: folder to write to.
        gains: method to its mean gain in DSC; 0 for the baseline. Methods whose name starts with mgipt have prompts.
        images: number of images per site.
        rounds: rounds of the stream.
        baseline: one of the methods, or None.
        sites: sites of the stream.
        failed: images with which the last method failed in the first round.
        prompts: whether there are prompts and their sizes.
        pictures: whether there are pictures.
        seed: seed of all numbers.
    """
    rng = np.random.default_rng(seed)
    names = {f"{site}/eye_{i:03d}": site for site in sites for i in range(images)}
    difficulty = {name: rng.normal(0.85, 0.06) for name in names}
    last = list(gains)[-1]
    for method, gain in gains.items():
        own = {name: rng.normal(gain, abs(gain)) for name in names}
        for round_ in range(1, rounds + 1):
            for name, site in names.items():
                shown = name if round_ == 1 else f"round_{round_}/{name}"
                row = {"name": shown, "site": site, "round": round_, "seconds": 1.0, "forwards": 25, "backwards": 24}
                if method == last and shown in failed:
                    row |= {"status": "failed", "reason": "the image has 3 NaN <b>"}
                else:
                    dsc = min(0.99, difficulty[name] + own[name] - 0.002 * round_)
                    row |= {"status": "ok", "metrics": _metrics(dsc)}
                RecordFile(folder / method / "records.jsonl").append(row)
                if pictures:
                    _pictures(folder, method, shown, adapted=method.startswith("mgipt"), rng=rng)
    results = _results(folder, list(gains), baseline, sites, rounds, failed, prompts, rng)
    (folder / "results.json").write_text(json.dumps(results))
    times = {m: {"seconds": {"mean": 1.2, "median": 1.1}, "peak_memory_mib": 812.0} for m in gains}
    timing = {"machine": "2 cores", "versions": {"torch": "2.13.0", "monai": "1.6.1"}, "methods": times}
    (folder / "timing.json").write_text(json.dumps(timing))
    return folder


def _metrics(dsc: float) -> dict[str, dict[str, float | None]]:
    far = 200 * (1 - dsc)
    return {
        "dsc": {"disc": dsc + 0.005, "cup": dsc - 0.005},
        "hd95": {"disc": far, "cup": far + 1},
        "asd": {"disc": far / 4, "cup": far / 3},
        "e_max": {"disc": 0.99, "cup": 0.97},
        "s": {"disc": 0.95, "cup": 0.9},
    }


def _pictures(folder: Path, method: str, name: str, adapted: bool, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    masks = np.zeros((2, 16, 16), dtype=np.uint8)
    masks[0, 3:12, 3:12], masks[1, 5:9, 5:9] = 1, 1
    reference = folder / "reference" / "pictures"
    write_masks(picture_path(folder / method / "pictures", name, MASK), np.roll(masks, 1, axis=2))
    write_masks(picture_path(reference, name, MASK), masks)
    Image.fromarray(pixels).save(picture_path(reference, name, INPUT))
    if adapted:
        Image.fromarray(255 - pixels).save(picture_path(folder / method / "pictures", name, ADAPTED))


def _results(folder, methods, baseline, sites, rounds, failed, prompts, rng) -> dict:
    rows = {method: RecordFile(folder / method / "records.jsonl").read() for method in methods}
    means: dict[str, dict[str, dict[str, list]]] = {}  # metric, method, image: its rounds
    for method in methods:
        for row in rows[method]:
            image = row["name"].removeprefix(f"round_{row['round']}/")
            if image not in failed:
                for metric, value in image_means(row).items():
                    means.setdefault(metric, {}).setdefault(method, {}).setdefault(image, []).append(value)
    images = list(means["dsc"][methods[0]])
    figures = {}
    for method in methods:
        figures[method] = {
            "about": f"What {method} does.",
            "forwards": 25.0,
            "backwards": 24.0,
            "metrics": {m: _metric(values[method], sites, rounds) for m, values in means.items()},
            "against_baseline": None,
            "instance_sizes": {"1": 3, "3": 9, "5": 4} if prompts and method.startswith("mgipt") else {},
            "prompts": {
                f"{side} x {side}": rng.normal(1, 0.08, (3, side, side)).tolist()
                for side in ((3, 5, 7) if prompts and method.startswith("mgipt") else ())
            },
        }
        if baseline not in (None, method):
            change = np.array([np.mean(means["dsc"][method][i]) - np.mean(means["dsc"][baseline][i]) for i in images])
            figures[method]["against_baseline"] = {
                "dsc": {
                    "gain": change.mean(),
                    "interval": _interval(change),
                    "p_value": float(wilcoxon(change).pvalue),
                    "worse": float((change < -0.01).mean()),
                    "better": float((change > 0.01).mean()),
                }
            }
    return {
        "schema": "mgipt_monai.results",
        "version": 1,
        "about": {"data": "/data/eyes <b>", "network": "UNet, 408,485 parameters", "weights": "model.pt"},
        "settings": {
            "seed": 0,
            "order": "sites",
            "rounds": rounds,
            "reset_at_site": False,
            "weights": "0123456789abcdef" * 4,
            "methods": {method: {"name": method, "steps": 7, "head": "<sigmoid>"} for method in methods},
        },
        "stream": {
            "images": rounds * (len(images) + len(failed)),
            "measured": rounds * len(images),
            "measured_images": len(images),
            "rounds": rounds,
            "sites": list(sites),
            "failed": [{"name": n, "method": methods[-1], "reason": "the image has 3 NaN <b>"} for n in failed],
        },
        "baseline": baseline,
        "classes": ["disc", "cup"],
        "metrics": METRICS,
        "methods": figures,
    }


def _metric(images: dict[str, list], sites: tuple[str, ...], rounds: int) -> dict:
    values = np.array([np.mean(of_rounds) for of_rounds in images.values()])
    of_site = {s: [np.mean(v) for name, v in images.items() if name.startswith(f"{s}/")] for s in sites}
    by_round = np.mean(list(images.values()), axis=0)

    def classes(mean: float) -> dict[str, float]:
        return {"disc": mean + 0.005, "cup": mean - 0.005}

    return {
        "mean": values.mean(),
        "interval": _interval(values),
        "worst_tenth": values.min(),
        "images": len(values),
        "undefined": 0,
        "classes": classes(values.mean()),
        "sites": {
            s: {"images": len(v), "mean": float(np.mean(v)), "classes": classes(float(np.mean(v)))}
            for s, v in of_site.items()
        },
        "rounds": by_round.tolist(),
        "degradation": None if rounds == 1 else by_round[0] - by_round[-1],
    }


def _interval(values: np.ndarray) -> list[float]:
    half = 1.96 * values.std() / np.sqrt(len(values))
    return [values.mean() - half, values.mean() + half]
