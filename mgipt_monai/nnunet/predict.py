# SPDX-License-Identifier: Apache-2.0
"""``mgipt nnunet-predict``: a stream of cases through an nnU-Net, adapted, with records and a state to resume from."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader, MetaTensor
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor

from mgipt_monai.data import StreamDataset, check_outputs
from mgipt_monai.data.dataset import FAILURE, MAX_VALUES
from mgipt_monai.engines import StreamingAdaptationEvaluator
from mgipt_monai.handlers import TestTimeAdaptationHandler
from mgipt_monai.nnunet.predictor import DEFAULT, AdaptivePredictor, method_presets
from mgipt_monai.utils.outputs import OutputFolder

__all__ = ["Preprocessing", "find_cases", "initialised", "main", "model_options"]

STATE, RECORDS = "adaptation_state.pt", "records.jsonl"
OWN_FILES = (STATE, f"{STATE}.attempt", RECORDS, "records.runs.json", "records.key", "summary.json")
PROPERTIES = "properties"


class Preprocessing:
    """nnU-Net's own reading and preprocessing of one case.

    Args:
        predictor: an initialised predictor.

    Raises:
        ValueError: at a case with another number of files than the network has channels.
    """

    def __init__(self, predictor: AdaptivePredictor) -> None:
        plans, configuration, dataset = (
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.dataset_json,
        )
        self._of_case = plans, configuration, dataset
        self._preprocessor = configuration.preprocessor_class(verbose=False)
        self._to_image = predictor.to_image
        self.channels = determine_num_input_channels(plans, configuration, dataset)

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Return the item with its ``image`` (1, C, \\*spatial), and what nnU-Net needs to undo its preprocessing."""
        files = list(item["image"])
        if len(files) != self.channels:
            raise ValueError(
                f"the case {item['name']} has {len(files)} of {self.channels} channels: nnU-Net's names end in _0000, "
                "_0001 and so on"
            )
        data, _, properties = self._preprocessor.run_case(files, None, *self._of_case)
        image = MetaTensor(self._to_image(torch.from_numpy(data)), meta={"filename_or_obj": [files[0]]})
        # bytes, which no loader takes apart
        return {"name": [item["name"]], "image": image, PROPERTIES: [pickle.dumps(properties)]}


class Export:
    """Writes the files that nnU-Net writes for a case, and none over a file that no run wrote.

    Args:
        predictor: an initialised predictor.
        folder: to write to.
        save_probabilities: whether to write the probabilities too.
    """

    def __init__(self, predictor: AdaptivePredictor, folder: OutputFolder, save_probabilities: bool) -> None:
        self._predictor, self._folder, self.save_probabilities = predictor, folder, save_probabilities

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Write the files of one item."""
        own = self._predictor
        logits = own.to_logits(item["pred"].as_tensor()[None]).numpy()
        with tempfile.TemporaryDirectory() as scratch:
            export_prediction_from_logits(
                logits,
                pickle.loads(item[PROPERTIES]),  # made by this run
                own.configuration_manager,
                own.plans_manager,
                own.dataset_json,
                os.path.join(scratch, item["name"]),
                self.save_probabilities,
            )
            for file in sorted(Path(scratch).iterdir()):
                with self._folder.writing(file.name) as part:
                    shutil.copyfile(file, part)
        return item


def find_cases(folder: str, ending: str) -> list[dict[str, Any]]:
    """Return the cases of a folder as nnU-Net finds them: ``NAME_0000``, ``NAME_0001`` and so on for each channel.

    Raises:
        FileNotFoundError: if there are none.
    """
    # not nnU-Net's own search, whose pool of forked processes can hang where signals have handlers
    found: dict[str, list[str]] = {}
    for path in sorted(Path(folder).glob("*")):
        if match := re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", path.name):
            found.setdefault(match[1], []).append(str(path))
    if not found:
        raise FileNotFoundError(f"there are no cases in {folder}: nnU-Net's images are named CASE_0000{ending}")
    return [{"image": found[name], "name": name} for name in sorted(found)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says.

    Raises:
        FileExistsError: if a file stands where the run would write, and no run wrote it.
        StreamFailedError: at the end, if cases failed.
    """
    parser = argparse.ArgumentParser(
        prog="mgipt nnunet-predict",
        description="nnUNetv2_predict_from_modelfolder with test-time adaptation: the cases are one stream, in order.",
        epilog="example: mgipt nnunet-predict -i imagesTs -o masks -m nnUNetTrainer__nnUNetPlans__3d_fullres -f 0 "
        "--preset fast --statistics statistics",
        allow_abbrev=False,
    )
    parser.add_argument("-i", required=True, metavar="IN", help="folder of images, with nnU-Net's names (_0000 etc.)")
    parser.add_argument("-o", required=True, metavar="OUT", help="folder for nnU-Net's files, records and the state")
    model_options(parser)
    own = parser.add_argument_group("adaptation")
    own.add_argument("--preset", default=DEFAULT, help=f"{', '.join(method_presets())} (default {DEFAULT})")
    own.add_argument("--config", nargs="+", default=[], help="overlays on the preset, such as guard")
    own.add_argument("--statistics", metavar="FOLDER", help="of nnunet-calibrate, for networks without batch norm")
    own.add_argument("--hashed", action="store_true", help="no names of cases in the records")
    parser.add_argument("--save_probabilities", action="store_true", help="write the class probabilities too")
    flag: dict[str, Any] = {"nargs": "?", "const": "True", "choices": ("True",)}  # messages name them with the value
    parser.add_argument(
        "--resume", "--continue_prediction", **flag, help="go on with a run that ended early, as if it had not"
    )
    parser.add_argument("--overwrite", **flag, help="replace the results of an earlier run")
    parser.add_argument("-npp", type=int, default=0, help="processes that preprocess ahead (default 0)")
    options = parser.parse_args(arguments)

    _, plain = initialised(options)
    cases = find_cases(options.i, ending := plain.dataset_json["file_ending"])
    again = {"resume": bool(options.resume), "overwrite": bool(options.overwrite)}
    check_outputs(cases, options.o, options.i, OWN_FILES, masks=False, **again)
    predictor = AdaptivePredictor(plain, options.preset, options.statistics, configs=options.config)
    folder = OutputFolder(options.o)
    folder.prepare()
    if not again["resume"]:
        for name in (f"{case['name']}{end}" for case in cases for end in (ending, ".npz", ".pkl")):
            folder.check(name)
    for name, content in (
        ("predict_from_raw_data_args.json", {**vars(options), "device": str(plain.device)}),
        ("dataset.json", plain.dataset_json),
        ("plans.json", plain.plans_manager.plans),
    ):
        with folder.writing(name) as part:
            part.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")

    limit = MAX_VALUES if ending in (".nii", ".nii.gz") else None  # headers of other files are not known
    dataset = StreamDataset(cases, Preprocessing(predictor), max_values=limit)
    loader = DataLoader(dataset, batch_size=1, shuffle=False, num_workers=options.npp, collate_fn=_alone)
    evaluator = StreamingAdaptationEvaluator(
        predictor.device,
        loader,
        predictor.method.network,
        predictor.inferer,
        postprocessing=Export(predictor, folder, options.save_probabilities),
        progress=not options.disable_progress_bar,
        summary_path=folder.file("summary.json"),
    )
    TestTimeAdaptationHandler(
        predictor.method,
        folder.file(STATE),
        folder.file(RECORDS),
        resume=again["resume"],
        identifiers="hashed" if options.hashed else "names",
        settings={"step_size": options.step_size, "mirroring": not options.disable_tta},
    ).attach(evaluator)
    evaluator.run()
    print(f"{len(cases)} cases are in {options.o}, their records in {folder.file(RECORDS)}")


