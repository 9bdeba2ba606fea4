# SPDX-License-Identifier: Apache-2.0
"""Which images of a site to label, so that few of them stand for all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.inferers import Inferer, SimpleInferer
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from mgipt_monai.data.datalists import write_datalist
from mgipt_monai.data.dataset import FAILURE, MACHINE, MEMORY
from mgipt_monai.networks.alignment import find_measurable_layers, instance_statistics
from mgipt_monai.networks.alignment.layers import evaluating, layer_features
from mgipt_monai.networks.alignment.windows import network_turn
from mgipt_monai.utils.files import file_names
from mgipt_monai.utils.machine import MachineFailureError
from mgipt_monai.utils.state_checks import check_image

__all__ = ["Suggestion", "suggest", "write_suggestions"]

logger = logging.getLogger(__name__)

SMALLEST = 1e-6
"""Smallest deviation of a channel, and smallest share of an image that a structure takes, whose logarithm is taken."""


@dataclass(frozen=True)
class Suggestion:
    """An image to label.

    Attributes:
        index: place of the image among all, from 0.
        name: its name or, if it has none, its file's.
        stands_for: number of images that are more like it than like the others suggested, itself included.
        images: number of images that were compared.
    """

    index: int
    name: str
    stands_for: int
    images: int

    @property
    def reason(self) -> str:
        """Why to label it, in words."""
        if self.stands_for == 0:  # all images like it are nearest to an equal one
            return "the same as another suggestion"
        return f"nearest to {self.stands_for} of {self.images} images" if self.stands_for > 1 else "one of its kind"


def suggest(
    network: nn.Module,
    images: Iterable[Mapping[str, Any]],
    k: int = 10,
    *,
    head: str = "sigmoid",
    device: torch.device | str | None = None,
    inferer: Inferer | None = None,
    seed: int = 0,
) -> list[Suggestion]:
    """Choose the images of a site to label: a random sample of them, spread over all kinds of images.

    An image is described by what the unadapted network makes of it, in one forward: mean and deviation of the features
    at every norm layer, area of every class, and confidence. The three count alike, in standard deviations among the
    images. Every image has the same chance to be drawn, so that means over the sample are right on average, as of a
    plain random sample; but near-duplicates are rarely drawn together, so that these means scatter less (local pivotal
    method: A. Grafstroem, N. Lundstroem and L. Schelin, Spatially balanced sampling through the pivotal method,
    Biometrics, 2012). Typical images alone, or images as different as possible, would be no such sample.

    An image that cannot be read or used is left out, with a line in the log.

    Args:
        network: the source network, whose state is left as it is.
        images: dicts with ``image`` (C, \\*spatial), preprocessed as for inference, such as a ``Dataset``. ``name`` is
            optional, and so is ``group``, such as the patient: a group's second image is suggested only when every
            group has one. Then images of large groups have a lower chance than others.
        k: number of images to suggest, at least 1.
        head: ``sigmoid``, or ``softmax`` with a background channel before the classes.
        device: where the network is; None uses the device of its first parameter.
        inferer: how the network runs over an image; None for whole images.
        seed: of the draws; the same seed and images give the same suggestions.

    Returns:
        ``k`` suggestions in the order of the images, or all images if there are fewer.

    Raises:
        MachineFailureError: if the machine failed at an image, such as by lost memory.
        ValueError: for another head or k, or if no image can be used.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> dark, light = ([{"image": gain * torch.rand(3, 16, 16)} for _ in range(6)] for gain in (0.2, 1.0))
        >>> [one.reason for one in suggest(network, [*dark, *light], k=2)]
        ['nearest to 6 of 12 images', 'nearest to 6 of 12 images']
    """
    if k < 1:
        raise ValueError(f"k must be at least 1 image, got {k}")
    described = describe(network, images, head, device, inferer)
    if not described:
        raise ValueError("no image can be used: see the lines above for what is wrong with each")
    distances = distances_between(described)
    chosen = spread_sample(distances, min(k, len(described)), [one.group for one in described], seed)
    counts = torch.bincount(distances[chosen].argmin(dim=0), minlength=len(chosen)).tolist()
    return [
        Suggestion(described[i].place, described[i].name, count, len(described))
        for i, count in zip(chosen, counts, strict=True)
    ]


def write_suggestions(
    suggestions: Sequence[Suggestion], items: Sequence[dict[str, Any]], path: str | os.PathLike[str]
) -> None:
    """Write the suggested items to a datalist, with the reason under ``suggested``, and print a line for each.

    Args:
        suggestions: as from :func:`suggest`.
        items: all items that the suggestions are of, see :func:`mgipt_monai.find_stream`.
        path: see :func:`mgipt_monai.data.datalists.write_datalist`.

    Raises:
        FileExistsError: if a file stands there that this function did not write.
        ValueError: if the name does not end in ``.json``.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "to_label.json")
        >>> write_suggestions([Suggestion(1, "B", 7, 9)], [{"image": "A.png"}, {"image": "B.png"}], path)
         1. B: nearest to 7 of 9 images
    """
    write_datalist([{**items[one.index], "suggested": one.reason} for one in suggestions], path)
    for number, one in enumerate(suggestions, start=1):
        print(f"{number:2d}. {one.name}: {one.reason}")


class Description(NamedTuple):
    """What the network makes of an image.

    Attributes:
        place: of the image among all, from 0.
        name: of the image.
        group: of images at most one of which is chosen, if possible.
        layers: for each norm layer, means and logarithms of the deviations of its channels, (2 C,).
        prediction: logarithm of each class's share of the image, (K,), and mean confidence, (1,).
    """

    place: int
    name: str
    group: Hashable
    layers: list[Tensor]
    prediction: list[Tensor]


def describe(
    network: nn.Module,
    images: Iterable[Mapping[str, Any]],
    head: str = "sigmoid",
    device: torch.device | str | None = None,
    inferer: Inferer | None = None,
) -> list[Description]:
    """Describe the images that can be used; the arguments are those of :func:`suggest`."""
    if head not in ("sigmoid", "softmax"):
        raise ValueError(f"head must be sigmoid or softmax, got {head!r}")
    if device is None:
        device = next(chain(network.parameters(), network.buffers()), torch.empty(0)).device
    described = []
    with _observing(network) as look, torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        for index, item in enumerate(images):
            name = str(item.get("name") or next(iter(file_names(item)), f"image {index + 1}"))
            try:
                if MACHINE in item:
                    raise MachineFailureError(item[MACHINE], bool(item.get(MEMORY)))
                if FAILURE in item:
                    raise ValueError(item[FAILURE])
                image = convert_to_tensor(item["image"], dtype=torch.float32, device=device, track_meta=False)[None]
                check_image(image)
            except ValueError as error:
                logger.warning("%s is left out: %s", name, error)
                continue
            logits = (inferer or SimpleInferer())(image, network)
            group = item.get("group", ("image", index))
            described.append(Description(index, name, group, look(), _of_prediction(logits[0], head)))
    return described


def distances_between(described: Sequence[Description]) -> Tensor:
    """Return the distances of images (N, N): by their layers, areas and confidence, which count alike."""
    squares = torch.zeros(len(described), len(described))
    for columns in zip(*(one.layers for one in described), strict=True):
        squares += _squares(columns) / len(described[0].layers)
    for columns in zip(*(one.prediction for one in described), strict=True):
        squares += _squares(columns)
    return squares.sqrt()


def spread_sample(distances: Tensor, k: int, groups: Sequence[Hashable], seed: int = 0) -> list[int]:
    """Return ``k`` places drawn at random, of as many groups as possible, so that few of them are close together.

    The local pivotal method: all images have the same chance at first. Two undecided images that are each other's
    nearest neighbours meet, found by going from a random one to ever closer neighbours. One of them gets the other's
    chance as far as there is room, so that at least one is in or out. Which one is drawn, so that the expected chance
    of both stays as it was.

    Args:
        distances: of the images, (N, N).
        k: number of images, at most N.
        groups: of each image.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    of_group: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        of_group.setdefault(group, []).append(place)
    chosen: list[int] = []
    while len(chosen) < k:
        # one image of each group, as long as that is enough
        pool = [int(rng.choice(places)) for places in of_group.values() if places]
        chosen += pool if len(pool) <= k - len(chosen) else _pivotal(distances.numpy(), pool, k - len(chosen), rng)
        of_group = {group: [p for p in places if p not in chosen] for group, places in of_group.items()}
    return sorted(chosen)


