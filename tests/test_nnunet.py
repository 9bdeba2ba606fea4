# SPDX-License-Identifier: Apache-2.0
"""nnU-Nets adapt: whole volumes are images, logits are nnU-Net's own, and a stream keeps its state and records."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2")

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mgipt_monai import MGIPT, cli
from mgipt_monai.networks.alignment import SourceStatistics, measure_source_statistics
from mgipt_monai.nnunet import AdaptivePredictor
from mgipt_monai.nnunet.predictor import fold_networks
from mgipt_monai.utils.provenance import fingerprint

CPU = torch.device("cpu")
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "core": 1, "rim": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
cheap = functools.partial(MGIPT, steps=1, instance_sizes=[3], global_sizes=[3])


def plans(dims: int, flat: bool = False) -> dict[str, Any]:
    """Plans like those that nnU-Net's planner makes, with a tiny network."""
    scheme = {
        "data_identifier": "tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [8] * dims,
        "spacing": [1.0] * dims,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * 2,
                "strides": [[1] * dims, [2] * dims],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    resampling = {"order_z": 0, "force_separate_z": None}
    for part, is_seg, order in (("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)):
        scheme[f"resampling_fn_{part}"] = "resample_data_or_seg_to_shape"
        scheme[f"resampling_fn_{part}_kwargs"] = {"is_seg": is_seg, "order": order, **resampling}
    return {
        "dataset_name": "Dataset999_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0] * 3,
        "original_median_shape_after_transp": [1 if flat else 9, 10, 11],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"tiny": scheme},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0}},
    }


def model_folder(folder: Path, dims: int = 3, folds: int = 1, flat: bool = False) -> Path:
    """Write an untrained nnU-Net as its trainer does."""
    content = plans(dims, flat)
    manager = PlansManager(content)
    for fold in range(folds):
        torch.manual_seed(fold)
        network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("tiny"), 1, 3, True)
        (folder / f"fold_{fold}").mkdir(parents=True)
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": "tiny"},
            "inference_allowed_mirroring_axes": tuple(range(dims)),
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(DATASET), encoding="utf-8")
    return folder


def initialised(folder: Path) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), None)
    return predictor


