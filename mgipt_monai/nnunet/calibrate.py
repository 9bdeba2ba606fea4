# SPDX-License-Identifier: Apache-2.0
"""``mgipt nnunet-calibrate``: the source statistics of an nnU-Net, from its preprocessed training cases or images."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from torch import Tensor
from tqdm import tqdm

from mgipt_monai.networks.alignment import measure_source_statistics
from mgipt_monai.nnunet.folds import FoldEnsemble
from mgipt_monai.nnunet.predict import Preprocessing, find_cases, initialised, model_options
from mgipt_monai.nnunet.predictor import AdaptivePredictor

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="mgipt nnunet-calibrate",
        description="Measure what the source images look like inside an nnU-Net, for --statistics of nnunet-predict.",
        epilog="example: mgipt nnunet-calibrate -d 4 -m nnUNetTrainer__nnUNetPlans__3d_fullres -o statistics",
        allow_abbrev=False,
    )
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("-d", metavar="DATASET", help="name or number: its preprocessed training cases, of each fold")
    of.add_argument("-i", metavar="IMAGES", help="folder of source images, with nnU-Net's names")
    parser.add_argument("-o", required=True, metavar="STATISTICS", help="folder to write fold_X.pt to")
    model_options(parser)
    options = parser.parse_args(arguments)

    folds, plain = initialised(options)
    predictor = AdaptivePredictor(plain, "source")
    method = predictor.method
    networks = [fold.network for fold in method.folds] if isinstance(method, FoldEnsemble) else [method.network]
    own = predictor.inferer
    for fold, network in zip(folds, networks, strict=True):
        if options.d is None:
            cases: Sequence[str] = [case["name"] for case in find_cases(options.i, plain.dataset_json["file_ending"])]
            images = _of_folder(predictor, options.i)
        else:
            folder = _preprocessed(options.d)
            dataset = infer_dataset_class(str(folder / plain.configuration_manager.data_identifier))(
                str(folder / plain.configuration_manager.data_identifier)
            )
            cases = _training_cases(folder, fold, dataset.identifiers)
            images = (predictor.to_image(torch.from_numpy(dataset.load_case(case)[0][:])) for case in cases)
        shown = tqdm(images, total=len(cases), desc=f"fold {fold}", disable=options.disable_progress_bar)
        statistics = measure_source_statistics(
            network, shown, device=predictor.device, inferer=own.inferer, windows=own.windows
        )
        statistics.save(Path(options.o) / f"fold_{fold}.pt")
    print(f"statistics of {len(folds)} folds are in {options.o}: give it as --statistics to mgipt nnunet-predict")


def _of_folder(predictor: AdaptivePredictor, folder: str) -> Iterator[Tensor]:
    preprocessing = Preprocessing(predictor)
    for case in find_cases(folder, predictor.dataset_json["file_ending"]):
        yield preprocessing(case)["image"]


def _preprocessed(dataset: str) -> Path:
    """Return the folder of a dataset in nnU-Net's preprocessed data."""
    if not nnUNet_preprocessed.is_set():
        raise FileNotFoundError("nnUNet_preprocessed is not set: set it to nnU-Net's folder, or give -i IMAGES")
    number = int(dataset) if dataset.isdigit() else dataset
    return Path(str(nnUNet_preprocessed)) / maybe_convert_to_dataset_name(number)


def _training_cases(folder: Path, fold: str, every: Sequence[str]) -> Sequence[str]:
    """Return the cases that a fold was trained on: all of them for the fold ``all``."""
    splits = folder / "splits_final.json"
    if fold == "all" or not os.path.isfile(splits):
        return every
    return json.loads(splits.read_text(encoding="utf-8"))[int(fold)]["train"]
