# SPDX-License-Identifier: Apache-2.0
"""DICOM as input: series of slices as volumes, single files as pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Resized
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from mgipt_monai.data import (
    DicomReader,
    PhotographReader,
    SaveMaskd,
    StreamDataset,
    ToAxesOfd,
    check_declared_size,
    find_stream,
)
from mgipt_monai.utils.files import root_cause

AXIAL, CORONAL = [1.0, 0, 0, 0, 1, 0], [1.0, 0, 0, 0, 0, -1]


def write(path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    """Write one DICOM file of one frame (H, W) or (H, W, 3)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    made.PatientName, made.PatientID = "Secret^Name", "12345"
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    made.Rows, made.Columns = pixels.shape[:2]
    made.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    made.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        made.PlanarConfiguration = 0
    made.BitsAllocated = made.BitsStored = 8 * pixels.dtype.itemsize
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes()
    for key, value in tags.items():
        setattr(made, key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path, volume: np.ndarray, axes: list[float] = AXIAL, origin: tuple = (-10.0, -20.0, 30.0), **tags: Any
) -> Path:
    """Write slices (n, H, W) 2.5 mm apart, 0.5 x 0.75 mm pixels, whose names and numbers are not in their order."""
    normal, series = np.cross(axes[:3], axes[3:]), generate_uid()
    for k, pixels in enumerate(volume):
        place = np.array(origin) + 2.5 * k * normal
        own = {"SeriesInstanceUID": series, "InstanceNumber": len(volume) - k, "PixelSpacing": [0.5, 0.75]}
        own |= {"ImagePositionPatient": place.tolist(), "ImageOrientationPatient": list(axes)}
        write(folder / f"slice_{(7 * k) % 10}.dcm", pixels, **{**own, **tags})
    return folder


def load(path: Path, **settings: Any) -> MetaTensor:
    transform = Compose([LoadImaged("image", reader=["NibabelReader", PhotographReader(), DicomReader(**settings)])])
    return EnsureChannelFirstd("image")(transform({"image": str(path)}))["image"]


def world(affine: np.ndarray, voxel: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(affine, dtype=float) @ [*voxel, 1])[:3]


@pytest.mark.parametrize("axes", [AXIAL, CORONAL])
def test_mask_of_a_series_is_nifti_at_the_patients_place(tmp_path: Path, axes: list[float]) -> None:
    volume = np.zeros((4, 6, 8), dtype=np.int16)
    volume[1, 2, 5] = 100  # second slice, third row, sixth column
    image = load(write_series(tmp_path / "CT1", volume, axes, RescaleSlope=2, RescaleIntercept=-1000))
    assert image.shape == (1, 8, 6, 4)
    assert image.max() == -800
    assert image.min() == -1000
    found = tuple(int(i) for i in (image[0] == -800).nonzero()[0])
    # the standard's formula, in LPS: origin, along the row by the column spacing, down by the row spacing
    place = np.array([-10, -20, 30]) + 5 * 0.75 * np.array(axes[:3]) + 2 * 0.5 * np.array(axes[3:])
    place = place + 2.5 * np.cross(axes[:3], axes[3:])
    assert world(image.affine, found) == pytest.approx(place * [-1, -1, 1])
    mask = MetaTensor((image == -800).float()).copy_meta_from(image)
    SaveMaskd("pred", tmp_path / "out")({"pred": mask, "name": "CT1"})
    written = nibabel.load(tmp_path / "out" / "CT1.nii.gz")
    assert written.shape == (8, 6, 4)
    (voxel,) = np.argwhere(written.get_fdata())
    assert world(written.affine, tuple(voxel)) == pytest.approx(place * [-1, -1, 1])