def model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model and its prediction, with nnU-Net's names and meanings."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "-m", required=True, metavar="MODEL", help="folder of the model, with fold_X; its files are code"
    )
    model.add_argument("-f", nargs="+", metavar="FOLD", help="folds (default: those that are there)")
    model.add_argument("-chk", default="checkpoint_final.pth", help="name of the checkpoint (default %(default)s)")
    model.add_argument("-step_size", "--step_size", type=float, default=0.5, help="of the sliding window (default 0.5)")
    model.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, mostly less accurate")
    model.add_argument("-device", "--device", choices=("cpu", "cuda", "mps"), help="default: cuda if there is one")
    model.add_argument("--not_on_device", action="store_true", help="keep logits in the computer's memory")
    model.add_argument("--disable_progress_bar", action="store_true")
    model.add_argument("--verbose", action="store_true", help="nnU-Net says more")


def initialised(options: argparse.Namespace) -> tuple[list[str], nnUNetPredictor]:
    """Return the folds and the predictor of :func:`model_options`.

    Raises:
        FileNotFoundError: if the folder has no model, or not the folds.
    """
    model = Path(options.m)
    for name in ("dataset.json", "plans.json"):
        if not (model / name).is_file():
            raise FileNotFoundError(f"there is no {name} in {model}: give the folder that has the folds in it")
    present = sorted(path.parent.name[len("fold_") :] for path in model.glob(f"fold_*/{options.chk}"))
    folds = options.f or [fold for fold in present if fold != "all"] or present
    if not folds or (absent := [fold for fold in folds if fold not in present]):
        wanted = f"fold_{absent[0]}" if folds else "fold"
        raise FileNotFoundError(f"there is no {wanted} with {options.chk} in {model}: there are {present or 'none'}")
    if not 0 < options.step_size <= 1:
        raise ValueError(f"-step_size must be above 0 and at most 1, got {options.step_size}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    predictor = nnUNetPredictor(
        tile_step_size=options.step_size,
        use_mirroring=not options.disable_tta,
        perform_everything_on_device=not options.not_on_device,
        device=torch.device(device),
        verbose=options.verbose,
        allow_tqdm=False,  # the stream has a bar of its own
    )
    predictor.initialize_from_trained_model_folder(str(model), tuple(folds), options.chk)
    return folds, predictor


def _alone(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the only item of a batch."""
    (item,) = items
    if FAILURE not in item:
        assert isinstance(item["image"], Tensor)
    return item
