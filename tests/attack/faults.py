# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on request: a process that ends at an image, at a line of the program, or on a full disk."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from monai.data import DataLoader
from monai.transforms import Compose, MapTransform

from mgipt_monai import MGIPT, AdaptiveInferer, StreamingAdaptationEvaluator, TestTimeAdaptationHandler
from mgipt_monai.data import StreamDataset
from tests.conftest import stream, tiny_network

DIED = 9


class ExitAt(MapTransform):
    """End the process, as the system does when memory runs out, at the image whose file has this name."""

    def __init__(self, keys: str, name: str) -> None:
        super().__init__(keys)
        self.name = name

    def __call__(self, data: dict) -> dict:
        if Path(str(data["image"].meta["filename_or_obj"])).name.split(".")[0] == self.name:
            os._exit(DIED)
        return data


class Step:
    """A step of a pipeline of which nothing is known, so that a run with it and one without it are the same run."""

    def __init__(self, do: Callable[[dict], dict]) -> None:
        self.do = do

    def __call__(self, data: dict) -> dict:
        return self.do(data)


def in_child(work: Callable[..., Any], *arguments: Any) -> int:
    """Do some work in a forked process; return its exit status."""
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(work, arguments))
    child.start()
    child.join(120)
    if child.exitcode is None:
        child.kill()
        raise AssertionError("the process does not end")
    return child.exitcode


def _in_child(work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    work(*arguments)


def exit_at_line(count: int, files: Iterable[str]) -> None:
    """End this process at the count-th line from now on that is executed in one of these files of the package."""
    names, left = tuple(files), [count]

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(names):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] <= 0:
                os._exit(DIED)
        return trace

    sys.settrace(trace)


def items(count: int, sites: str = "A") -> list[dict]:
    """Images in memory, of one site after another."""
    return [
        {"pixels": image[0], "name": f"{i}", "site": sites[i * len(sites) // count]}
        for i, image in enumerate(stream(count))
    ]


def take(item: dict) -> dict:
    """Load an image of :func:`items`."""
    return {"image": item["pixels"], **{key: item[key] for key in ("name", "site")}} if "pixels" in item else item


def build(
    folder: Path,
    data: list[dict],
    transform: Callable | None = None,
    workers: int = 0,
    postprocessing: Callable | None = None,
    **settings: Any,
) -> tuple[MGIPT, StreamingAdaptationEvaluator]:
    """Return a method and an evaluator with a handler that keeps its files in a folder."""
    method = MGIPT(tiny_network(), steps=1, instance_sizes=(1,), global_sizes=(3,))
    handler = TestTimeAdaptationHandler(method, folder / "state.pt", folder / "records.jsonl", **settings)
    loader = DataLoader(
        StreamDataset(data, Compose([take, *([transform] if transform else [])])), batch_size=1, num_workers=workers
    )
    evaluator = StreamingAdaptationEvaluator(
        "cpu",
        loader,
        method.network,
        AdaptiveInferer(method),
        postprocessing=postprocessing,
        val_handlers=[handler],
        progress=False,
    )
    return method, evaluator
