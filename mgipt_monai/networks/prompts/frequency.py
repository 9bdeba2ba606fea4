# SPDX-License-Identifier: Apache-2.0
"""Low-frequency amplitude prompts (Eq. 1), exact and without a full Fourier transform.

A prompt multiplies the amplitudes of an image's ``side ** d`` lowest frequencies and keeps their phases. A real factor
on the amplitude is the same factor on the complex coefficient, so the prompted image is the image plus the inverse
transform of ``(prompt - 1) * coefficients``: one thin matrix product per axis.

The zero frequency is the image's mean. Z-scored images have none, so a factor on it would do nothing. An offset
(:func:`prompt_offset`) is therefore added before the amplitudes are multiplied and subtracted afterwards, which is the
same as adding it to the coefficient of the zero frequency alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mgipt_monai.utils.state_checks import is_whole

__all__ = ["FrequencyPrompt", "LowFrequencies", "Offset", "prompt_offset"]

Offset = Literal["auto", "none"] | float
"""What a prompt adds before it multiplies and subtracts again, see :func:`prompt_offset`."""

MOST_DEVIATIONS = 3.0
"""With ``auto``, bound on the offset image's mean in standard deviations, so that one dark voxel decides little."""


@lru_cache(maxsize=256)
def _dft_rows(size: int, side: int, centred: bool, device: torch.device) -> Tensor:
    """Return the ``side`` lowest rows of the DFT matrix of ``size`` points, complex64, shape (side, size)."""
    first = -(side // 2) if centred else -((side + 1) // 2)
    frequencies = torch.arange(first, first + side, dtype=torch.int64)
    # the exponent is reduced modulo the size in integers, so that large images lose no precision
    turns = (frequencies[:, None] * torch.arange(size)[None, :]) % size
    angle = turns.double() * (-2 * math.pi / size)
    # a tensor created in inference_mode could not be used in a backward pass
    with torch.inference_mode(False):
        return torch.complex(angle.cos(), angle.sin()).to(torch.complex64).to(device)


def short_axis(image: Tensor, side: int) -> int | None:
    """Return the axis along which a volume (B, C, \\*spatial) is thinner than a prompt, such as a stack of few slices.

    Raises:
        ValueError: if the image is smaller than the prompt in another way, as a photograph or along several axes.
    """
    short = [axis for axis, size in enumerate(image.shape) if axis > 1 and size < side]
    if len(short) > 1 or (short and image.ndim < 5):
        raise ValueError(
            f"an image of {'x'.join(map(str, image.shape[2:]))} is smaller than a prompt of side {side}: "
            "use a larger image or smaller prompt sizes"
        )
    return short[0] if short else None


def check_offset(offset: Offset) -> Offset | None:
    """Return the setting, None for ``none``, which keeps it out of states and settings as before there were offsets.

    Raises:
        ValueError: unless it is ``auto``, ``none`` or a finite number from 0.
    """
    if offset in ("auto", "none"):
        return None if offset == "none" else offset
    if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not 0 <= offset < math.inf:
        raise ValueError(f"offset must be auto, none or a number of standard deviations from 0, got {offset!r}")
    return float(offset)


def prompt_offset(image: Tensor, offset: Offset | None = "auto") -> Tensor:
    """Return what is added to each image and channel before its amplitudes are multiplied, and subtracted afterwards.

    With ``auto`` the darkest value counts as zero, as it did before the image was normalised: the offset is minus the
    channel's minimum, but at most so much that the mean becomes 3 standard deviations. Where no value is below zero
    (photographs, images scaled to [0, 1]) it is exactly zero. It depends on the image alone, and changes steadily
    with it.

    Args:
        image: (B, C, \\*spatial).
        offset: ``auto``, ``none`` or None for zero, or a number of the channel's standard deviations.

    Returns:
        One number per image and channel, (B, C).

    Example:
        >>> image = torch.tensor([[[0.0, 1.0], [-1.0, 1.0]]])  # one image with two channels
        >>> prompt_offset(image).tolist()
        [[0.0, 1.0]]
    """
    values = image.flatten(2)
    if offset in (None, "none"):
        return values.new_zeros(values.shape[:2])
    std = values.std(dim=2, correction=0)
    if isinstance(offset, (int, float)):
        return offset * std
    # not negative zero, which records would show
    return torch.minimum(-values.amin(dim=2), MOST_DEVIATIONS * std - values.mean(dim=2)).clamp(min=0) + 0.0


class LowFrequencies:
    """The lowest frequencies of a batch of images, computed once for any number of prompts.

    Args:
        image: float tensor (B, C, \\*spatial), any number of spatial axes, any value range.
        side: number of frequencies per spatial axis; at most the shortest spatial side.
        centred: whether the block is centred on the zero frequency (``-(side // 2) .. side - 1 - side // 2``) or, as in
            the released code's global prompts, one step lower (for odd sides only; even sides are the same in both).
        offset: added to the images before the amplitudes are multiplied and subtracted afterwards, (B, C), see
            :func:`prompt_offset`; None adds nothing.
        channels: the channels that prompts act on; None for all. Others, such as clicks or guidance, do not change.

    A volume may be thinner than the prompt along one axis. Of that axis only the zero frequency is used, and the rest
    of the prompt does nothing.

    Raises:
        ValueError: if the image is otherwise smaller than the prompt, or lacks one of the channels.

    Example:
        >>> image = torch.rand(1, 3, 32, 48)
        >>> low = LowFrequencies(image, side=5)
        >>> torch.equal(low.apply(torch.ones(1, 3, 5, 5)), image)
        True
    """

    def __init__(
        self,
        image: Tensor,
        side: int,
        centred: bool = True,
        offset: Tensor | None = None,
        channels: Sequence[int] | None = None,
    ) -> None:
        spatial = image.shape[2:]
        self.short = short_axis(image, side)
        self.image, self.shape = image, (image.shape[1], *[side] * len(spatial))
        self.zero = side // 2 if centred else (side + 1) // 2
        self.rows = [
            _dft_rows(n, 1 if axis == self.short else side, centred or axis == self.short, image.device)
            for axis, n in enumerate(spatial, start=2)
        ]
        coefficients = image.to(torch.complex64)
        for axis, rows in enumerate(self.rows, start=2):
            coefficients = torch.tensordot(coefficients, rows, dims=([axis], [1])).movedim(-1, axis)
        self.coefficients = coefficients / math.prod(spatial)
        if offset is not None and self.zero < side:  # a block of side 1 that is not centred lacks the zero frequency
            place: list[Any] = [slice(None), slice(None), *[self.zero] * len(spatial)]
            if self.short is not None:
                place[self.short] = 0
            self.coefficients[tuple(place)] += offset
        if channels is not None:
            if max(channels) >= image.shape[1]:
                raise ValueError(f"the image has {image.shape[1]} channels, none of number {max(channels)} to prompt")
            exempt = [channel for channel in range(image.shape[1]) if channel not in channels]
            self.coefficients[:, exempt] = 0

    def apply(self, prompt: Tensor) -> Tensor:
        """Multiply the amplitudes of the low frequencies.

        Args:
            prompt: real multipliers (N, C, side, ...), with N the number of images, or any N for a single image; the
                zero frequency is in the middle (index ``side // 2`` of each axis if centred).

        Returns:
            Prompted images (N, C, \\*spatial), differentiable with respect to the prompt.

        Raises:
            ValueError: if the prompt's channels, sides or axes do not match the image's block.
        """
        if prompt.shape[1:] != self.shape:
            raise ValueError(
                f"a prompt of shape {tuple(prompt.shape)} does not fit an image of shape {tuple(self.image.shape)}"
            )
        if self.short is not None:
            prompt = prompt.narrow(self.short, self.zero, 1)
        change = (prompt - 1) * self.coefficients
        for axis, rows in enumerate(self.rows[:-1], start=2):
            change = torch.tensordot(change, rows.conj(), dims=([axis], [0])).movedim(-1, axis)
        last = self.rows[-1]
        # only the real part is needed, so the last and largest product uses real numbers
        real = torch.cat([change.real, change.imag], dim=-1) @ torch.cat([last.real, last.imag], dim=0)
        return self.image + real


class FrequencyPrompt(nn.Module):
    """A trainable low-frequency amplitude prompt for images of any size (Eq. 1).

    Args:
        spatial_dims: number of spatial axes.
        in_channels: channels of the image.
        side: frequencies per spatial axis; the prompt has ``in_channels * side ** spatial_dims`` numbers.
        centred: see :class:`LowFrequencies`.
        offset: see :func:`prompt_offset`.

    Raises:
        ValueError: if a count is below one, or the offset is unknown.

    Example:
        >>> prompt = FrequencyPrompt(spatial_dims=2, in_channels=3, side=5)
        >>> image = torch.rand(1, 3, 64, 64)
        >>> torch.equal(prompt(image), image)  # all ones change nothing
        True
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, side: int, centred: bool = True, offset: Offset = "auto"
    ) -> None:
        super().__init__()
        for name, value in (("spatial_dims", spatial_dims), ("in_channels", in_channels), ("side", side)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.side = side
        self.centred = centred
        self.offset = check_offset(offset)
        self.amplitude = nn.Parameter(torch.ones(1, in_channels, *[side] * spatial_dims))

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"channels={self.amplitude.shape[1]}, side={self.side}, centred={self.centred}, offset={self.offset}"

    def forward(self, image: Tensor) -> Tensor:
        """Return the prompted image, same shape as ``image`` (B, C, \\*spatial)."""
        offset = prompt_offset(image, self.offset)
        return LowFrequencies(image, self.side, self.centred, offset).apply(self.amplitude)


def loss_gradients(
    loss: Callable[[Tensor], Tensor], prompted: Tensor, *prompts: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the per-image losses of prompted images and their gradients with respect to the prompts alone."""
    losses = loss(prompted)
    return losses.detach(), torch.autograd.grad(losses.sum(), prompts)


def check_tuning(*values: Tensor) -> None:
    """Raise FloatingPointError unless all values of the tuning are finite; this waits for the device once."""
    if not torch.cat([value.flatten() for value in values]).isfinite().all():
        raise FloatingPointError("the alignment loss or its gradient is not finite: check the image and the network")


def check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes as a tuple; raise ValueError unless they are different whole numbers from 1."""
    if any(not is_whole(size) or size < 1 for size in sizes) or len(set(sizes)) != len(sizes):
        raise ValueError(f"{name} must be different whole numbers from 1, got {tuple(sizes)}")
    return tuple(int(size) for size in sizes)


def check_channels(channels: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the channels that a prompt acts on; raise ValueError unless they are different whole numbers from 0."""
    if channels is None:
        return None
    if not channels or any(not is_whole(one) or one < 0 for one in channels) or len(set(channels)) != len(channels):
        raise ValueError(f"prompted channels must be different whole numbers from 0, got {tuple(channels)}")
    return tuple(int(one) for one in channels)


def check_step(lr: float, betas: Sequence[float]) -> tuple[float, float]:
    """Return Adam's betas; raise ValueError unless the learning rate is positive and they are in [0, 1)."""
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be above 0, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    return betas[0], betas[1]
