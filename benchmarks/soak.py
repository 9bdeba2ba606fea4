# SPDX-License-Identifier: Apache-2.0
"""Runs thousands of images in one process, to find resources that grow with the stream.

    python benchmarks/soak.py --images 5000

Prints resident memory, open file descriptors and the size of the state file after every tenth of the stream.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.networks.nets import UNet

from mgipt_monai import MGIPT, StreamingAdaptationEvaluator, TestTimeAdaptationHandler

SIZE = 64


class Usage(NamedTuple):
    """Resources after a number of images: resident memory in MiB, descriptors, bytes of the state file."""

    images: int
    resident: float
    descriptors: int
    state_size: int


class Images(Dataset):
    """Random images of 64 px, generated on access."""

    def __init__(self, count: int) -> None:
        super().__init__(range(count))

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(index)
        return {"image": torch.rand(3, SIZE, SIZE, generator=generator), "name": f"{index}", "site": f"{index % 3}"}


def soak(count: int, folder: Path, looks: int = 10) -> list[Usage]:
    """Run MGIPT over ``count`` images of three alternating sites, and measure the process ``looks`` times."""
    torch.manual_seed(0)
    network = UNet(2, in_channels=3, out_channels=2, channels=(4, 8), strides=(2,), norm="batch")
    method = MGIPT(network, steps=1, instance_sizes=(1,), global_sizes=(3,))
    state = folder / "state.pt"
    handler = TestTimeAdaptationHandler(method, state, folder / "records.jsonl", snapshot_every=5)
    evaluator = StreamingAdaptationEvaluator(
        "cpu", DataLoader(Images(count)), network, val_handlers=[handler], progress=False
    )
    usages: list[Usage] = []

    def look(engine: Engine) -> None:
        done = engine.state.iteration
        if done % max(count // looks, 1) == 0:
            usages.append(Usage(done, resident_memory(), len(list(_descriptors())), state.stat().st_size))

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, look)
    evaluator.run()
    return usages


def resident_memory() -> float:
    """Return the resident memory of this process in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _descriptors() -> Iterator[Path]:
    return Path("/proc/self/fd").iterdir()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="number of images (default %(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        usages = soak(options.images, Path(folder))
    print("| images | resident MiB | descriptors | state file bytes |", "|--:|--:|--:|--:|", sep="\n")
    for usage in usages:
        print(f"| {usage.images} | {usage.resident:.1f} | {usage.descriptors} | {usage.state_size} |")
    print(f"{options.images} images of {SIZE} px in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
