# SPDX-License-Identifier: Apache-2.0
"""Time and memory per image: MGIPT in this package, MGIPT as published, and other methods.

    python benchmarks/speed.py --networks resunet34,unet,unet3d --threads 1,2 --repeats 2

Weights are random, with batch-norm statistics measured on synthetic images. The methods run in turns on one image in
one process, with a new object each time; the fastest of the repeats is printed. Peak memory is measured in a separate
process.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import monai
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.optim.swa_utils import update_bn

from mgipt_monai import MGIPT, VPTTA, SiteCorrection
from mgipt_monai.networks import ResUNet

sys.path.insert(0, str(Path(__file__).parent))
from yardstick import Yardstick

Method = Callable[[Tensor], Tensor]


class Size(NamedTuple):
    """A network and the size of its images."""

    build: Callable[[], nn.Module]
    channels: int
    spatial: tuple[int, ...]


def unet(dims: int, in_channels: int) -> nn.Module:
    """Return MONAI's U-Net with residual units."""
    channels, strides = (16, 32, 64, 128, 256), (2, 2, 2, 2)
    return UNet(dims, in_channels, 2, channels=channels, strides=strides, num_res_units=2, norm="batch")


NETWORKS = {
    "resunet34": Size(ResUNet, 3, (512, 512)),
    "unet": Size(lambda: unet(2, 3), 3, (256, 256)),
    "unet3d": Size(lambda: unet(3, 1), 1, (64, 64, 64)),
}
METHODS: dict[str, Callable[[nn.Module], Method]] = {
    "(a) as published": Yardstick,
    "(b) MGIPT": MGIPT,
    "(c) fast": partial(MGIPT, steps=2, instance_sizes=(1,), global_sizes=(5,)),
    "(c) steady": SiteCorrection,
    "(d) VPTTA": VPTTA,
    "(e) plain forward": lambda network: network.eval().requires_grad_(False),
}
YARDSTICK, EXACT, *_, PLAIN = METHODS


def synthetic(size: Size, seed: int, gain: float = 1.0) -> Tensor:
    """Return a smooth field with noise (1, C, \\*spatial); a smaller gain makes it darker."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, size.channels, *[8] * len(size.spatial), generator=generator)
    field = interpolate(coarse, size.spatial, mode="bilinear" if len(size.spatial) == 2 else "trilinear")
    return gain * (0.9 * field + 0.1 * torch.rand(field.shape, generator=generator))


def weights(size: Size) -> dict[str, Tensor]:
    """Return random weights with batch-norm statistics of synthetic images."""
    torch.manual_seed(0)
    network = size.build()
    update_bn([synthetic(size, seed) for seed in range(1, 4)], network)
    return network.state_dict()


def seconds(call: Callable[[], object], device: str) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def turns(size: Size, state: dict[str, Tensor], repeats: int, device: str) -> tuple[dict[str, float], str]:
    """Run the methods in turns; return the fastest time of each, and how well (a) and (b) agree."""
    image = synthetic(size, 0, gain=0.7).to(device)
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        logits, made = {}, {}
        for name, build in METHODS.items():
            made[name] = build(loaded(size, state).to(device))
            # a plain forward pass is short, so its time varies more
            for _ in range(5 if name == PLAIN else 1):
                with torch.set_grad_enabled(name != PLAIN):
                    times[name].append(seconds(lambda: logits.update({name: made[name](image)}), device))  # noqa: B023
    difference = (logits[YARDSTICK] - logits[EXACT]).abs().max().item()
    sizes = made[YARDSTICK].instance_size, made[EXACT].last[0]["instance_size"]
    record = made[EXACT].last[0]
    return {name: min(each) for name, each in times.items()}, (
        f"(a) and (b): logits up to {logits[YARDSTICK].abs().max():.2f} differ by at most {difference:.0e}, "
        f"chosen sizes {sizes[0]} and {sizes[1]}. "
        f"(b) takes {record['forwards']} forward and {record['backwards']} backward passes."
    )


def loaded(size: Size, state: dict[str, Tensor]) -> nn.Module:
    """Return the network with the weights."""
    network = size.build()
    network.load_state_dict(state)
    return network.eval()


def peak(network: str, method: str, path: str, device: str) -> tuple[float, float]:
    """Return the peak memory of this process in MiB for one image, and its memory before the image."""
    size = NETWORKS[network]
    adapt = METHODS[method](loaded(size, torch.load(path, mmap=True)).to(device))
    image = synthetic(size, 0, gain=0.7).to(device)
    before = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else _status("VmRSS")
    with torch.set_grad_enabled(method != PLAIN):
        adapt(image)
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status("VmHWM"), before


def _status(key: str) -> float:
    # not ru_maxrss, which a process inherits from its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def table(name: str, threads: int, repeats: int, device: str) -> str:
    """Measure one network and return its table."""
    torch.set_num_threads(threads)
    size = NETWORKS[name]
    state = weights(size)
    times, agreement = turns(size, state, repeats, device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, path := f"{folder}/weights.pt")
        for method, time_ in times.items():
            command = [sys.executable, __file__, "--threads", str(threads), "--peak", name, method, path, device]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            most, before = map(float, done.stdout.split())
            rows.append((method, time_, most, most - before))
    first, plain = rows[0], times[PLAIN]
    where = "GPU" if device == "cuda" else f"{threads} thread{'s' if threads > 1 else ''}"
    lines = [
        f"\n{name}, {' x '.join(map(str, size.spatial))}, {where}, fastest of {repeats}\n",
        "| method | s/image | faster than (a) | plain forwards | peak MiB | of (a) | for the image MiB | of (a) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for method, time_, most, own in rows:
        lines.append(
            f"| {method} | {time_:.3f} | {first[1] / time_:.2f} | {time_ / plain:.1f} "
            f"| {most:.0f} | {most / first[2]:.0%} | {own:.0f} | {own / first[3]:.0%} |"
        )
    return "\n".join([*lines, "", agreement])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", default="unet", help=f"comma-separated, from {', '.join(NETWORKS)} (default %(default)s)"
    )
    parser.add_argument("--threads", default="1,2", help="comma-separated numbers of threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each method (default %(default)s)")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.networks.split(",")) - set(NETWORKS):
        parser.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    if options.peak:
        torch.set_num_threads(int(options.threads))
        print(*peak(*options.peak))
        return
    print(f"{platform.machine()}, torch {torch.__version__}, MONAI {monai.__version__}")
    for name in options.networks.split(","):
        for threads in map(int, options.threads.split(",")):
            print(table(name, threads, options.repeats, "cpu"), flush=True)
        if torch.cuda.is_available():
            print(table(name, 1, options.repeats, "cuda"), flush=True)


if __name__ == "__main__":
    main()
