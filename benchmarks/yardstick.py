# SPDX-License-Identifier: Apache-2.0
"""A direct implementation of MGIPT from the paper, as reference for the speed and results of ``mgipt_monai.MGIPT``.

It is not optimised: a full Fourier transform per prompted image with separate amplitude and phase; unused gradients of
the network weights; normalisation replaced layer by layer and differentiated by autograd; prompts and views one after
the other; and graphs that are kept in the checks, which need no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from monai.losses import DiceLoss
from monai.transforms import Randomizable
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from mgipt_monai.networks import PhotometricJitter

LR, BETAS, DECAY, SOURCE_WEIGHT = 0.05, (0.9, 0.99), 0.1, 0.8


class _MeasuringNorm(nn.Module):
    """Replaces a batch norm and measures the alignment loss."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm, self.normalization, self.loss = norm, "instance", torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        space, shape = tuple(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        source_mean, source_std = self.norm.running_mean.view(shape), self.norm.running_var.sqrt().view(shape)
        mean, std = x.mean(space, keepdim=True), x.std(space, keepdim=True)
        self.loss = (source_mean - mean).abs().mean() + (source_std - std).abs().mean()
        variance = std**2
        if self.normalization == "calibrated":
            mean = SOURCE_WEIGHT * source_mean + (1 - SOURCE_WEIGHT) * mean
            variance = SOURCE_WEIGHT * source_std**2 + (1 - SOURCE_WEIGHT) * variance
        normalised = (x - mean) / (variance + self.norm.eps).sqrt()
        return normalised * self.norm.weight.view(shape) + self.norm.bias.view(shape)