def test_series_is_one_image_and_photographs_are_one_each(tmp_path: Path) -> None:
    volume, eye = np.arange(48, dtype=np.int16).reshape(3, 4, 4), np.zeros((4, 4, 3), dtype=np.uint8)
    for name in ("p1", "p2"):
        write_series(tmp_path / "ct" / name, volume)
    one = generate_uid()
    for name in ("left", "right"):
        write(tmp_path / "eyes" / "images" / f"{name}.dcm", eye, SeriesInstanceUID=one)
    assert [item["name"] for item in find_stream(tmp_path / "ct")] == ["p1", "p2"]
    assert [item["name"] for item in find_stream(tmp_path / "ct" / "p1")] == ["p1"]
    assert [item["name"] for item in find_stream(f"{tmp_path}/ct/*")] == ["p1", "p2"]
    assert [item["name"] for item in find_stream(tmp_path / "eyes")] == ["left", "right"]
    (tmp_path / "ct" / "masks").mkdir()
    (tmp_path / "ct" / "masks" / "p1.nii.gz").touch()
    assert find_stream(tmp_path / "ct", labelled=True)[0]["label"].endswith("masks/p1.nii.gz")
    assert "Secret" not in str(find_stream(tmp_path / "ct"))


def test_pictures_are_as_a_viewer_shows_them(tmp_path: Path) -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert load(write(tmp_path / "a.dcm", grey))[0].tolist() == grey.tolist()
    assert load(tmp_path / "a.dcm", reverse_indexing=True)[0].tolist() == grey.T.tolist()
    assert load(tmp_path / "a.dcm", channels=3).shape == (3, 3, 4)
    dark = write(tmp_path / "b.dcm", grey, PhotometricInterpretation="MONOCHROME1")
    assert load(dark)[0].tolist() == (255 - grey.astype(float)).tolist()
    colour = np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    assert load(write(tmp_path / "c.dcm", colour), channels=3).permute(1, 2, 0).tolist() == colour.tolist()
    deep = write(tmp_path / "d.dcm", grey.astype(np.uint16) * 300, BitsStored=12, HighBit=11)
    assert load(deep, channels=3).max() == pytest.approx(3300 * 255 / 4095)
    mask = MetaTensor(torch.ones(1, 3, 4)).copy_meta_from(load(tmp_path / "a.dcm"))
    SaveMaskd("pred", tmp_path / "out")({"pred": mask, "name": "a"})
    assert Image.open(tmp_path / "out" / "a.png").size == (4, 3)


def change(folder: Path, number: int, **tags: Any) -> None:
    path = sorted(folder.iterdir())[number]
    changed = pydicom.dcmread(path)
    for key, value in tags.items():
        setattr(changed, key, value)
    changed.save_as(path)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"SeriesInstanceUID": "1.2.3"}, "slices of 2 series"),
        ({"ImageOrientationPatient": CORONAL}, "several orientations"),
        ({"ImagePositionPatient": [-10, -20, 30]}, "several slices at one place"),
        ({"ImagePositionPatient": [-10, -20, 99]}, "mm apart"),
        ({"Rows": 3, "PixelData": b"\0" * 24}, "several sizes"),
        ({"NumberOfFrames": 2}, "2 frames: convert it to NIfTI"),
    ],
)
def test_slices_that_make_no_volume_fail_with_the_folder_and_the_fix(tmp_path: Path, tags: dict, words: str) -> None:
    folder = write_series(tmp_path / "CT", np.zeros((5, 4, 4), dtype=np.int16))
    change(folder, 4, **tags)  # not the lowest
    data = StreamDataset(find_stream(folder), LoadImaged("image", reader=[PhotographReader(), DicomReader()]))
    failure = data[0]["failure"]
    assert words in failure
    assert str(folder) in failure
    assert "Secret" not in failure


def written_mask(path: Path, image: MetaTensor) -> tuple[np.ndarray, np.ndarray]:
    """Write what `predict` would for some voxels of a volume; return the values and the affine of its file."""
    values = np.arange(image[0].numel()).reshape(image.shape[1:]) % 7 // 6
    mask = MetaTensor(torch.as_tensor(values, dtype=torch.float32)[None]).copy_meta_from(image)
    SaveMaskd("pred", path.parent)({"pred": mask, "name": path.name.removesuffix(".nii.gz")})
    return values, nibabel.load(path).affine


