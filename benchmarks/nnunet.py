# SPDX-License-Identifier: Apache-2.0
"""An nnU-Net trained for a few epochs on hippocampus volumes, without and with adaptation (docs/results/nnunet.md).

    python benchmarks/nnunet.py prepare VOLUMES WORK   # VOLUMES has images/ and masks/; sets up nnU-Net's folders
    python benchmarks/nnunet.py train VOLUMES WORK             # nnU-Net's planner and trainer, fold "all"
    mgipt nnunet-calibrate ... ; mgipt nnunet-predict ... -o WORK/masks/SHIFT/PRESET
    python benchmarks/nnunet.py table VOLUMES WORK             # Dice of each folder of masks

Every second volume by name is for training, the others are the test. The shifts are those of configs/shifts, applied to
the test volumes before nnU-Net's preprocessing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, LoadImage

from mgipt_monai.installed import find_config

DATASET = "Dataset004_Hippocampus"
SHIFTS = ("none", "contrast", "bias_field", "low_frequency_gain")
HARM = 0.01  # Dice lost that counts as harm


def shifted(shift: str, image: Path, path: Path) -> None:
    """Write a volume under a shift; its intensities are scaled by their percentiles before, as in training here."""
    volume = LoadImage("NibabelReader", ensure_channel_first=True)(image)
    low, high = np.percentile(volume, [1, 99])
    config = ConfigParser({"imports": ["$import torch", "$import mgipt_monai"], "in_channels": 1, "spatial_dims": 3})
    overlay = ConfigParser.load_config_file(find_config(f"shifts/{shift}"))
    config.update({key: value for key, value in overlay.items() if not key.startswith("+")})
    config["transforms"] = overlay["+preprocessing#transforms"]
    config.get_parsed_content("imports")
    result = Compose(config.get_parsed_content("transforms"))({"image": (volume - low) / (high - low)})["image"]
    nibabel.save(nibabel.Nifti1Image(np.asarray(result[0], np.float32), volume.affine.numpy()), path)


def prepare(volumes: Path, work: Path) -> None:
    """Set up nnU-Net's raw data, and the test volumes under each shift."""
    raw = work / "raw" / DATASET
    tests = [work / part / shift for part in ("test", "half") for shift in SHIFTS]
    for folder in [raw / "imagesTr", raw / "labelsTr", *tests]:
        folder.mkdir(parents=True)
    for number, image in enumerate(sorted((volumes / "images").glob("*.nii.gz"))):
        name = image.name.removesuffix(".nii.gz")
        if number % 2 == 0:
            (raw / "imagesTr" / f"{name}_0000.nii.gz").symlink_to(image.resolve())
            (raw / "labelsTr" / image.name).symlink_to((volumes / "masks" / image.name).resolve())
            continue
        (work / "test" / "none" / f"{name}_0000.nii.gz").symlink_to(image.resolve())
        for shift in SHIFTS[1:]:
            shifted(shift, image, work / "test" / shift / f"{name}_0000.nii.gz")
    for shift in SHIFTS:  # every second one, for methods that take long
        for path in sorted((work / "test" / shift).iterdir())[::2]:
            (work / "half" / shift / path.name).symlink_to(path.resolve())
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": len(list((raw / "imagesTr").iterdir())),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def train(work: Path, epochs: int, iterations: int) -> None:
    """Plan, preprocess and train the 3D configuration at full resolution with nnU-Net's own trainer, on the CPU."""
    os.environ.update(nnUNet_n_proc_DA="0", nnUNet_compile="f")
    for variable in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{variable}"] = str(work / variable)
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    extract_fingerprints([4], num_processes=1)
    plan_experiments([4])
    preprocess([4], configurations=("3d_fullres",), num_processes=(1,))
    folder = work / "preprocessed" / DATASET
    plans, dataset = (json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset"))
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)  # nnU-Net's augmentation uses it
    trainer = nnUNetTrainer({**plans, "continue_training": False}, "3d_fullres", "all", dataset, torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, iterations, 4
    trainer.run_training()


def dice(prediction: Path, label: Path) -> list[float]:
    """Return the Dice of both classes."""
    one, other = (np.asarray(nibabel.load(path).dataobj) for path in (prediction, label))
    return [
        float(2 * ((one == k) & (other == k)).sum() / max(1, (one == k).sum() + (other == k).sum())) for k in (1, 2)
    ]


def table(volumes: Path, work: Path) -> None:
    """Print the Dice of each folder of masks, on the cases that it has, against ``source`` on the same cases."""
    print("| shift | preset | volumes | anterior | posterior | mean | change | harmed |")
    print("|---|---|---|---|---|---|---|---|")
    for shift in SHIFTS:
        scores = {
            folder.name: {
                path.name: dice(path, volumes / "masks" / path.name) for path in sorted(folder.glob("*.nii.gz"))
            }
            for folder in sorted((work / "masks" / shift).iterdir())
        }
        for preset, found in sorted(
            ((name, of) for name, of in scores.items() if of), key=lambda item: item[0] != "source"
        ):
            values = np.array([found[name] for name in found]) * 100
            change = values.mean(axis=1) - np.array([scores["source"][name] for name in found]).mean(axis=1) * 100
            cells = [*values.mean(axis=0), values.mean()]
            print(
                f"| {shift} | {preset} | {len(found)} | "
                + " | ".join(f"{value:.2f}" for value in cells)
                + f" | {change.mean():+.2f} | {(change < -100 * HARM).mean():.0%} |"
            )


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "train", "table"))
    parser.add_argument("volumes", type=Path, help="folder with images/ and masks/")
    parser.add_argument("work", type=Path, help="folder for everything that is written")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=40, help="per epoch")
    options = parser.parse_args()
    if options.step == "prepare":
        prepare(options.volumes, options.work)
    elif options.step == "train":
        train(options.work, options.epochs, options.iterations)
    else:
        table(options.volumes, options.work)


if __name__ == "__main__":
    main()
