# SPDX-License-Identifier: Apache-2.0
"""How images go through a network: one thread after another, and larger volumes in windows."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from monai.data.utils import dense_patch_slices
from monai.inferers import Inferer, SimpleInferer, SliceInferer, SlidingWindowInferer, sliding_window_inference
from monai.utils import PytorchPadMode, fall_back_tuple
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "ForwardRoute",
    "NetworkOutputError",
    "Output",
    "Precision",
    "Windows",
    "check_no_window",
    "method_turn",
    "network_turn",
    "parts",
]

Output = str | int | Callable[[Any], Tensor]
"""Which of a network's outputs are its logits: key of a dict, index in a tuple or list, or a function of the output."""

Precision = Literal["float32", "bfloat16"]
"""What a network computes in; whatever is measured in it is measured in float32."""

SMALL = {1: 2**16, 2: 2**16, 3: 2**18}
"""Maximum number of voxels, by number of spatial axes, of images that go through the network together. Larger images go
one by one: each keeps the processor busy, and memory holds one image's features. The choice depends on the shape alone,
so that an image gives the same bits whatever came before it."""


def parts(images: Tensor) -> tuple[Tensor, ...]:
    """Split images (B, C, \\*spatial) into groups that go through the network together: all if small, else one each."""
    small = math.prod(images.shape[2:]) <= SMALL.get(images.ndim - 2, 0)
    return images.split(max(len(images), 1) if small else 1)


