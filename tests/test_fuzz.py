# SPDX-License-Identifier: Apache-2.0
"""Damaged files: a state file loads as it was or is refused by name, an image file is predicted or recorded as failed.

Neither ever changes the adaptation in passing, nor ends in another error.
"""

from __future__ import annotations

import copy
import gzip
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.transforms import Compose, EnsureChannelFirstd, Lambdad, LoadImaged, Resized, ScaleIntensityd
from PIL import Image

from mgipt_monai import (
    MGIPT,
    SAR,
    VPTTA,
    AdaptationEvents,
    AdaptationMethod,
    AdaptiveInferer,
    CoTTA,
    StreamFailedError,
    StreamFile,
    StreamingAdaptationEvaluator,
)
from mgipt_monai.data import CheckImaged, StreamDataset
from mgipt_monai.methods import Guard
from tests.conftest import same_state, stream, tiny_network

METHODS = {
    "mgipt": lambda: MGIPT(tiny_network(), steps=1, instance_sizes=(1,), global_sizes=(1, 3)),
    "guarded": lambda: MGIPT(tiny_network(), steps=1, instance_sizes=(1,), global_sizes=(3,), guard=Guard()),
    "vptta": lambda: VPTTA(tiny_network(), memory_size=3, neighbours=2),
    "sar": lambda: SAR(tiny_network(), margin=1.0),
    "cotta": lambda: CoTTA(tiny_network(), scales=(1.0,)),
}


def saved(make: Any, path: Path) -> AdaptationMethod:
    """Save a stream of two images with a snapshot, and return its method."""
    method = make()
    for image in stream(2):
        method(image)
    file = StreamFile(path, snapshot_every=1)
    state = {"adaptation": method.adaptation_state(), "position": 2, "site": "A"}
    file.snapshot(state)
    file.save(method, state)
    return method


def check_load(path: Path, method: AdaptationMethod, before: dict[str, Any]) -> bool:
    """Load a damaged file; whether it was refused, by name and without a trace."""
    refusal = None
    try:
        StreamFile(path).load(method)
    except (ValueError, FileNotFoundError) as error:
        refusal = str(error)
    if refusal is not None:
        assert str(path) in refusal
        assert same_state(method.adaptation_state(), before)
        return True
    # what was taken up can be saved, and taken up again
    state = method.adaptation_state()
    method.load_adaptation_state(state)
    assert same_state(method.adaptation_state(), state)
    assert all(torch.isfinite(tensor).all() for tensor in tensors_in(state))
    method.load_adaptation_state(before)
    return False


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from tensors_in(item)


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """Flip some bytes, cut some out, double some, or cut the end off."""
    data = bytearray(whole)
    kind = rng.integers(4)
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
    if kind == 0:
        for place in rng.integers(len(data), size=int(rng.integers(1, 8))):
            data[place] ^= int(rng.integers(1, 256))
    elif kind == 1:
        del data[at : at + length]
    elif kind == 2:
        data[at:at] = data[at : at + length]
    else:
        del data[at:]
    return bytes(data)


def odd_values(value: Any, rng: np.random.Generator) -> Any:
    """Return something that does not belong where ``value`` was, or hardly."""
    odd = [None, True, -1, 10**30, 0.5, math.nan, math.inf, -1e308, "", "text", b"bytes", [], {}, {"a": 1}, {3: [None]}]
    odd += [[1, "a"], [[torch.ones(2)]], torch.ones(()), torch.ones(2, 3), torch.zeros(0), (1, 2), {1, 2}]
    odd += [torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.complex64), [torch.ones(1, 3, 3, 3)]]
    if isinstance(value, torch.Tensor):
        odd += [
            value.double(),
            value.half(),
            value.long(),
            value[None],
            value.flatten(),
            value.flatten()[:0],
            value > 0,
        ]
        odd += [
            value * math.nan,
            value + math.inf,
            value.to_sparse(),
            value.to("meta"),
            value.numpy(force=True).tolist(),
        ]
    if isinstance(value, list):
        odd += [value[:-1], value * 2, value[::-1], [*value, None], tuple(value), dict(enumerate(value))]
    if isinstance(value, dict):
        odd += [list(value.values()), {str(k) + "x": v for k, v in value.items()}, {**value, 7: 7}]
    if isinstance(value, (int, float)):
        odd += [-value, str(value), torch.tensor(value), float(value), [value]]
    return odd[rng.integers(len(odd))]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within ``value`` with each of its keys."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutate(content: dict[str, Any], rng: np.random.Generator) -> None:
    """Change one entry, anywhere in the content: taken out, of another kind, or one more."""
    found = list(places(content))
    container, key = found[rng.integers(len(found))]
    kind = rng.integers(8)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container["unknown"] = odd_values(None, rng)
    else:
        container[key] = odd_values(container[key], rng)