def volume(seed: int, shape: tuple[int, ...] = (9, 10, 11)) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def write_case(folder: Path, name: str, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    values = volume(seed)[0].numpy() * 50 + 200
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), folder / f"{name}_0000.nii.gz")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def statistics(model: Path) -> SourceStatistics:
    predictor = AdaptivePredictor(initialised(model))
    return measure_source_statistics(predictor.network, [volume(9)[None]], inferer=predictor.inferer.inferer)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a", "b", "c")):
        write_case(tmp_path / "images", name, seed)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (9, 10, 11)),
        ({}, (5, 9, 6)),
        ({"folds": 3}, (9, 8, 8)),
        ({"dims": 2}, (3, 9, 10)),
        ({"dims": 2, "flat": True}, (1, 9, 10)),
    ],
    ids=["patches", "padded", "folds", "slices", "flat"],
)
def test_without_adaptation_logits_are_bit_identical(
    settings: dict[str, Any], shape: tuple[int, ...], tmp_path: Path
) -> None:
    plain = initialised(model_folder(tmp_path / "model", **settings))
    expected = plain.predict_logits_from_preprocessed_data(volume(1, shape))
    found = AdaptivePredictor(plain, "source").predict_logits_from_preprocessed_data(volume(1, shape))
    assert found.dtype == expected.dtype == torch.half
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("dims", "flat", "shape"), [(3, False, (9, 10, 11)), (2, False, (9, 9, 10)), (2, True, None)])
def test_a_case_is_one_image(dims: int, flat: bool, shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    shape = shape or (1, 9, 10)
    plain = initialised(model_folder(tmp_path / "model", dims, flat=flat))
    own = AdaptivePredictor(plain, "source")
    source = measure_source_statistics(
        own.network, [own.to_image(volume(9, shape))], inferer=own.inferer.inferer, windows=2
    )
    adaptive = AdaptivePredictor(plain, cheap, source)
    weights = fingerprint(adaptive.network)
    for seed in (1, 2):
        logits = adaptive.predict_logits_from_preprocessed_data(volume(seed, shape) * 2 + 1)
        assert logits.shape == (3, *shape)
        assert logits.dtype == torch.half
    record = adaptive.method.last[0]
    assert adaptive.method.images_seen == 2
    assert record["forwards"] > record["backwards"] > 0
    assert record["prompt_norm"] > 0
    assert fingerprint(adaptive.network) == weights


def test_folds_adapt_each_with_its_own_state(tmp_path: Path) -> None:
    plain = initialised(model_folder(tmp_path / "model", folds=2))
    before = {name: value.clone() for name, value in plain.network.state_dict().items()}
    inferer = AdaptivePredictor(plain).inferer.inferer
    for i, network in enumerate(fold_networks(plain)):
        measured = measure_source_statistics(network, [volume(9)[None]], inferer=inferer)
        (tmp_path / "statistics").mkdir(exist_ok=True)
        measured.save(tmp_path / "statistics" / f"fold_{i}.pt")

    def predictor() -> AdaptivePredictor:
        return AdaptivePredictor(plain, cheap, tmp_path / "statistics")

    whole, first, second = predictor(), predictor(), predictor()
    expected = [whole.predict_logits_from_preprocessed_data(volume(seed)) for seed in (1, 2)]
    found = [first.predict_logits_from_preprocessed_data(volume(1))]
    second.method.load_adaptation_state(first.method.adaptation_state())
    found.append(second.predict_logits_from_preprocessed_data(volume(2)))
    assert all(map(torch.equal, expected, found))
    (one,), (other,) = (fold.prompt_maps().values() for fold in whole.method.folds)
    assert not torch.equal(one, other)
    assert all(torch.equal(value, before[name]) for name, value in plain.network.state_dict().items())
    with pytest.raises(ValueError, match="NaN"):
        whole.predict_logits_from_preprocessed_data(volume(1) * torch.nan)
    assert whole.method.images_seen == 2


def test_deep_supervision_is_off(model: Path) -> None:
    loaded = initialised(model)
    loaded.network.decoder.deep_supervision = True
    logits = AdaptivePredictor(loaded).predict_logits_from_preprocessed_data(volume(1))
    assert torch.equal(logits, initialised(model).predict_logits_from_preprocessed_data(volume(1)))
    assert loaded.network.decoder.deep_supervision


def test_what_does_not_fit_is_refused(model: Path, statistics: SourceStatistics, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not initialised"):
        AdaptivePredictor(nnUNetPredictor(device=CPU))
    with pytest.raises(ValueError, match=r"no preset stedy \(did you mean steady"):
        AdaptivePredictor(initialised(model), "stedy")
    with pytest.raises(ValueError, match=r"measure at least 10 with `mgipt nnunet-calibrate`$"):
        AdaptivePredictor(initialised(model), "steady", statistics)
    for preset in ("fast", "steady"):
        with pytest.raises(ValueError, match=r"measure them with `mgipt nnunet-calibrate`, and give --statistics$"):
            AdaptivePredictor(initialised(model), preset)
    statistics.save(tmp_path / "fold_0.pt")
    with pytest.raises(ValueError, match="no source statistics of these weights"):
        AdaptivePredictor(initialised(model_folder(tmp_path / "model", folds=2)), "fast", tmp_path)
    cascade = initialised(model)
    cascade.configuration_manager.configuration["previous_stage"] = "3d_lowres"
    with pytest.raises(ValueError, match="second stage of a cascade"):
        AdaptivePredictor(cascade)


def test_nnunets_own_loop_adapts(model: Path, statistics: SourceStatistics, images: Path, tmp_path: Path) -> None:
    adaptive = AdaptivePredictor(initialised(model), cheap, statistics)
    (tmp_path / "out").mkdir()
    adaptive.predict_from_files_sequential(str(images), str(tmp_path / "out"))
    assert adaptive.method.images_seen == 3
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz", "c.nii.gz"}


class Autocast(nnUNetPredictor):
    """Predicts as on a graphics card, where nnU-Net lets layers compute in 16 bits."""

    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().predict_sliding_window_return_logits(input_image)


def test_steady_corrects_a_case_and_leaves_those_like_the_source(model: Path) -> None:
    plain = initialised(model)
    own = AdaptivePredictor(plain, "source")
    cases = [volume(seed) for seed in range(14)]
    source = measure_source_statistics(own.network, [case[None] for case in cases[:12]], inferer=own.inferer.inferer)
    adaptive = AdaptivePredictor(plain, "steady", source)
    for case in cases[12:]:
        expected = own.predict_logits_from_preprocessed_data(case)
        assert torch.equal(adaptive.predict_logits_from_preprocessed_data(case), expected)
    adaptive.method.reset()
    found = adaptive.predict_logits_from_preprocessed_data(cases[12].exp())
    assert adaptive.method.last[0]["adapted_weight"] > 0
    assert not torch.equal(found, own.predict_logits_from_preprocessed_data(cases[12].exp()))


def test_autocast_is_kept(model: Path, statistics: SourceStatistics) -> None:
    plain = Autocast(device=CPU, allow_tqdm=False, use_mirroring=False)
    plain.initialize_from_trained_model_folder(str(model), None)
    one = volume(1, (8, 8, 8))  # a single patch, so that the guard's loss is that of the prompts
    expected = plain.predict_logits_from_preprocessed_data(one)
    assert not torch.equal(expected, initialised(model).predict_logits_from_preprocessed_data(one))
    assert torch.equal(AdaptivePredictor(plain).predict_logits_from_preprocessed_data(one), expected)
    guarded = AdaptivePredictor(plain, "fast", statistics, configs=["guard"])
    logits = guarded.predict_logits_from_preprocessed_data(one)
    assert torch.isfinite(logits).all()
    assert guarded.method.last[0]["signals"]["loss"] == pytest.approx(guarded.method.last[0]["loss_before"], rel=0.05)


Run = Callable[..., None]


@pytest.fixture
def predict(model: Path, statistics: SourceStatistics, tmp_path: Path) -> Run:
    statistics.save(tmp_path / "statistics" / "fold_0.pt")

    def run(images: Path, out: str, *more: str) -> int:
        words = ["-i", str(images), "-o", str(tmp_path / out), "-m", str(model), "--device", "cpu"]
        words += ["--statistics", str(tmp_path / "statistics"), "--disable_progress_bar"]
        return cli.main(["nnunet-predict", *words, *more])

    return run  # type: ignore[return-value]


def masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_the_command_writes_what_nnunet_writes(predict: Run, model: Path, images: Path, tmp_path: Path) -> None:
    predict(images, "out", "--save_probabilities", "-npp", "1")
    (tmp_path / "own").mkdir()
    initialised(model).predict_from_files_sequential(str(images), str(tmp_path / "own"), save_probabilities=True)
    own, found = ({path.name for path in (tmp_path / name).iterdir()} for name in ("own", "out"))
    assert own <= found
    for name in ("a", "b", "c"):
        arrays = [np.load(tmp_path / folder / f"{name}.npz")["probabilities"] for folder in ("own", "out")]
        np.testing.assert_array_equal(*arrays)
        np.testing.assert_array_equal(
            masks(tmp_path / "own")[f"{name}.nii.gz"], masks(tmp_path / "out")[f"{name}.nii.gz"]
        )
    assert [row["name"] for row in records(tmp_path / "out")] == ["a", "b", "c"]


def test_a_resumed_stream_equals_an_uninterrupted_one(
    predict: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--preset", "fast", "--disable_tta"]
    predict(images, "whole", *words)
    (images / "c_0000.nii.gz").rename(tmp_path / "c_0000.nii.gz")
    predict(images, "parts", *words)
    (tmp_path / "c_0000.nii.gz").rename(images / "c_0000.nii.gz")
    predict(images, "parts", *words, "--resume")
    for name, mask in masks(tmp_path / "whole").items():
        np.testing.assert_array_equal(mask, masks(tmp_path / "parts")[name])
    whole, parts = (
        [(row["name"], row["loss_after"], row["prompt_norm"]) for row in records(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert whole == parts
    for more, message in (
        (["--resume"], "mirroring"),  # which was off
        ([], "has the results of an earlier run"),
    ):
        with pytest.raises(SystemExit):
            predict(images, "parts", "--preset", "fast", *more)
        assert message in capsys.readouterr().err.splitlines()[-1]
    predict(images, "parts", "--preset", "source", "--overwrite")
    assert len(records(tmp_path / "parts")) == 3


def test_a_bad_case_is_recorded_and_the_others_are_done(
    predict: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    predict(images, "good", "--preset", "fast", "--disable_tta")
    (images / "b2_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        predict(images, "out", "--preset", "fast", "--disable_tta")
    assert "b2_0000.nii.gz" in capsys.readouterr().err
    rows = records(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok"]
    good = records(tmp_path / "good")
    assert [row["loss_after"] for row in rows if row["status"] == "ok"] == [row["loss_after"] for row in good]


def test_files_of_others_are_not_written_over(
    predict: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.nii.gz").write_text("mine")
    with pytest.raises(SystemExit):
        predict(images, "out", "--preset", "source")
    assert "b.nii.gz was not written by a run" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["b.nii.gz"]
    assert (tmp_path / "out" / "b.nii.gz").read_text() == "mine"


def test_calibration_of_images_serves_prediction(model: Path, images: Path, tmp_path: Path) -> None:
    words = ["-m", str(model), "--device", "cpu", "--disable_progress_bar"]
    cli.main(["nnunet-calibrate", "-i", str(images), "-o", str(tmp_path / "measured"), *words])
    found = SourceStatistics.load(tmp_path / "measured" / "fold_0.pt")
    assert found.images == 3
    words += ["--preset", "fast", "--disable_tta", "--statistics", str(tmp_path / "measured")]
    cli.main(["nnunet-predict", "-i", str(images), "-o", str(tmp_path / "out"), *words])
    assert [row["status"] for row in records(tmp_path / "out")] == ["ok"] * 3


def test_folds_are_calibrated_on_their_own_training_cases(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = model_folder(tmp_path / "model", folds=2)
    dataset = tmp_path / "preprocessed" / "Dataset999_Tiny"
    (dataset / "tiny").mkdir(parents=True)
    for seed, name in enumerate("abc"):
        data = volume(seed).numpy()
        segmentation = np.zeros(data.shape, np.int8)
        nnUNetDatasetBlosc2.save_case(data, segmentation, {}, str(dataset / "tiny" / name))
    splits = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]
    (dataset / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8")
    monkeypatch.setenv("nnUNet_preprocessed", str(dataset.parent))
    words = ["-m", str(model), "--device", "cpu", "--disable_progress_bar"]
    cli.main(["nnunet-calibrate", "-d", "Dataset999_Tiny", "-o", str(tmp_path / "measured"), *words])
    found = [SourceStatistics.load(tmp_path / "measured" / f"fold_{fold}.pt") for fold in (0, 1)]
    assert [each.images for each in found] == [2, 1]
    words += ["--preset", "fast", "--disable_tta", "--statistics", str(tmp_path / "measured")]
    cli.main(["nnunet-predict", "-i", str(images), "-o", str(tmp_path / "out"), *words])
    assert [len(row["folds"]) for row in records(tmp_path / "out")] == [2, 2, 2]
    cli.main(["records", str(tmp_path / "out" / "records.jsonl")])
    assert "3" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_named(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["nnunet-predict", "-i", str(images), "-o", str(tmp_path / "out")]
    for model, message in ((tmp_path / "absent", "no dataset.json"), (model_folder(tmp_path / "model"), "no fold_7")):
        with pytest.raises(SystemExit):
            cli.main([*words, "-m", str(model), "-f", "7"])
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
