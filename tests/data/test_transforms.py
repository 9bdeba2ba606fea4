# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.transforms import Compose, Lambdad
from PIL import Image

from mgipt_monai.data import CheckImaged, CheckLogitsd, LabelToChannelsd, StreamDataset


def test_index_coding_of_disc_and_cup() -> None:
    mask = torch.tensor([[[0, 1, 2]]])
    result = LabelToChannelsd("label", ranges=[[1, 2], [2, 2]])({"label": mask})["label"]
    assert result.tolist() == [[[0, 1, 1]], [[0, 0, 1]]]


def test_grey_coding_of_disc_and_cup() -> None:
    mask = torch.tensor([[[255, 128, 0, 77]]])
    result = LabelToChannelsd("label", ranges=[[0, 254], [0, 0]], background=[255])({"label": mask})["label"]
    assert result.tolist() == [[[0, 1, 1, 1]], [[0, 0, 1, 0]]]


def test_mask_of_another_coding_is_refused_with_its_values() -> None:
    with pytest.raises(ValueError, match=r"values \[128, 255\].*mask_ranges"):
        LabelToChannelsd("label", ranges=[[1, 2], [2, 2]])({"label": torch.tensor([[[255, 128, 0]]])})


def test_mask_of_several_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="3 channels"):
        LabelToChannelsd("label", ranges=[[1, 2]])({"label": torch.zeros(3, 4, 4)})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 8, 8), "1 channels where the network expects 3.*color_mode"),
        (torch.rand(4, 8, 8), "4 channels"),
        (torch.rand(3, 8, 8, 8), "3 spatial dimensions where the network expects 2"),
        (torch.zeros(3, 8, 8), "constant"),
        (torch.full((3, 8, 8), float("inf")), "infinite"),
    ],
)
def test_unfit_images_are_refused_in_words(image: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckImaged("image", channels=3)({"image": image})


def test_failure_of_a_transform_comes_out_with_the_file_and_the_first_cause(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def broken(_image: object) -> None:
        raise ValueError("too dark")

    item = {"image": str(tmp_path / "a.png"), "site": "S", "name": "S/a"}
    out = StreamDataset([item], Compose([Lambdad("image", broken)]))[0]
    assert out == {"name": "S/a", "site": "S", "failure": f"{tmp_path / 'a.png'}: too dark"}
    assert StreamDataset([{**item, "round": 2}], Compose([Lambdad("image", broken)]))[0] == {**out, "round": 2}


def test_each_file_of_an_image_of_several_is_checked(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    dataset = StreamDataset([{"image": files, "site": "", "name": "a"}])
    assert dataset[0]["failure"].startswith(f"image file {files[1]} does not exist")


def test_missing_mask_and_empty_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "e.png").touch()
    items = [
        {"image": str(tmp_path / "a.png"), "label": str(tmp_path / "m.png"), "site": "", "name": "a"},
        {"image": str(tmp_path / "e.png"), "site": "", "name": "e"},
    ]
    dataset = StreamDataset(items)
    assert dataset[0]["failure"] == f"label file {tmp_path / 'm.png'} does not exist"
    assert dataset[1]["failure"].startswith(f"image file {tmp_path / 'e.png'} is empty")


def test_logits_of_other_sides_than_the_image_are_refused_before_they_are_stretched() -> None:
    data = {"image": torch.rand(3, 32, 32), "pred": torch.rand(2, 28, 28)}
    with pytest.raises(TypeError, match=r"returns 28x28 of an image of 32x32.*pads its convolutions"):
        CheckLogitsd("pred", channels=2)(data)