class Yardstick:
    """MGIPT, called with the images (1, C, \\*spatial) of a stream one by one.

    Args:
        network: the source network with batch norm; it is copied.
        tuning: how the network normalises while prompts are tuned, and in the checks of ``released``: ``instance`` for
            the first image and ``calibrated`` from then on. The checks of ``instance`` are ``calibrated``.
        steps: steps per size of the instance prompt.
        instance_sizes: sides of the instance prompt.
        global_sizes: sides of the global prompts.
        jitter: transform of the consistency check, seeded as in ``mgipt_monai.MGIPT`` with seed 0.

    Attributes:
        instance_size: chosen side for the latest image.
    """

    def __init__(
        self,
        network: nn.Module,
        tuning: Literal["instance", "released"] = "instance",
        steps: int = 7,
        instance_sizes: Sequence[int] = (1, 3, 5),
        global_sizes: Sequence[int] = (3, 5, 7),
        jitter: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(True)
        self.norms = [_replaced(self.network, name) for name in _batch_norms(self.network)]
        self.tuning, self.steps = tuning, steps
        self.instance_sizes, self.global_sizes = instance_sizes, global_sizes
        self.jitter = PhotometricJitter() if jitter is None else jitter
        self.students: list[Tensor] = []
        self.teachers: list[Tensor] = []
        self.images_seen = self.instance_size = 0

    def __call__(self, image: Tensor) -> Tensor:
        """Adapt to the image and return its logits (1, K, \\*spatial)."""
        if isinstance(self.jitter, Randomizable):
            seed = np.random.SeedSequence((0, self.images_seen)).generate_state(1)[0]
            self.jitter.set_random_state(seed=int(seed))
        if not self.students:
            shapes = [(1, image.shape[1], *[size] * (image.ndim - 2)) for size in self.global_sizes]
            self.students = [torch.ones(shape, device=image.device) for shape in shapes]
            self.teachers = [student.clone() for student in self.students]
        centred = self.tuning != "released"
        first = self.tuning == "released" and self.images_seen == 0
        tuning = "instance" if first or centred else "calibrated"

        self._normalize(tuning)
        for i, student in enumerate(self.students):
            self.students[i] = self._tuned(image, student, 1, centred=centred)
            self.teachers[i] = DECAY * self.teachers[i] + (1 - DECAY) * self.students[i]
        instance = self._instance_prompt(image, tuning)

        self._normalize("calibrated")
        with torch.no_grad():
            views = [_prompted(image, instance), *(_prompted(image, teacher, centred) for teacher in self.teachers)]
            logits = [self.network(view) for view in views]
            confidences = [self._confidence(each) for each in logits]
            factors = [2.0, *[0.5] * len(self.teachers)]
            fused = sum(
                factor * confidence / sum(confidences) * each
                for factor, confidence, each in zip(factors, confidences, logits, strict=True)
            )
        self.images_seen += 1
        return fused

    def _instance_prompt(self, image: Tensor, tuning: str) -> Tensor:
        previous, score = torch.ones(()), float("inf")
        for size in self.instance_sizes:
            prompt = torch.ones(1, image.shape[1], *[size] * (image.ndim - 2), device=image.device)
            ring = torch.ones_like(prompt)
            if previous.ndim:
                margin = [(size - previous.shape[-1]) // 2] * (2 * (image.ndim - 2))
                prompt = functional.pad(previous, margin, value=1.0)
                ring = functional.pad(torch.zeros_like(previous), margin, value=1.0)
            self._normalize(tuning)
            prompt = self._tuned(image, prompt, self.steps, ring)
            self._normalize(tuning if self.tuning == "released" else "calibrated")
            distance = self._inconsistency(image, prompt)
            if score < distance:
                return previous
            previous, score, self.instance_size = prompt, distance, size
        return previous

    def _tuned(
        self, image: Tensor, prompt: Tensor, steps: int, ring: Tensor | None = None, centred: bool = True
    ) -> Tensor:
        prompt = prompt.clone().requires_grad_()
        adam = torch.optim.Adam([prompt], lr=LR, betas=BETAS)
        for _ in range(steps):
            self.network(_prompted(image, prompt, centred))
            loss = sum(norm.loss for norm in self.norms) / len(self.norms)
            loss.backward()
            if ring is not None:
                prompt.grad *= ring
            adam.step()
            adam.zero_grad()
            self.network.zero_grad()
        return prompt.detach()

    def _inconsistency(self, image: Tensor, prompt: Tensor) -> float:
        prediction = self.network(_prompted(image, prompt))
        jittered = self.network(_prompted(self.jitter(image), prompt))
        masks = [(logits.sigmoid() > 0.5).float().flatten(1)[:, None] for logits in (prediction, jittered)]
        return float(DiceLoss(smooth_nr=1e-5, smooth_dr=1e-5)(*masks))

    def _confidence(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 1 and self.tuning != "released":
            return torch.maximum(logits.sigmoid(), 1 - logits.sigmoid())
        return logits.softmax(dim=1).amax(dim=1, keepdim=True)

    def _normalize(self, normalization: str) -> None:
        for norm in self.norms:
            norm.normalization = normalization


def _prompted(image: Tensor, prompt: Tensor, centred: bool = True) -> Tensor:
    """Multiply the amplitudes of the lowest frequencies and transform back (Eq. 1)."""
    axes, side = tuple(range(2, image.ndim)), prompt.shape[-1]
    spectrum = torch.fft.fftshift(torch.fft.fftn(image, dim=axes), dim=axes)
    # after the shift the zero frequency is at n // 2
    first = [n // 2 - (side // 2 if centred else (side + 1) // 2) for n in image.shape[2:]]
    margin = [part for f, n in zip(first, image.shape[2:], strict=True) for part in (n - f - side, f)][::-1]
    amplitude = spectrum.abs() * functional.pad(prompt, margin, value=1.0)
    phase = spectrum.angle()
    spectrum = torch.complex(amplitude * phase.cos(), amplitude * phase.sin())
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=axes), dim=axes).real


def _batch_norms(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]


def _replaced(network: nn.Module, name: str) -> _MeasuringNorm:
    """Replace a batch norm with a measuring norm, and return it."""
    *path, last = name.split(".")
    parent = network.get_submodule(".".join(path))
    setattr(parent, last, _MeasuringNorm(getattr(parent, last)))
    return getattr(parent, last)