@pytest.mark.parametrize("name", METHODS)
def test_state_file_of_damaged_bytes(name: str, tmp_path: Path) -> None:
    method, path = saved(METHODS[name], tmp_path / "s.pt"), tmp_path / "damaged.pt"
    before, whole, rng = method.adaptation_state(), (tmp_path / "s.pt").read_bytes(), np.random.default_rng(1)
    cases = 250 if name in ("mgipt", "guarded") else 60
    refused = 0
    for _ in range(cases):
        path.write_bytes(damaged(whole, rng))
        refused += check_load(path, method, before)
    assert refused > 0.5 * cases


def test_flipped_bit_in_a_prompt_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    method = saved(METHODS["mgipt"], path)
    number = method.adaptation_state()["teachers"][0].numpy().tobytes()
    whole = bytearray(path.read_bytes())
    whole[whole.index(number)] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"s\.pt is not a readable adaptation state \(.* is damaged\)"):
        StreamFile(path).load(method)


@pytest.mark.parametrize("name", METHODS)
def test_state_file_of_wrong_content(name: str, tmp_path: Path) -> None:
    method, path = saved(METHODS[name], tmp_path / "s.pt"), tmp_path / "damaged.pt"
    before, whole = method.adaptation_state(), torch.load(tmp_path / "s.pt", weights_only=True)
    rng, refused = np.random.default_rng(2), 0
    cases = 400 if name in ("mgipt", "guarded") else 150
    for _ in range(cases):
        content = copy.deepcopy(whole)
        mutate(content, rng)
        torch.save(content, path)
        refused += check_load(path, method, before)
    assert refused > 0.3 * cases


@pytest.mark.parametrize("name", METHODS)
def test_state_itself_of_wrong_content(name: str) -> None:
    method = METHODS[name]()
    for image in stream(2):
        method(image)
    before, rng = method.adaptation_state(), np.random.default_rng(3)
    for _ in range(150):
        state = copy.deepcopy(before)
        mutate(state, rng)
        try:
            method.load_adaptation_state(state)
        except ValueError:
            assert same_state(method.adaptation_state(), before)
        method.load_adaptation_state(before)


def image_files(folder: Path, rng: np.random.Generator) -> dict[str, bytes]:
    """One small image in each format, as the bytes of its file."""
    picture = rng.random((24, 24, 3))
    volume = nibabel.Nifti1Image(picture[:, :, None].astype("float32"), np.eye(4))
    png, jpeg = io.BytesIO(), io.BytesIO()
    Image.fromarray((255 * picture).astype("uint8")).save(png, "png")
    Image.fromarray((255 * picture).astype("uint8")).save(jpeg, "jpeg")
    files = {".png": png.getvalue(), ".jpg": jpeg.getvalue(), ".nii": volume.to_bytes()}
    return {**files, ".nii.gz": gzip.compress(files[".nii"])}


def damaged_images(folder: Path, count: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(4)
    files, items = image_files(folder, rng), []
    for i in range(count):
        ending = list(files)[i % len(files)]
        whole = files[ending]
        # half of all hits in the header, where they do most
        data = damaged(whole[:352], rng) + whole[352:] if i % 8 < 4 else damaged(whole, rng)
        path = folder / f"{i:03d}{ending}"
        path.write_bytes(data)
        items.append({"image": str(path), "name": path.name, "site": "A"})
    return items


@pytest.mark.filterwarnings("ignore")
def test_damaged_image_files_are_predicted_or_fail_without_a_trace(tmp_path: Path) -> None:
    method = MGIPT(tiny_network(), steps=1, instance_sizes=(1,), global_sizes=(3,), guard=Guard())
    transform = Compose(
        [
            LoadImaged("image", reader=["NibabelReader", "PILReader"]),
            EnsureChannelFirstd("image"),
            Lambdad("image", lambda image: image.squeeze(-1) if image.ndim > 3 else image),
            CheckImaged("image", channels=3),
            Resized("image", spatial_size=(24, 24)),
            ScaleIntensityd("image"),
        ]
    )
    items = damaged_images(tmp_path, 400)
    evaluator = StreamingAdaptationEvaluator(
        "cpu",
        DataLoader(StreamDataset(items, transform), batch_size=1),
        method.network,
        AdaptiveInferer(method),
        progress=False,
    )
    before, rows = [method.adaptation_state()], []

    def look(engine: Any) -> None:
        state = method.adaptation_state()
        rows.append(engine.state.record)
        if rows[-1]["status"] == "failed":
            assert same_state(state, before[0])
            assert rows[-1]["name"] in rows[-1]["reason"]
        else:
            assert state["images_seen"] == before[0]["images_seen"] + 1
        assert all(torch.isfinite(tensor).all() for tensor in tensors_in(state))
        before[0] = state

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, look)
    evaluator.add_event_handler(AdaptationEvents.IMAGE_FAILED, look)
    with pytest.raises(StreamFailedError):
        evaluator.run()
    assert len(rows) == len(items)
    assert 50 < sum(row["status"] == "failed" for row in rows) < 350