def run_in_parts(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Run images in the groups of :func:`parts`; the outputs go into one tensor, and are not all held a second time."""
    groups = parts(images)
    if len(groups) == 1:
        return run(images)
    outputs: Tensor | None = None
    for place, group in enumerate(groups):
        found = run(group)
        if outputs is None:
            outputs = found.new_empty(len(images), *found.shape[1:])
        outputs[place] = found[0]
        del found
    assert outputs is not None
    return outputs


class NetworkOutputError(TypeError):
    """What a network returns fits no image of the stream: the run ends, and no image is recorded as failed."""


@dataclass
class ForwardRoute:
    """How images go through the network: at once, or in windows.

    Attributes:
        inferer: a MONAI ``SimpleInferer``, ``SlidingWindowInferer`` or ``SliceInferer``.
        windows: maximum number of windows in which the alignment loss is measured, at least 1.
        output: which of the network's outputs are the logits; None for a network that returns one tensor.
        precision: ``float32``, or ``bfloat16`` by autocast.
        latest: all that the network has returned in the latest prediction, with ``output``.
    """

    inferer: Inferer = field(default_factory=SimpleInferer)
    windows: int = 2
    output: Output | None = None
    precision: Precision = "float32"
    latest: Any = None

    def __post_init__(self) -> None:
        known = self.output is None or isinstance(self.output, (str, int)) or callable(self.output)
        if isinstance(self.output, bool) or not known:
            raise TypeError(
                f"output must be a key, an index or a function of the network's output, got {self.output!r}"
            )

    def compute_in(self, precision: Precision) -> None:
        """Use another precision from now on; ValueError for an unknown one."""
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}; got {precision!r}")
        self.precision = precision

    def device_of(self, images: Tensor) -> torch.device:
        """Return the device that the network runs on: the inferer's ``sw_device`` if it has one, or the images'."""
        device = getattr(self.inferer, "sw_device", None)
        return images.device if device is None else torch.device(device)

    @property
    def blends_all_channels(self) -> bool:
        """Whether the inferer takes any number of output channels, as MONAI's do; one's own call may not."""
        return type(self.inferer).__call__ in (SlidingWindowInferer.__call__, SliceInferer.__call__)

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        """Run a network in the precision of its weights or by autocast; images (B, C, \\*spatial) to float32 logits.

        Raises:
            NetworkOutputError: for an output that is no tensor, when the message names the keys to choose from, or that
                is no map.
        """
        autocast = torch.autocast(images.device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()
        with _without_compiler(), autocast:
            output = network(in_precision_of(network, images))
        if self.output is not None:
            if not torch.is_grad_enabled():  # what has a graph cannot be copied
                self.latest = output
            output = self._selected(output)
        if not isinstance(output, Tensor):
            raise NetworkOutputError(
                f"{type(network).__name__} returns {_described(output)} instead of logits: name the logits, for "
                f"instance MGIPT(network, output={_likely_key(output)!r}), in a config method#output, or with "
                "existing_bundle.yaml adaptation#output"
            )
        if output.ndim < 3:
            raise NetworkOutputError(
                f"{type(network).__name__} returns a tensor of shape {tuple(output.shape)} instead of a map of logits "
                "(B, K, *spatial): only segmentation networks can be adapted"
            )
        return output.float()

    def _selected(self, output: Any) -> Any:
        if callable(self.output):
            return self.output(output)
        try:
            return output[self.output]
        except (KeyError, IndexError, TypeError) as error:
            raise NetworkOutputError(
                f"output={self.output!r} is not among the network's outputs, which are {_described(output)}"
            ) from error

    def change(self, inferer: Inferer, windows: int) -> None:
        """Use another inferer and number of windows from now on.

        Raises:
            TypeError: for an inferer that adaptation does not support.
            ValueError: if ``windows`` is below 1.
        """
        if not isinstance(inferer, (SimpleInferer, SlidingWindowInferer)):
            raise TypeError(
                "adaptation predicts through a SimpleInferer, SlidingWindowInferer or SliceInferer, not through a "
                f"{type(inferer).__name__}"
            )
        if getattr(inferer, "with_coord", False):
            raise TypeError(
                f"{type(inferer).__name__}(with_coord=True) passes the place of each window to the network, and "
                "adaptation passes images only: set with_coord=False, or use a network that takes only the image"
            )
        if windows < 1:
            raise ValueError(f"windows must be at least 1, got {windows}")
        self.inferer, self.windows = inferer, windows


def _without_compiler() -> Any:
    """Run networks of ``torch.compile`` as they were: it would compile them anew whenever their layers are aligned."""
    # imported by torch.compile, and by nobody else without need: it takes seconds
    compiles = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


def in_precision_of(network: nn.Module, images: Tensor) -> Tensor:
    """Return float32 images in the precision of a network's weights."""
    dtype = next((weight.dtype for weight in network.parameters() if weight.is_floating_point()), images.dtype)
    return images.to(dtype)


def _described(output: Any) -> str:
    if isinstance(output, dict):
        return f"a dict with the keys {', '.join(map(repr, output))}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)} entries"
    return f"a {type(output).__name__}"


def _likely_key(output: Any) -> Any:
    if not isinstance(output, dict):
        return 0
    return next((key for key in output if key in ("logits", "out", "pred")), next(iter(output), "out"))


def check_no_window(method: nn.Module) -> None:
    """Raise RuntimeError if a sliding-window inferer is calling the method, window by window.

    Each window would count as an image: with an adaptation, and a place in the stream, of its own.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is sliding_window_inference.__code__:
            name = type(method).__name__
            raise RuntimeError(
                f"each window would be adapted to as if it were an image. Let {name} adapt to the whole volume and "
                "predict its windows: AdaptiveInferer(method, SlidingWindowInferer(...))(volume, network); in an "
                "evaluator attach TestTimeAdaptationHandler(method), or set that inferer"
            )
        frame = frame.f_back  # type: ignore[assignment] # ends with None


class Windows:
    """The windows of one image in which its alignment loss is measured.

    They are the windows with the highest contrast (standard deviation of the unadapted image) among those of a
    non-overlapping grid. An image that fits into one window has a single window: the whole image, padded like the
    inferer pads it.

    Args:
        route: how the image goes through the network. With a ``SimpleInferer`` the window is the whole image. With a
            ``SliceInferer`` windows are slices, passed to the network without the axis they are cut along.
        image: (1, C, \\*spatial), unadapted.
    """

    def __init__(self, route: ForwardRoute, image: Tensor) -> None:
        self.squeezed, self.padding, self.slices = None, [], []
        self.device = route.device_of(image)
        inferer = route.inferer
        if not isinstance(inferer, SlidingWindowInferer):
            return
        sides = list(image.shape[2:])
        window = list(inferer.roi_size) if not isinstance(inferer.roi_size, int) else [inferer.roi_size] * len(sides)
        if isinstance(inferer, SliceInferer):
            self.squeezed = inferer.spatial_dim + 2
            if len(window) < len(sides):  # the inferer does so itself, at its first volume
                window.insert(inferer.spatial_dim, 1)
        window = list(fall_back_tuple(window, sides))
        # half before and half after, last axis first, as the inferer does
        missing = [max(w - n, 0) for w, n in zip(window, sides, strict=True)]
        self.padding = [part for m in reversed(missing) for part in (m // 2, m - m // 2)]
        self.mode, self.value = PytorchPadMode(inferer.padding_mode).value, inferer.cval
        padded = self._pad(image)[0]
        places = [(slice(None), slice(None), *place) for place in dense_patch_slices(padded.shape[1:], window, window)]
        contrast = torch.stack([padded[place[1:]].std() for place in places])
        best = contrast.argsort(descending=True, stable=True)[: route.windows]
        self.slices = [places[i] for i in sorted(best.tolist())]

    @property
    def count(self) -> int:
        """Number of windows."""
        return max(1, len(self.slices))

    def loss(self, images: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Return each image's mean loss over the windows, differentiable with respect to the images.

        Memory holds one window at a time, of one image unless images are small: the gradient is computed window by
        window, together with the loss.

        Args:
            images: prompted images (B, C, \\*spatial).
            loss: windows (B, C, \\*window) to their losses (B,).
        """
        images = self._pad(images)
        places = [place[1:] for place in self.slices] or [()]
        first = slice(None), *places[0]
        together = len(parts(images[first])[0])
        samples = [slice(i, i + together) for i in range(0, len(images), together)]
        pieces = [(sample, *place) for sample in samples for place in places]
        if len(pieces) > 1:
            return _PiecewiseLoss.apply(images, lambda piece: loss(self._cut(piece, ...)), pieces, self.count)
        return loss(self._cut(images, pieces[0])).to(images.device)

    def predict(self, images: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the network's outputs (B, K, ...) in the windows, side by side along the first spatial axis."""
        return torch.cat([network(window) for window in self.cut(images)], dim=2)

    def cut(self, images: Tensor) -> Iterator[Tensor]:
        """Cut the windows (B, C, \\*window) out of images (B, C, \\*spatial), one by one, as the network takes them."""
        images = self._pad(images)
        return (self._cut(images, place) for place in self.slices or [...])

    def _pad(self, images: Tensor) -> Tensor:
        if not any(self.padding):
            return images
        options = {"value": self.value} if self.mode == PytorchPadMode.CONSTANT.value else {}
        return functional.pad(images, self.padding, mode=self.mode, **options)

    def _cut(self, images: Tensor, place: Any) -> Tensor:
        window = images[place].to(self.device)
        return window if self.squeezed is None else window.squeeze(self.squeezed)


class _PiecewiseLoss(torch.autograd.Function):
    """Mean loss over windows; the forward accumulates the gradient, so that only one piece's graph is in memory."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, loss: Callable, pieces: Sequence[tuple[slice, ...]], windows: int) -> Tensor:
        total, gradient = images.new_zeros(len(images)), torch.zeros_like(images)
        for piece in pieces:
            with torch.enable_grad():
                leaf = images[piece].detach().requires_grad_()
                value = loss(leaf)
                (slope,) = torch.autograd.grad(value.sum(), leaf)
            total[piece[0]] += value.detach().to(total) / windows
            gradient[piece] += slope / windows
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.view(-1, *[1] * (gradient.ndim - 1)), None, None, None


# kept here rather than on the modules, which are copied and pickled
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_making = threading.Lock()


def _lock(module: nn.Module) -> Any:
    with _making:
        return _locks.setdefault(module, threading.RLock())


def method_turn(method: nn.Module) -> Any:
    """Return the lock of a method's state; a thread that holds it may enter it again."""
    return _lock(method)


@contextmanager
def network_turn(network: nn.Module) -> Iterator[None]:
    """Keep other threads' methods off a network, and off all networks that share one of its layers.

    Whoever changes the network itself, its weights or its mode, while methods in other threads adapt with it must do so
    here. To run it needs no turn: layers align only in the thread that adapts. A thread that needs the turn of a method
    as well takes that one first.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> with network_turn(network), network_turn(network[0]):
        ...     network.training
        True
    """
    layers = [module for module in network.modules() if next(module.children(), None) is None]
    with ExitStack() as stack:
        # in one order, whatever the order of the layers in the networks that share them
        for lock in sorted(map(_lock, layers), key=id):
            stack.enter_context(lock)
        yield


def _begin_child() -> None:
    """Forget what the parent's other threads hold, since they do not exist in a forked process."""
    global _making
    _making = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)
