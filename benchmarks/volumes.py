# SPDX-License-Identifier: Apache-2.0
"""Time and memory of volumes in sliding windows: plain, and with each method.

    python benchmarks/volumes.py --networks unet,segresnet,dynunet,swinunetr --sizes 128,160x160x128 --overlap 0.25

Volumes are synthetic, a body in air. Weights are random; batch norms store statistics of synthetic volumes, and
networks without batch norm get them as a file. Each row is a process of its own, which predicts one window twice to
warm up and then the volume, ``--repeats`` times, of which the fastest counts. ``settled`` is what ``steady`` costs
between two refreshes. Seconds are the processor's, so that other work on the machine counts little; F are passes of one
window; memory is the peak above what the process held before.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import monai
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import DynUNet, SegResNet, SwinUNETR, UNet
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.optim.swa_utils import update_bn

from mgipt_monai import MGIPT, SiteCorrection, Source, SourceStatistics, measure_source_statistics
from mgipt_monai.methods import AdaptationMethod
from mgipt_monai.networks import SiteStatistics
from mgipt_monai.networks.alignment.windows import Precision
from mgipt_monai.networks.look import FEWEST_IMAGES

CLASSES = 2


class Figures(NamedTuple):
    """What one volume takes: seconds, passes, and MiB above what the process held before."""

    seconds: float
    passes: int
    memory: float


def _dynunet() -> nn.Module:
    return DynUNet(3, 1, CLASSES, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=(16, 32, 64, 128), norm_name="instance")


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: UNet(3, 1, CLASSES, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch"),
    "segresnet": lambda: SegResNet(3, 8, 1, CLASSES, norm="batch"),
    "dynunet": _dynunet,
    "swinunetr": lambda: SwinUNETR(1, CLASSES, feature_size=12),
}
WITHOUT_BATCH_NORM = ("dynunet", "swinunetr")
METHODS: dict[str, Callable[..., AdaptationMethod]] = {
    "plain": Source,
    "steady": SiteCorrection,
    "settled": partial(SiteCorrection, site=SiteStatistics(horizon=2), refresh=1000),
    "fast": partial(MGIPT, steps=2, instance_sizes=(1,), global_sizes=(5,)),
    "MGIPT": MGIPT,
}


def volume(sides: Sequence[int], seed: int, gain: float = 1.0) -> Tensor:
    """Return a body with smooth contents and noise, in air, (1, 1, \\*sides); a smaller gain makes it darker."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in sides], indexing="ij")
    body = sum((axis / radius) ** 2 for axis, radius in zip(axes, (0.9, 0.8, 1.5), strict=True)) < 1
    coarse = torch.rand(1, 1, *[max(n // 12, 2) for n in sides], generator=generator)
    contents = interpolate(coarse, tuple(sides), mode="trilinear")
    return gain * (body * (0.3 + 0.6 * contents) + 0.1 * torch.rand(contents.shape, generator=generator))


def sliding(window: int, overlap: float, batch: int = 1) -> SlidingWindowInferer:
    """Return the inferer of all methods."""
    return SlidingWindowInferer([window] * 3, sw_batch_size=batch, overlap=overlap, mode="gaussian")


def prepare(network: str, window: int, folder: Path) -> None:
    """Write a network's random weights and, if it has no batch norm, its source statistics."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    update_bn([volume([window] * 3, seed) for seed in (1, 2)], model)
    torch.save(model.eval().state_dict(), folder / "weights.pt")
    if network in WITHOUT_BATCH_NORM:
        volumes = [volume([window] * 3, seed) for seed in range(1, FEWEST_IMAGES + 1)]
        measure_source_statistics(model, volumes).save(folder / "statistics.pt")


def build(network: str, method: str, inferer: SlidingWindowInferer, folder: Path) -> AdaptationMethod:
    """Return a method around a network with the weights of :func:`prepare`."""
    model = NETWORKS[network]()
    model.load_state_dict(torch.load(folder / "weights.pt"))
    needed = network in WITHOUT_BATCH_NORM and method != "plain"
    extra = {"statistics": SourceStatistics.load(folder / "statistics.pt")} if needed else {}
    built = METHODS[method](model, **extra)
    built.predict_through(inferer)
    return built


def figures(
    network: str,
    method: str,
    sides: Sequence[int],
    inferer: SlidingWindowInferer,
    folder: Path,
    repeats: int = 1,
    precision: Precision = "float32",
) -> Figures:
    """Predict one volume in this process, several times."""
    built = build(network, method, inferer, folder)
    built.compute_in(precision)
    run: Callable[[Tensor], Tensor] = built
    if method == "plain":  # the pipeline's own call, without this package
        alone = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")(built.network.forward)
        run = torch.no_grad()(lambda image: inferer(image, alone))
    image = volume(sides, seed=0, gain=0.7)
    first = image[(..., *[slice(int(side)) for side in inferer.roi_size])].clone()
    before = _status("VmRSS")
    for _ in range(2):
        run(first)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run(image)
        seconds.append(time.process_time() - start)
    memory = _status("VmHWM") - before
    if method == "plain":
        built(image)
    return Figures(min(seconds), built.last[0]["forwards"] + built.last[0]["backwards"], memory)


def _status(key: str) -> float:
    # not ru_maxrss, which a process inherits from its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def table(network: str, methods: Sequence[str], options: argparse.Namespace) -> Iterator[str]:
    """Measure one network and return the lines of its table, each as soon as it is measured."""
    yield (
        f"\n{network}, windows of {options.window} in batches of {options.batch}, overlap {options.overlap}, "
        f"{options.precision}, threads {options.threads}\n"
    )
    yield "| volume | windows | method | s | of plain | F | F per window | peak MiB | of plain |"
    yield "|---|--:|---|--:|--:|--:|--:|--:|--:|"
    with tempfile.TemporaryDirectory() as folder:
        prepare(network, options.window, Path(folder))
        for size in options.sizes.split(","):
            plain: Figures | None = None
            for method in methods:
                command = [sys.executable, __file__, "--one", network, method, size, folder]
                command += ["--window", str(options.window), "--overlap", str(options.overlap)]
                command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
                command += ["--batch", str(options.batch), "--precision", options.precision]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-3:]
                found = Figures(float(done[0]), int(done[1]), float(done[2]))
                plain = plain or found
                yield (
                    f"| {size} | {plain.passes} | {method} | {found.seconds:.2f} | {found.seconds / plain.seconds:.2f} "
                    f"| {found.passes} | {found.passes / plain.passes:.2f} "
                    f"| {found.memory:.0f} | {found.memory / plain.memory:.2f} |"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {"networks": NETWORKS, "methods": METHODS}
    for name, known in choices.items():
        text = f"comma-separated, from {', '.join(known)} (default %(default)s)"
        parser.add_argument(f"--{name}", default="unet" if name == "networks" else "plain,steady,fast", help=text)
    parser.add_argument("--sizes", default="128", help="such as 256,512x512x200 (default %(default)s)")
    parser.add_argument("--window", type=int, default=96, help="side of the windows (default %(default)s)")
    parser.add_argument("--overlap", type=float, default=0.25, help="of the windows (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="windows in a forward (default %(default)s)")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32", help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="number of threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="repeats of each method (default %(default)s)")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one:
        network, method, size, folder = options.one
        sides = [int(side) for side in size.split("x")]
        sides = sides if len(sides) == 3 else sides * 3
        inferer = sliding(options.window, options.overlap, options.batch)
        print(*figures(network, method, sides, inferer, Path(folder), options.repeats, options.precision))
        return
    for name, known in choices.items():
        if unknown := set(getattr(options, name).split(",")) - set(known):
            parser.error(f"no {name} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    print(f"{platform.machine()}, torch {torch.__version__}, MONAI {monai.__version__}")
    methods = ["plain", *(name for name in options.methods.split(",") if name != "plain")]
    for network in options.networks.split(","):
        for line in table(network, methods, options):
            print(line, flush=True)


if __name__ == "__main__":
    main()
