# SPDX-License-Identifier: Apache-2.0
"""Runs thousands of images in one process, to find resources that grow with the stream.

    python benchmarks/soak.py --images 5000
    python benchmarks/soak.py --images 200 --volumes steady

With ``--volumes`` they are volumes of 48 x 48 x 48 in sliding windows of 32, through ``steady`` or ``fast``.
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
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet

from mgipt_monai import (
    MGIPT,
    AdaptationMethod,
    SiteCorrection,
    StreamingAdaptationEvaluator,
    TestTimeAdaptationHandler,
)

SIZE, SIDE = 64, 48


class Usage(NamedTuple):
    """Resources after a number of images: resident memory in MiB, descriptors, bytes of the state file."""

    images: int
    resident: float
    descriptors: int
    state_size: int


class Images(Dataset):
    """Random images of this shape, generated on access."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        super().__init__(range(count))
        self.shape = shape

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(index)
        return {"image": torch.rand(self.shape, generator=generator), "name": f"{index}", "site": f"{index % 3}"}


def soak(count: int, folder: Path, looks: int = 10, volumes: str | None = None) -> list[Usage]:
    """Run MGIPT over ``count`` images of three alternating sites, and measure the process ``looks`` times.

    With ``volumes`` they are volumes in windows, through site correction (``steady``) or MGIPT (``fast``).
    """
    torch.manual_seed(0)
    dims, channels = (3, 1) if volumes else (2, 3)
    network = UNet(dims, in_channels=channels, out_channels=2, channels=(4, 8), strides=(2,), norm="batch")
    method: AdaptationMethod = MGIPT(network, steps=1, instance_sizes=(1,), global_sizes=(3,))
    if volumes == "steady":
        method = SiteCorrection(network)
    state = folder / "state.pt"
    handler = TestTimeAdaptationHandler(method, state, folder / "records.jsonl", snapshot_every=5)
    images = Images(count, (1, *[SIDE] * 3) if volumes else (3, SIZE, SIZE))
    inferer = SlidingWindowInferer([32] * 3, sw_batch_size=2) if volumes else None
    evaluator = StreamingAdaptationEvaluator(
        "cpu", DataLoader(images), network, inferer=inferer, val_handlers=[handler], progress=False
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
    parser.add_argument("--volumes", choices=["steady", "fast"], help="volumes in windows, through this preset")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        usages = soak(options.images, Path(folder), volumes=options.volumes)
    print("| images | resident MiB | descriptors | state file bytes |", "|--:|--:|--:|--:|", sep="\n")
    for usage in usages:
        print(f"| {usage.images} | {usage.resident:.1f} | {usage.descriptors} | {usage.state_size} |")
    kind = f"volumes of side {SIDE}" if options.volumes else f"images of {SIZE} px"
    print(f"{options.images} {kind} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
