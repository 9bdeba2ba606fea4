# SPDX-License-Identifier: Apache-2.0
"""What was tried for the speed of the exact method: compiled passes, a coarse adjoint, kept weights, allocators.

    python benchmarks/last_factor.py --network unet --side 256 --trials weights,compile,adjoint,memory

The pass that is timed is what MGIPT repeats: a forward for the alignment loss and a backward to a prompt of side 5.

- ``weights``: with and without the weights' copies in the images' memory format (``FrozenConv``).
- ``compile``: the same pass, written with plain autograd, by ``torch.compile``. It needs a C++ compiler.
- ``adjoint``: how far the prompt's gradient moves if the features' gradient keeps only its lowest frequencies at the
  output of an early convolution, so that the layers before it could be differentiated at reduced resolution.
- ``memory``: MGIPT on one image in processes with other allocator settings; ``--preload`` names libraries to try.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mgipt_monai import MGIPT
from mgipt_monai.networks import AlignedNorms
from mgipt_monai.networks.prompts.frequency import LowFrequencies, prompt_offset

sys.path.insert(0, str(Path(__file__).parent))
from speed import NETWORKS, Size, loaded, synthetic, weights
from yardstick import _MeasuringNorm

SIDE = 5
ENVIRONMENTS = {
    "as it is": {},
    "memory kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"},
    "large pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "both": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000", "THP_MEM_ALLOC_ENABLE": "1"},
}


def fastest(call: Callable[[], object], repeats: int) -> float:
    """Return the processor's seconds of the fastest call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def gradient(loss: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of a prompted image, and its gradient with respect to the prompt."""
    prompt = torch.ones(1, image.shape[1], SIDE, SIDE, requires_grad=True)
    value = loss(LowFrequencies(image, SIDE, offset=prompt_offset(image, "auto")).apply(prompt)).sum()
    return value.detach(), torch.autograd.grad(value, prompt)[0]


def distance(one: Tensor, other: Tensor) -> float:
    """Return the relative distance of two gradients."""
    return ((one - other).norm() / other.norm()).item()


def try_weights(norms: AlignedNorms, image: Tensor, repeats: int) -> None:
    """Time the pass with and without copies of the weights, in turns."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for kept in times:
            norms.start(image)
            gradient(norms.loss, image)
            norms._layout.weights = norms._layout.weights if kept else None
            times[kept].append(fastest(lambda: gradient(norms.loss, image), 3))
    with_, without = min(times[True]), min(times[False])
    print(f"weights: {without:.4f} s as torch does it, {with_:.4f} s kept, {without / with_:.2f} times faster")


def try_compile(network: nn.Module, norms: AlignedNorms, image: Tensor, repeats: int) -> None:
    """Time the pass as it is and compiled, and compare loss and gradient."""
    layers: list[_MeasuringNorm] = []
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                layers.append(_MeasuringNorm(child))
                setattr(module, name, layers[-1])

    def loss(prompted: Tensor) -> Tensor:
        network(prompted)
        return torch.stack([layer.loss for layer in layers]).mean()

    found = gradient(norms.loss, image)
    plain = fastest(lambda: gradient(norms.loss, image), repeats)
    innermost = image.contiguous(memory_format=torch.channels_last)
    eager = fastest(lambda: gradient(loss, innermost), repeats)
    start = time.process_time()
    compiled = torch.compile(loss)
    made = gradient(compiled, innermost)
    once = time.process_time() - start
    took = fastest(lambda: gradient(compiled, innermost), repeats)
    print(
        f"compile: {plain:.4f} s as it is, {eager:.4f} s by autograd, {took:.4f} s compiled, after {once:.0f} s to "
        f"compile; loss off by {abs(made[0] - found[0]) / found[0]:.0e}, gradient by {distance(made[1], found[1]):.0e}"
    )


def low(features: Tensor, keep: int) -> Tensor:
    """Keep the frequencies up to ``keep`` along both axes of features (1, C, H, W)."""
    spectrum = torch.fft.rfft2(features)
    spectrum[..., keep + 1 : features.shape[2] - keep, :] = 0
    spectrum[..., keep + 1 :] = 0
    return torch.fft.irfft2(spectrum, s=features.shape[2:])


def try_adjoint(network: nn.Module, norms: AlignedNorms, image: Tensor) -> None:
    """Measure the error of the prompt's gradient with a coarse gradient at early convolutions."""
    _, exact = gradient(norms.loss, image)
    convolutions = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    for name, layer in convolutions[:4]:
        errors = []
        for keep in (2, 4, 8, 16, 32):

            def coarse(_layer: nn.Module, _inputs: object, output: Tensor, keep: int = keep) -> None:
                if output.requires_grad and keep < output.shape[-1] // 2:
                    output.register_hook(lambda slope: low(slope, keep))

            hook = layer.register_forward_hook(coarse)
            errors.append(f"{keep}: {distance(gradient(norms.loss, image)[1], exact):.1e}")
            hook.remove()
        print(f"adjoint: gradient's relative error by frequencies kept at the output of {name}: {', '.join(errors)}")


def try_memory(options: argparse.Namespace) -> None:
    """Time MGIPT in processes with other allocator settings."""
    preloads = {path: {"LD_PRELOAD": path} for path in options.preload.split(",") if path}
    for name, environment in {**ENVIRONMENTS, **preloads}.items():
        command = [sys.executable, __file__, "--network", options.network, "--side", str(options.side), "--one"]
        done = subprocess.run(
            [*command, "--repeats", str(options.repeats)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        print(f"memory: {name}: {done.stdout.strip()}", flush=True)


def one(size: Size, repeats: int) -> None:
    """Print what MGIPT takes for an image in this process."""
    state, image = weights(size), synthetic(size, 0, gain=0.7)
    method = MGIPT(loaded(size, state))
    method(image)
    took = fastest(lambda: method(image), repeats)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    print(f"{took:.3f} s/image, peak {peak:.0f} MiB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the trials with the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("resunet34", "unet"), default="unet", help="(default %(default)s)")
    parser.add_argument("--side", type=int, default=256, help="of the image (default %(default)s)")
    parser.add_argument("--trials", default="weights,compile,adjoint,memory", help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--preload", default="", help="comma-separated libraries, such as that of jemalloc")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = NETWORKS[options.network]._replace(spatial=(options.side, options.side))
    if options.one:
        one(size, options.repeats)
        return
    state, image = weights(size), synthetic(size, 0, gain=0.7)
    network = loaded(size, state).requires_grad_(False)
    norms = AlignedNorms(network)
    norms.start(image)
    trials = options.trials.split(",")
    if "weights" in trials:
        try_weights(norms, image, options.repeats)
    if "adjoint" in trials:
        try_adjoint(network, norms, image)
    if "compile" in trials:
        try_compile(loaded(size, state).requires_grad_(False), norms, image, options.repeats)
    if "memory" in trials:
        try_memory(options)


if __name__ == "__main__":
    main()
