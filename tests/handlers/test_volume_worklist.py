# SPDX-License-Identifier: Apache-2.0
"""A list of volumes on disk, in windows, with spacing and writing around: killed in the middle, resumed, the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data import DataLoader
from monai.inferers import SlidingWindowInferer
from monai.transforms import AsDiscreted, Compose, Invertd, LoadImaged, SaveImaged, Spacingd, Transform

from mgipt_monai import AdaptiveInferer, SiteCorrection, StreamingAdaptationEvaluator, TestTimeAdaptationHandler
from mgipt_monai.data import StreamDataset
from mgipt_monai.handlers import WorkAheadHandler
from tests.conftest import same_state, stream, tiny_network, without_times

COUNT, LAST = 5, 2


class KilledAt(Transform):
    """Kills the process at one volume of the list, once it is told to by a file."""

    def __init__(self, told: Path) -> None:
        self.told = str(told)

    def __call__(self, item: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if item["name"] == str(LAST) and Path(self.told).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return dict(item)


def predict(volumes: Path, out: Path, ahead: bool, resume: bool = False) -> SiteCorrection:
    method = SiteCorrection(tiny_network(3, in_channels=1))
    items = [{"image": str(path), "name": path.name.split(".")[0], "site": "a"} for path in sorted(volumes.iterdir())]
    load = LoadImaged("image", ensure_channel_first=True, image_only=True)
    space = Spacingd("image", pixdim=(1.5, 1.5, 1.5))
    save = SaveImaged("pred", output_dir=out / "masks", separate_folder=False, print_log=False)
    engine = StreamingAdaptationEvaluator(
        "cpu",
        DataLoader(StreamDataset(items, Compose([KilledAt(volumes.parent / "kill"), load, space])), batch_size=1),
        method.network,
        inferer=AdaptiveInferer(method, SlidingWindowInferer((12, 12, 12), 2, 0.25, "gaussian")),
        postprocessing=Compose([Invertd("pred", space, "image"), AsDiscreted("pred", argmax=True), save]),
        val_handlers=[
            TestTimeAdaptationHandler(method, out / "state.pt", out / "records.jsonl", resume=resume),
            *([WorkAheadHandler()] if ahead else []),
        ],
        progress=False,
    )
    engine.run()
    return method


@pytest.mark.parametrize("ahead", [False, True], ids=["as it is", "work ahead"])
def test_killed_list_of_volumes_resumes_to_what_an_uninterrupted_one_gives(tmp_path: Path, ahead: bool) -> None:
    volumes = tmp_path / "volumes"
    volumes.mkdir()
    for i, image in enumerate(stream(COUNT, channels=1, dims=3)):
        nib.save(nib.Nifti1Image(image[0, 0].numpy(), np.diag([1.0, 1.0, 2.0, 1.0])), volumes / f"{i}.nii.gz")
    whole = predict(volumes, tmp_path / "whole", ahead)

    arguments = volumes, tmp_path / "parts", ahead
    (tmp_path / "kill").touch()
    child = multiprocessing.get_context("fork").Process(target=predict, args=arguments)
    child.start()
    child.join()
    (tmp_path / "kill").unlink()
    assert child.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "parts" / "masks").iterdir())) in (LAST - 1, LAST)  # the last may be under way
    resumed = predict(*arguments, resume=True)

    assert resumed.images_seen == COUNT
    assert same_state(resumed.adaptation_state(), whole.adaptation_state())
    assert without_times(tmp_path / "parts" / "records.jsonl") == without_times(tmp_path / "whole" / "records.jsonl")
    masks = sorted((tmp_path / "whole" / "masks").iterdir())
    assert len(masks) == COUNT
    for mask in masks:
        one, other = (nib.load(tmp_path / part / "masks" / mask.name) for part in ("whole", "parts"))
        assert one.shape == (24, 24, 24)
        assert np.array_equal(one.get_fdata(), other.get_fdata())
