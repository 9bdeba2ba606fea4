# SPDX-License-Identifier: Apache-2.0
"""Small files that declare huge images are refused by what they declare, before memory is taken for them."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from mgipt_monai import RecordFile
from mgipt_monai.data import StreamDataset, check_declared_size
from tests.bundle.conftest import CONFIGS, QUICK, demo_sites, run_bundle

__all__ = ["demo_sites"]

SIDE = 13_000


def png(width: int, height: int, colour: int = 2, depth: int = 8, rows: int | None = None) -> bytes:
    """A PNG of zeros, made without its pixels ever being in memory; with fewer rows it is truncated."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    packer, parts = zlib.compressobj(9), []
    line = bytes(1 + (width * samples * depth + 7) // 8)
    for _ in range(height if rows is None else rows):
        parts.append(packer.compress(line))
    data = b"".join([*parts, packer.flush()])

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def nifti(shape: tuple[int, ...], kind: type = np.float32, **fields: float) -> bytes:
    """The header of a NIfTI file."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(kind)
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+1", 352
    for key, value in fields.items():
        header[key] = value
    return header.binaryblock + bytes(4)


def nifti_with_extension(length: int) -> bytes:
    """A NIfTI header with an extension that claims to be longer than there is room before the data."""
    return nifti((8, 8, 8), vox_offset=400)[:348] + b"\1\0\0\0" + struct.pack("<ii", length, 4) + bytes(40 + 4 * 512)


def tiff(width: int, height: int) -> bytes:
    """The header of an uncompressed TIFF file, without its pixels."""
    buffer = io.BytesIO()
    Image.new("L", (2, 2)).save(buffer, format="TIFF")
    content = bytearray(buffer.getvalue())
    entries = struct.unpack_from("<H", content, offset := struct.unpack_from("<I", content, 4)[0])[0]
    for place in range(offset + 2, offset + 2 + 12 * entries, 12):
        value = {256: width, 257: height, 278: height, 279: width * height}.get(
            struct.unpack_from("<H", content, place)[0]
        )
        if value is not None:
            struct.pack_into("<HII", content, place + 2, 4, 1, value)
    return bytes(content)


BOMBS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "13,000 x 13,000 colour": ("a.png", lambda: png(SIDE, SIDE), "13000 x 13000 x 3 = 507,000,000 values, more"),
    "only declared": ("a.png", lambda: png(SIDE, SIDE, colour=0, rows=1), "which cannot be in its"),
    "under the name of a volume": ("a.nii", lambda: png(SIDE, SIDE), "declares 13000 x 13000 x 3"),
    "photograph without pixels": ("a.tif", lambda: tiff(12_000, 12_000), "which cannot be in its"),
    "a billion pixels": ("a.png", lambda: png(40_000, 40_000, colour=0, rows=1), "too many pixels to be read"),
    "volume, packed": ("a.nii.gz", lambda: gzip.compress(nifti((1024, 1024, 1024))), "= 1,073,741,824 values, more"),
    "volume below the limit": ("a.nii.gz", lambda: gzip.compress(nifti((512, 512, 512))), "which cannot be in its"),
    "volume, not packed": ("a.nii", lambda: nifti((512, 512, 512)), "declares 536,871,264 bytes, which cannot be in"),
    "many axes": ("a.nii", lambda: nifti((99, 99, 99, 99, 99, 99)), "values, more than max_values"),
    "negative axis": ("a.nii", lambda: nifti((8, 8, 8), dim=[3, 8, -8, 8, 1, 1, 1, 1]), "an image without voxels"),
    "no axes": ("a.nii", lambda: nifti((8, 8, 8), dim=[0] * 8), "an image without voxels"),
    "data far away": ("a.nii.gz", lambda: gzip.compress(nifti((8, 8, 8), vox_offset=2e9)), "at a place that cannot be"),
    "extension": ("a.nii.gz", lambda: gzip.compress(nifti_with_extension(2**31 - 16)), "header extension of 2,147,483"),
    "no image": ("a.png", lambda: b"\x80\x04\x95 a pickle under the name of an image", "cannot be read as an image"),
    "numpy": ("a.png", lambda: b"\x93NUMPY\1\0" + bytes(200), "cannot be read as an image"),
    "PostScript": ("a.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as an image"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BOMBS.values(), ids=BOMBS.keys())
@pytest.mark.parametrize("key", ["image", "label"])
def test_file_that_declares_more_than_it_can_hold_fails_with_a_sentence(
    name: str, content: Callable[[], bytes], message: str, key: str, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / name).write_bytes(content())
    item = {"image": str(tmp_path / "good.png"), "name": "a", "site": "", key: str(tmp_path / name)}
    failure = StreamDataset([item], transform=lambda _item: pytest.fail("it was loaded"))[0]["failure"]
    assert failure.startswith(f"{key} file {tmp_path / name} ")
    assert message in failure


USAGE = """
import resource, sys
from mgipt_monai.data import StreamDataset
from monai.transforms import Compose, LoadImaged
dataset = StreamDataset([{"image": sys.argv[1], "name": "a", "site": ""}], Compose([LoadImaged("image")]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(dataset[0]["failure"])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", lambda: png(SIDE, SIDE)),
        ("a.nii.gz", lambda: gzip.compress(nifti((1024, 1024, 1024)))),
        ("a.nii.gz", lambda: gzip.compress(nifti_with_extension(2**31 - 16) + bytes(2**22))),
    ],
    ids=["png", "volume", "extension"],
)
def test_bomb_takes_no_memory(name: str, content: Callable[[], bytes], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content())
    command = [sys.executable, "-c", USAGE, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, mebibytes = done.stdout.splitlines()
    assert int(mebibytes) < 50


def test_bombs_in_a_stream_are_recorded_and_the_others_are_done(tmp_path: Path, demo_sites: Path) -> None:
    images = tmp_path / "site"
    images.mkdir()
    for name in ("eye_000.png", "eye_001.png"):
        (images / name).write_bytes((demo_sites / "cold_noisy" / "images" / name).read_bytes())
    (images / "b_bomb.png").write_bytes(png(SIDE, SIDE))
    (images / "c_bomb.nii.gz").write_bytes(gzip.compress(nifti((1024, 1024, 1024))))
    out = tmp_path / "out"
    done = run_bundle([CONFIGS / "inference.yaml"], check=False, dataset_dir=images, output_dir=out, **QUICK)
    assert "2 of 4 images failed, the others are done" in done.stderr
    rows = RecordFile(out / "records.jsonl").read()
    assert [row["status"] for row in rows] == ["failed", "failed", "ok", "ok"]
    assert all("raise max_values if that is true" in row["reason"] for row in rows[:2])


def test_limit_is_a_setting_and_real_images_of_every_kind_pass(tmp_path: Path, demo_sites: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8)
    flat = np.zeros((2000, 2000), dtype=np.uint8)
    for pixels, kind in ((noise, "noise"), (flat, "flat")):
        for ending in ("png", "jpg", "tif", "bmp", "gif", "webp", "jp2"):
            Image.fromarray(pixels).save(tmp_path / f"{kind}.{ending}")
        for compression in ("tiff_lzw", "tiff_deflate", "packbits", "raw"):
            Image.fromarray(pixels).save(tmp_path / f"{kind}_{compression}.tif", compression=compression)
        for ending in ("nii", "nii.gz"):
            for shape, data in (("2d", pixels[..., :1]), ("4d", np.stack([pixels.astype(np.float32)] * 2, -1))):
                nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / f"{kind}_{shape}.{ending}")
    for mode in ("1", "P", "LA", "RGBA", "CMYK", "I;16", "F"):
        for ending in ("tif",) if mode in ("CMYK", "F") else ("png", "tif"):
            Image.fromarray(flat).convert(mode).save(tmp_path / f"mode_{mode[0]}{len(mode)}.{ending}")
    nibabel.save(nibabel.Nifti2Image(noise, np.eye(4)), tmp_path / "second.nii")
    extended = nibabel.Nifti1Image(noise, np.eye(4))
    extended.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"hello " * 99))
    nibabel.save(extended, tmp_path / "extended.nii.gz")
    paths = sorted(tmp_path.iterdir())
    assert len(paths) > 40
    for path in paths:
        check_declared_size("image", path)
    out = tmp_path / "out"
    done = run_bundle(
        [CONFIGS / "inference.yaml"], check=False, dataset_dir=demo_sites, output_dir=out, max_values=12287, **QUICK
    )
    assert "declares 64 x 64 x 3 = 12,288 values, more than max_values=12,287" in done.stderr
