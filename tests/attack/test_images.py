# SPDX-License-Identifier: Apache-2.0
"""Images that would be read as something else than what is in them, without a word."""

from __future__ import annotations

import itertools
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import ExifTags, Image

from mgipt_monai import RecordFile
from mgipt_monai.data import PhotographReader
from mgipt_monai.data.demo.cameras import CAMERAS
from mgipt_monai.data.demo.fundus import fundus_scene
from mgipt_monai.data.photographs import read_photograph
from tests.bundle.conftest import CONFIGS, QUICK, run_bundle

INFERENCE, EVALUATE = CONFIGS / "inference.yaml", CONFIGS / "evaluate.yaml"

RAW_OF_SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}
"""How the pixels lie in a file whose EXIF orientation has this number, of an image as it is shown."""


def save_turned(shown: np.ndarray, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = np.ascontiguousarray(RAW_OF_SHOWN[orientation](shown))
    Image.fromarray(pixels).save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))


def photograph(height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """An eye that is not square, and its mask."""
    scene, mask = fundus_scene(0, 64)
    pixels = np.round(CAMERAS["cold_noisy"](scene, 0) * 255).astype(np.uint8)
    return pixels[:height, :width], mask[:height, :width]


@pytest.mark.parametrize("orientation", RAW_OF_SHOWN)
@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
@pytest.mark.parametrize("mode", [None, "RGB", "L"])
def test_photograph_is_read_as_a_viewer_shows_it(
    orientation: int, ending: str, mode: str | None, tmp_path: Path
) -> None:
    shown, _ = photograph()
    for number in (1, orientation):
        save_turned(shown, tmp_path / f"{number}.{ending}", number)
    upright, turned = (read_photograph(tmp_path / f"{number}.{ending}", mode) for number in (1, orientation))
    assert turned.shape[:2] == (48, 64)
    assert np.abs(turned.astype(float) - upright).mean() < (3 if ending == "jpg" else 1e-9)


def test_mask_has_the_geometry_of_the_photograph_as_it_is_shown_in_all_orientations(tmp_path: Path) -> None:
    shown, mask = photograph()
    for kind in ("images", "masks"):
        (tmp_path / "in" / kind).mkdir(parents=True)
    for orientation in RAW_OF_SHOWN:
        save_turned(shown, tmp_path / "in" / "images" / f"{orientation}.png", orientation)
        # of the masks, too, some are turned by their own tags
        save_turned(mask, tmp_path / "in" / "masks" / f"{orientation}.png", 1 + orientation % 8)
    settings = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out", **QUICK}
    run_bundle([INFERENCE, EVALUATE, Path("configs/methods/source.yaml")], **settings)
    masks = [np.asarray(Image.open(tmp_path / "out" / f"{orientation}.png")) for orientation in RAW_OF_SHOWN]
    assert masks[0].shape == (48, 64)
    assert masks[0].any()
    assert all(np.array_equal(one, masks[0]) for one in masks)
    assert not any(Image.open(path).getexif() for path in (tmp_path / "out").glob("*.png"))
    scores = {str(row["metrics"]) for row in RecordFile(tmp_path / "out" / "records.jsonl").read()}
    assert len(scores) == 1


def with_significant_bits(path: Path, bits: int) -> None:
    """Put a chunk sBIT into a grey PNG file."""
    content = path.read_bytes()
    chunk = b"sBIT" + bytes([bits])
    path.write_bytes(content[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_of_any_depth_keeps_its_levels_when_it_is_converted(
    bits: int, mode: str, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deep = np.linspace(0, 2**bits - 1, 2**12).round().astype(np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(tmp_path / f"deep.{ending}")
    with caplog.at_level("INFO", logger="mgipt_monai"):
        read = read_photograph(tmp_path / f"deep.{ending}", mode)
    assert read.shape == ((64, 64, 3) if mode == "RGB" else (64, 64))
    assert len(np.unique(read)) == len(np.unique(deep))
    assert np.allclose(read.reshape(64, 64, -1)[..., 0], deep * 255.0 / (2**bits - 1), atol=1e-3)
    assert f"does not say how many bits it uses: {bits}, by its highest value" in caplog.text


def test_depth_that_the_file_says_is_used_for_a_dark_image_too(tmp_path: Path) -> None:
    dark = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    with_significant_bits(tmp_path / "dark.png", 12)
    assert read_photograph(tmp_path / "dark.png", "L").max() == pytest.approx(255 * 255 / 4095)
    with_significant_bits(tmp_path / "dark.png", 0)  # no such depth: as if it said nothing
    assert read_photograph(tmp_path / "dark.png", "L").max() == 255


def test_twelve_bit_grey_gives_the_mask_of_the_same_photograph_with_eight(tmp_path: Path) -> None:
    shown, _ = photograph(64, 64)
    grey = np.asarray(Image.fromarray(shown).convert("L"))
    (tmp_path / "in").mkdir()
    Image.fromarray(grey).save(tmp_path / "in" / "eight.png")
    Image.fromarray(grey.astype(np.uint16) * 16).save(tmp_path / "in" / "twelve.png")
    settings = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out", "color_mode": "RGB", **QUICK}
    run_bundle([INFERENCE, Path("configs/methods/source.yaml")], **settings)
    eight, twelve = (np.asarray(Image.open(tmp_path / "out" / f"{name}.png")) for name in ("eight", "twelve"))
    assert eight.any()
    assert (eight != twelve).mean() < 0.001


def colour_of_sixteen_bits(path: Path, values: np.ndarray) -> None:
    """Write a PNG of 16 bits per channel, which Pillow cannot."""
    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_colour_of_twelve_bits_that_would_be_cut_to_sixteen_levels_is_refused(tmp_path: Path) -> None:
    full = np.random.default_rng(0).integers(0, 2**16, (32, 32, 3))
    colour_of_sixteen_bits(tmp_path / "full.png", full)
    assert np.array_equal(read_photograph(tmp_path / "full.png"), full >> 8)
    colour_of_sixteen_bits(tmp_path / "twelve.png", full >> 4)
    with pytest.raises(ValueError, match=r"twelve.png uses only 16 of the 256 levels .* scale it to all 16 bits"):
        read_photograph(tmp_path / "twelve.png")


def test_reader_gives_what_monais_gives_for_ordinary_photographs(tmp_path: Path) -> None:
    from monai.data import PILReader

    shown, mask = photograph()
    Image.fromarray(shown).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "b.png")
    Image.fromarray(shown).convert("RGBA").save(tmp_path / "c.png")
    for name, first in itertools.product("abc", (False, True)):
        own, monais = PhotographReader(reverse_indexing=first), PILReader(reverse_indexing=first)
        for files in ([tmp_path / f"{name}.png"], [tmp_path / f"{name}.png"] * 2):
            (one, one_meta), (other, other_meta) = (reader.get_data(reader.read(files)) for reader in (own, monais))
            assert np.array_equal(one, other)
            assert str(one_meta) == str(other_meta)


@pytest.mark.parametrize("fault", ["zero", "flat"])
def test_header_without_a_place_in_space_is_a_sentence(fault: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    affine = np.diag({"zero": [0, 0, 0, 1.0], "flat": [1, 0, 1, 1.0]}[fault])
    values = np.random.default_rng(0).random((32, 32, 1, 3)).astype(np.float32)
    image = nibabel.Nifti1Image(values, None)
    image.header.set_sform(affine, code=1)
    nibabel.save(image, tmp_path / "in" / "a.nii.gz")
    done = run_bundle([INFERENCE], check=False, dataset_dir=tmp_path / "in", output_dir=tmp_path / "out", **QUICK)
    (row,) = RecordFile(tmp_path / "out" / "records.jsonl").read()
    assert row["status"] == "failed"
    assert "the header has no valid affine" in row["reason"], done.stderr[-2000:]
    assert "repair sform, qform and pixdim" in row["reason"]
