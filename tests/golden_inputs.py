# SPDX-License-Identifier: Apache-2.0
"""Inputs of the golden runs: a tiny network and a stream of images, both from numpy's PCG64 alone.

network(seed)            the segmentation network of run `seed`, in eval mode
image(1000 * seed + i)   image i of run `seed`, shape (1, 3, 512, 512), 8-bit steps in [0, 1]
jitter(x)                the photometric jitter of every consistency check in the golden runs
"""

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import nn


def network(seed: int, in_channels: int = 3, out_channels: int = 2, width: int = 8) -> nn.Sequential:
    """conv-bn-relu, strided conv-bn-relu, transposed conv-bn-relu, 1x1 head (two sigmoid channels)."""
    rng = np.random.default_rng(seed)
    net = nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, width, 2, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, out_channels, 1),
    )
    for key, value in net.state_dict().items():
        if value.dtype != torch.float32:
            continue
        draw = rng.standard_normal(value.shape).astype(np.float32)
        if key.endswith("running_var"):
            draw = 0.3 + draw**2 * 0.5
        elif key in ("1.weight", "4.weight", "7.weight"):
            draw = 1 + 0.2 * draw
        else:
            draw = 0.3 * draw
        value.copy_(torch.from_numpy(draw.astype(np.float32)))
    return net.eval()


def image(seed: int, size: int = 512, channels: int = 3) -> torch.Tensor:
    """A smooth coloured field with a disc and noise."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32) / size
    im = np.empty((channels, size, size), np.float32)
    cy, cx, r = 0.4 + 0.2 * rng.random(), 0.4 + 0.2 * rng.random(), 0.15 + 0.1 * rng.random()
    for c in range(channels):
        a = rng.standard_normal(6).astype(np.float32)
        wave = a[0] * xx + a[1] * yy + a[2] * np.sin(6 * xx + a[3]) * np.cos(5 * yy + a[4])
        im[c] = wave + 1.5 * (((yy - cy) ** 2 + (xx - cx) ** 2) < r * r) * a[5]
    im += 0.2 * rng.standard_normal(im.shape).astype(np.float32)
    im = (im - im.min()) / (im.max() - im.min())
    return torch.from_numpy((np.round(im * 255) / 255).astype(np.float32))[None]


def jitter(x: torch.Tensor) -> torch.Tensor:
    """Brightness 1.1 then contrast 0.85, on the 8-bit image ((x * 255) truncated to uint8), back to [0, 1]."""
    eight_bit = (x[0].numpy().transpose(1, 2, 0) * 255).astype("uint8")
    out = ImageEnhance.Contrast(ImageEnhance.Brightness(Image.fromarray(eight_bit)).enhance(1.1)).enhance(0.85)
    return torch.from_numpy(np.asarray(out).transpose(2, 0, 1).copy()).float()[None] / 255


def fill(net: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Overwrite every floating parameter and buffer of `net`, in sorted key order, from one PCG64 stream."""
    rng = np.random.default_rng(seed)
    state = net.state_dict()
    for key in sorted(state):
        value = state[key]
        if not value.is_floating_point():
            continue
        draw = rng.standard_normal(tuple(value.shape)).astype(np.float32)
        if key.endswith("running_var"):
            draw = 1 + 0.1 * draw**2
        elif value.ndim > 1:
            draw = draw * np.float32(gain * np.sqrt(2 / np.prod(value.shape[1:])))
        elif key.endswith("weight"):
            draw = 1 + 0.1 * draw
        else:
            draw = 0.1 * draw
        value.copy_(torch.from_numpy(np.ascontiguousarray(draw)))
    return net.eval()