def _pivotal(distances: np.ndarray, pool: Sequence[int], k: int, rng: np.random.Generator) -> list[int]:
    chances = dict.fromkeys(pool, k / len(pool))
    chosen: list[int] = []
    while len(chances) > 1:
        one = int(rng.choice(list(chances)))
        other, distance = _nearest(distances, one, chances)
        while (closer := _nearest(distances, other, chances))[1] < distance:
            one, (other, distance) = other, closer
        total = chances[one] + chances[other]
        if total < 1:
            winner, loser = (one, other) if rng.random() * total < chances[one] else (other, one)
            chances[winner] = total
            del chances[loser]
        else:
            winner, loser = (one, other) if rng.random() * (2 - total) < 1 - chances[other] else (other, one)
            chances[loser] = total - 1
            del chances[winner]
            chosen.append(winner)
    # the last one's chance is 0 or 1, but for rounding
    return [*chosen, *chances][:k]


def _nearest(distances: np.ndarray, place: int, among: Iterable[int]) -> tuple[int, float]:
    others = np.array([other for other in among if other != place])
    found = int(others[distances[place, others].argmin()])
    return found, float(distances[place, found])


@contextmanager
def _observing(network: nn.Module) -> Iterator[Callable[[], list[Tensor]]]:
    """Yield a function that returns the statistics of each layer's features, (2 C,), in the latest forward."""
    seen: dict[str, list[Tensor]] = {}

    def observe(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # an inferer may fold several windows into the batch
        features = layer_features(layer, inputs[0], output, images=1)
        if features is not None:
            mean, std = instance_statistics(features)
            seen.setdefault(name, []).append(torch.cat([mean, std.clamp(min=SMALLEST).log()], dim=1)[0].cpu())

    def look() -> list[Tensor]:
        latest = [torch.stack(windows).mean(dim=0) for windows in seen.values()]
        seen.clear()
        return latest

    with network_turn(network), evaluating(network):
        hooks = [
            layer.register_forward_hook(partial(observe, name))
            for name, layer in find_measurable_layers(network).items()
        ]
        try:
            yield look
        finally:
            for hook in hooks:
                hook.remove()


def _of_prediction(logits: Tensor, head: str) -> list[Tensor]:
    """Return the logarithm of each class's share of the image, and the mean confidence, of logits (K, \\*spatial)."""
    logits = logits.flatten(1)
    if head == "sigmoid":
        masks, confidence = logits > 0, (2 * logits.sigmoid() - 1).abs()
    else:
        masks = torch.nn.functional.one_hot(logits.argmax(dim=0), len(logits)).T[1:]
        confidence = logits.softmax(dim=0).amax(dim=0)
    return [masks.float().mean(dim=1).clamp(min=SMALLEST).log().cpu(), confidence.mean()[None].cpu()]


def _squares(column: Sequence[Tensor]) -> Tensor:
    """Return the images' squared distances (N, N) by some of their numbers, standardised, as a mean over these."""
    values = torch.stack(list(column))
    values = (values - values.mean(dim=0)) / values.std(dim=0, correction=0).clamp(min=SMALLEST)
    # not by matrix products, whose rounding hides near-duplicates
    return torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square() / values.shape[1]