def beside(folder: Path, mask: Path) -> MetaTensor:
    """The mask as the bundle loads it beside a series, whose image is resized before."""
    steps = [
        LoadImaged("image", reader=[DicomReader()]), EnsureChannelFirstd("image"), Resized("image", (4, 4, 4)),
        LoadImaged("label"), EnsureChannelFirstd("label"), ToAxesOfd("label"),
    ]  # fmt: skip
    return Compose(steps)({"image": str(folder), "label": str(mask)})["label"]


@pytest.mark.parametrize("axes", [AXIAL, CORONAL, [0.8, 0.6, 0, -0.6, 0.8, 0]])
def test_reference_mask_of_a_series_is_turned_to_its_axes(tmp_path: Path, axes: list[float]) -> None:
    folder = write_series(tmp_path / "CT", np.random.default_rng(0).integers(0, 9, (3, 6, 5)).astype(np.int16), axes)
    image = load(folder)
    path = tmp_path / "CT.nii.gz"
    values, affine = written_mask(path, image)
    assert np.array_equal(beside(folder, path)[0], values)
    stored = nibabel.Nifti1Image(values.astype("uint8"), affine)
    flip = np.array([[0, -1], [1, 1], [2, -1]])  # as dcm2niix, and more
    swap = np.array([[2, 1], [0, -1], [1, 1]])
    for order in (flip, swap):
        turned = stored.as_reoriented(order)
        assert not np.array_equal(turned.affine, affine)
        nibabel.save(turned, path)
        label = beside(folder, path)
        assert np.array_equal(label[0], values)
        assert np.allclose(label.affine, affine, atol=1e-4)


def test_reference_mask_that_does_not_fit_the_series_is_an_error(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "CT", np.random.default_rng(0).integers(0, 9, (3, 6, 5)).astype(np.int16))
    path = tmp_path / "CT.nii.gz"
    values, affine = written_mask(path, load(folder))
    nibabel.save(nibabel.Nifti1Image(values[:-1].astype("uint8"), affine), path)
    with pytest.raises(RuntimeError) as caught:
        beside(folder, path)
    assert root_cause(caught.value).startswith("the mask has 4x6x3 voxels, its DICOM series 5x6x3: ")
    affine[0, 3] += 10
    nibabel.save(nibabel.Nifti1Image(values.astype("uint8"), affine), path)
    with pytest.raises(RuntimeError) as caught:
        beside(folder, path)
    assert root_cause(caught.value).startswith("the affine of the mask puts it elsewhere than its DICOM series: ")


def test_mask_beside_nifti_with_another_header_is_taken_voxel_by_voxel(tmp_path: Path) -> None:
    data = {
        "image": MetaTensor(torch.rand(1, 3, 4, 5), meta={"spatial_shape": (3, 4, 5)}),
        "label": torch.ones(1, 3, 4, 5),
    }
    data["image"].meta["original_affine"] = torch.diag(torch.tensor([2.0, 2, 2, 1]))
    data["label"] = MetaTensor(data["label"], affine=torch.eye(4))
    assert ToAxesOfd("label")(data)["label"] is data["label"]


def test_sizes_are_checked_before_pixels_are_read(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "CT", np.zeros((5, 4, 4), dtype=np.int16))
    check_declared_size("image", folder, max_values=80)
    with pytest.raises(ValueError, match=r"declares 4 x 4 x 5 = 80 values, more than max_values=79"):
        check_declared_size("image", folder, max_values=79)
    path = write(tmp_path / "bomb.dcm", np.zeros((4, 4), dtype=np.uint8), Rows=60000, Columns=4)
    with pytest.raises(ValueError, match="more pixels than can be in its"):
        check_declared_size("image", path)
    cut = tmp_path / "cut.dcm"
    cut.write_bytes((tmp_path / "bomb.dcm").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.dcm"):
        check_declared_size("image", cut)


def test_without_pydicom_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "eye.dcm", np.zeros((4, 4), dtype=np.uint8))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    assert DicomReader().verify_suffix(os.fspath(path))
    assert 'pip install "mgipt_monai[dicom]"' in StreamDataset(find_stream(path))[0]["failure"]
