# SPDX-License-Identifier: Apache-2.0
"""TTN: a weight of the image's statistics for each channel, learnt once from labelled source images.

The weights are few numbers, kept in a file beside the network's. There are two ways to make them.
:func:`learn_interpolation_weights`: augmented images show which channels react to a change of look, and the labels how
much of it should be normalised away. :func:`select_channels` (Hybrid-TTN): all of the image's statistics for the
channels that react least to how large the structures are, none for the others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from mgipt_monai.methods.base import AdaptationMethod, Prediction
from mgipt_monai.methods.weight_updates.losses import cross_entropy
from mgipt_monai.networks.alignment.fused import instance_statistics
from mgipt_monai.networks.alignment.layers import NEEDS_BATCH_NORM, evaluating, find_norm_layers, stored_statistics
from mgipt_monai.networks.alignment.norms import AlignedNorms
from mgipt_monai.networks.alignment.windows import ForwardRoute, Output
from mgipt_monai.networks.prompts.early_stop import Head, check_head
from mgipt_monai.utils.provenance import BesideWeights, fingerprint
from mgipt_monai.utils.state_checks import check_finite, check_tensor, is_whole

__all__ = ["TTN", "InterpolationWeights", "learn_interpolation_weights", "select_channels"]

logger = logging.getLogger(__name__)

TINY = 1e-200
"""Smallest divisor, so that a gradient of zero has no direction."""
LEARN = "`mgipt interpolation-weights SITES FILE --weights WEIGHTS`"


@dataclass(frozen=True)
class InterpolationWeights(BesideWeights):
    """Weights of the image's statistics in TTN's blend, for one network.

    Attributes:
        layers: dotted name of a norm layer to its weights, (C,) in [0, 1]; the source's statistics have the rest.
        images: number of source images that they were learnt from.
        fingerprint: of the network's weights, see :func:`mgipt_monai.utils.provenance.fingerprint`.
        path: the file they were read from; None if they were not read from a file.

    Raises:
        ValueError: at construction, for layers without weights in [0, 1], or a number of images below 1.
    """

    layers: dict[str, Tensor]
    images: int
    fingerprint: str
    path: str | None = None

    kind: ClassVar[str] = "file of interpolation weights"
    made_with: ClassVar[str] = LEARN

    def __post_init__(self) -> None:
        self._check_provenance()
        for name, weights in self.layers.items():
            check_tensor(f"weights of {name}", weights)
            check_finite(f"weights of {name}", weights)
            if weights.ndim != 1 or not ((weights >= 0) & (weights <= 1)).all():
                raise ValueError(f"the weights of {name} are not numbers in [0, 1], one per channel")

    def _content(self) -> dict[str, Any]:
        return {"layers": self.layers}

    @classmethod
    def _of(cls, content: Mapping[str, Any], path: str) -> InterpolationWeights:
        return cls(content["layers"], content["images"], content["fingerprint"], path)


class TTN(AdaptationMethod):
    """Statistics of the source and of the image, blended with a weight for each channel that was learnt (TTN).

    With the weight ``a`` of a channel, its mean is ``a * image + (1 - a) * source``, and its variance is that of the
    mixture of both: ``a * image + (1 - a) * source + a * (1 - a) * (image's mean - source's mean)^2``. Keeps nothing
    between images. Cost: 1 F.

    Source: Lim et al., TTN: a domain-shift aware batch normalization in test-time adaptation, ICLR 2023. The paper's
    statistics are those of a batch; here, and while the weights are learnt, they are those of one image.

    Args:
        network: the source network, with batch norm that stores its statistics.
        weights: result of :func:`learn_interpolation_weights` or :func:`select_channels`, or its file.
        aligned_layers: regular expression on the names of the norm layers to adapt; None adapts all.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a network without usable norm layers, or weights without one of them; at the
            first image, for weights that were learnt with another network.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> weights = InterpolationWeights({"1": torch.full((4,), 0.1)}, images=20, fingerprint=fingerprint(network))
        >>> TTN(network, weights)(torch.rand(1, 3, 16, 16)).shape
        torch.Size([1, 2, 16, 16])
    """

    takes_windows = True
    norms: _InterpolatedNorms
    _is_checked: bool

    def __init__(
        self,
        network: nn.Module,
        weights: InterpolationWeights | str | os.PathLike[str],
        aligned_layers: str | None = None,
        output: Output | None = None,
    ) -> None:
        if weights is None:
            raise ValueError(
                f"TTN needs interpolation weights, in the bundle interpolation_path: learn them with {LEARN}"
            )
        self.aligned_layers = aligned_layers
        self.weights = weights if isinstance(weights, InterpolationWeights) else InterpolationWeights.load(weights)
        super().__init__(network, output)

    def settings(self) -> dict[str, Any]:
        """Return the settings, with the weights' digest: a run resumes with the same alone."""
        return {**super().settings(), "weights": self.weights.digest}

    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        if not self._is_checked:  # not for each image, since it reads all of the network's weights
            self.weights.check(self.network)
            self._is_checked = True
        self.norms.start(image)
        with torch.no_grad():
            logits = self.norms.predict(image, "calibrated")
        return Prediction(logits, {"forwards": self.norms.forwards, "backwards": 0})

    def _bound(self) -> None:
        found = find_norm_layers(self.network, self.aligned_layers, NEEDS_BATCH_NORM)
        for name, layer in found.items():
            channels, weights = len(stored_statistics(layer)[0]), self.weights.layers.get(name, torch.empty(0))
            if len(weights) != channels:
                raise ValueError(
                    f"the interpolation weights have {len(weights)} numbers for {name}, which has {channels} channels: "
                    f"learn them with {LEARN}"
                )
        self._is_checked = False
        layers = {name: self.weights.layers[name] for name in found}
        self.norms = _InterpolatedNorms(layers, self.network, self.aligned_layers, route=self.route)


class _InterpolatedNorms(AlignedNorms):
    """Norm layers whose ``calibrated`` is TTN's blend, differentiable with respect to its weights.

    Args:
        weights: of the image's statistics, (C,) for each layer.
    """

    def __init__(self, weights: dict[str, Tensor], *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.weights = weights

    def align(self, name: str, features: Tensor) -> Tensor:
        """Normalise a layer's features (B, C, \\*spatial)."""
        if self.normalization != "calibrated":
            return super().align(name, features)
        layer: Any = self.layers[name]
        features = features.float()
        mean, std = instance_statistics(features)
        source_mean, source_std = self.stored(name)
        own, share = self.weights[name].to(features.device), mean - source_mean
        variance = torch.lerp(source_std.square().expand_as(std), std.square(), own.expand_as(std))
        scale = torch.rsqrt(variance + own * (1 - own) * share.square() + layer.eps)
        scale = scale if layer.weight is None else scale * layer.weight
        shift = -(source_mean + own * share) * scale
        shift = shift if layer.bias is None else shift + layer.bias
        space = [1] * (features.ndim - 2)
        return features * scale.view(*scale.shape, *space) + shift.view(*shift.shape, *space)


def learn_interpolation_weights(
    network: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    augment: Callable[[Tensor], Any],
    *,
    head: Head = "sigmoid",
    epochs: int = 5,
    lr: float = 1e-3,
    prior_strength: float = 1.0,
    output: Output | None = None,
) -> InterpolationWeights:
    """Learn TTN's weights from labelled source images; the network stays as it is.

    First the prior: for each image and channel, the gradients of the loss with respect to the norm layer's scale and
    shift, for the image as it is and augmented. One minus their cosine similarity, averaged over the images, is small
    where a change of look changes nothing, and 0 for a channel without gradients. These distances are scaled to [0, 1]
    over all channels of all layers, and squared. Then the weights start at the prior and are tuned by Adam on augmented
    images: cross-entropy, plus the squared distance from the prior, averaged within each layer and added up over the
    layers. They stay in [0, 1].

    Source: see :class:`TTN`. Ours: the statistics are those of one image, the augmentation is the caller's, and the
    distances are compared over all layers together.

    Args:
        network: the source network, with batch norm that stores its statistics and has scale and shift.
        batches: dicts with ``image`` (B, C, \\*spatial) and ``label``: a channel in [0, 1] for each structure. They are
            run through ``epochs + 1`` times.
        augment: changes the look of one image (C, \\*spatial) at random, and not its geometry.
        head: ``sigmoid`` or ``softmax``; for softmax the label's background is added.
        epochs: of the tuning; 0 returns the prior.
        lr: learning rate, above 0.
        prior_strength: factor of the distance from the prior, at least 0.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: for a setting out of range, no images, or a network without usable norm layers.
    """
    check_head(head)
    if not is_whole(epochs) or epochs < 0:
        raise ValueError(f"epochs must be a whole number from 0, got {epochs}")
    for setting, value, least in (("lr", lr, 1e-12), ("prior_strength", prior_strength, 0)):
        if not least <= value < float("inf"):
            raise ValueError(f"{setting} must be {'above' if least else 'at least'} 0, got {value}")
    layers = find_norm_layers(network, None, NEEDS_BATCH_NORM)
    if bare := [name for name, layer in layers.items() if getattr(layer, "weight", None) is None]:
        raise ValueError(f"batch norm without scale and shift ({', '.join(bare)}) has no gradients to compare")
    device = next(chain(network.parameters(), network.buffers())).device
    with _frozen(network):
        prior, images = _prior(network, layers, batches, augment, head, ForwardRoute(output=output), device)
        weights = {name: each.to(device, copy=True).requires_grad_() for name, each in prior.items()}
        norms = _InterpolatedNorms(weights, network, route=ForwardRoute(output=output))
        adam = torch.optim.Adam(list(weights.values()), lr=lr)
        for epoch in range(epochs):
            losses = []
            for batch in batches:
                image, label = _pair(batch, device)
                shown = torch.stack([_plain(augment(one)) for one in image])
                with torch.enable_grad():
                    fit = _loss(norms.predict(shown, "calibrated"), label, head)
                    distance = torch.stack(
                        [(weights[name] - prior[name].to(device)).square().mean() for name in prior]
                    ).sum()
                    loss = fit + prior_strength * distance
                    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for weight, gradient in zip(weights.values(), gradients, strict=True):
                    weight.grad = gradient
                adam.step()
                with torch.no_grad():
                    for weight in weights.values():
                        weight.clamp_(0, 1)
                losses.append(fit.item())
            logger.info("epoch %d of %d: cross-entropy %.4f", epoch + 1, epochs, sum(losses) / len(losses))
    return InterpolationWeights(
        {name: weight.detach().cpu() for name, weight in weights.items()}, images, fingerprint(network)
    )


def select_channels(
    network: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, output: Output | None = None
) -> InterpolationWeights:
    """Choose the channels that take the image's statistics: those that tell least of the structures' size (Hybrid-TTN).

    Where the mix of what is in the images differs from the source's, statistics of the image take away what a channel
    knows of it. For each structure, the source images where it is larger, and those where it is smaller, give a
    channel's mean and deviation. Its score is the mean squared distance of both from what the layer stores (the
    2-Wasserstein distance of normal distributions). The lowest scores are chosen: all channels of the first layer that
    runs, none of the last, and of those between a share that falls linearly. Chosen channels have the weight 1, others
    0. Cost: 1 F an image.

    Source: Vianna et al., Channel-selective normalization for label-shift robust test-time adaptation, CoLLAs 2024.
    Ours: the paper classifies images and compares classes; in segmentation the halves by size stand for them, each
    with the same weight.

    Args:
        network: the source network, with batch norm that stores its statistics.
        batches: dicts with ``image`` (B, C, \\*spatial) and ``label``: a channel in [0, 1] for each structure.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: for fewer than two images, structures of one size, or a network without usable norm layers.
    """
    layers = find_norm_layers(network, None, NEEDS_BATCH_NORM)
    device = next(chain(network.parameters(), network.buffers())).device
    moments: dict[str, list[Tensor]] = {}  # in the order in which the layers run
    sizes: list[Tensor] = []

    def observe(name: str, inputs: tuple[Tensor, ...]) -> None:
        seen = moments.setdefault(name, [])
        if len(seen) == len(sizes):  # of a layer that runs several times, the first
            values = inputs[0].double().flatten(2)
            seen.append(torch.stack([values.mean(dim=2), values.square().mean(dim=2)]))

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: observe(name, inputs))
        for name, layer in layers.items()
    ]
    try:
        with _frozen(network), torch.no_grad():
            for batch in batches:
                image, label = _pair(batch, device)
                ForwardRoute(output=output).run(network, image)
                sizes.append(label.flatten(2).mean(dim=2).cpu())
    finally:
        for hook in hooks:
            hook.remove()
    size = torch.cat(sizes) if sizes else torch.empty(0, 1)
    if len(size) < 2 or not (size.amax(dim=0) > size.amin(dim=0)).any():
        raise ValueError(f"{len(size)} images with structures of one size do not tell one channel from another")
    half = len(size) // 2
    halves = [places for order in size.argsort(dim=0).T for places in (order[:half], order[-half:])]
    weights, last = {}, len(moments) - 1
    for depth, (name, seen) in enumerate(moments.items()):
        mean, variance = (each.double().cpu() for each in stored_statistics(layers[name]))
        first, second = torch.cat(seen, dim=1).cpu()
        score = torch.zeros_like(mean)
        for places in halves:
            own = first[places].mean(dim=0)
            deviation = (second[places].mean(dim=0) - own.square()).clamp(min=0).sqrt()
            score += (own - mean).square() + (deviation - variance.sqrt()).square()
        chosen = len(mean) * (last - depth) // last if last else len(mean)
        weights[name] = torch.zeros(len(mean)).index_fill(0, score.argsort()[:chosen], 1)
    return InterpolationWeights(weights, len(size), fingerprint(network))


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Evaluate a network without gradients of its weights, and restore its modes and flags."""
    flags = {parameter: parameter.requires_grad for parameter in network.parameters()}
    try:
        network.requires_grad_(False)
        device = next(iter(flags)).device.type
        with evaluating(network), torch.inference_mode(False), torch.autocast(device, enabled=False):
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _prior(
    network: nn.Module,
    layers: dict[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    augment: Callable[[Tensor], Any],
    head: Head,
    route: ForwardRoute,
    device: torch.device,
) -> tuple[dict[str, Tensor], int]:
    """Return the prior of each layer's weights, (C,), and the number of images."""
    affine = [cast(Tensor, parameter) for layer in layers.values() for parameter in (layer.weight, layer.bias)]
    channels = [len(scale) for scale in affine[0::2]]
    total, images = torch.zeros(sum(channels), dtype=torch.float64), 0
    for parameter in affine:
        parameter.requires_grad_(True)
    for batch in batches:
        for image, label in zip(*_pair(batch, device), strict=True):
            gradients = []
            for shown in (image, _plain(augment(image))):
                with torch.enable_grad():
                    loss = _loss(route.run(network, shown[None]), label[None], head)
                found = torch.autograd.grad(loss, affine, allow_unused=True)
                own = [torch.zeros_like(p) if g is None else g for g, p in zip(found, affine, strict=True)]
                gradients.append(torch.stack([torch.cat(own[0::2]), torch.cat(own[1::2])]).cpu().double())
            lengths = torch.stack(gradients).norm(dim=1)
            product = (gradients[0] * gradients[1]).sum(dim=0) / lengths.prod(dim=0).clamp(min=TINY)
            total += torch.where((lengths > 0).any(dim=0), 1 - product, 0)  # a silent channel reacts to nothing
            images += 1
    for parameter in affine:
        parameter.requires_grad_(False)
    if not images:
        raise ValueError("there are no source images to learn from")
    distance = total / images
    scaled = (distance - distance.min()) / (distance.max() - distance.min()).clamp(min=1e-6)
    return dict(zip(layers, scaled.square().float().split(channels), strict=True)), images


def _pair(batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    return _plain(batch["image"]).to(device), _plain(batch["label"]).to(device)


def _plain(values: Any) -> Tensor:
    return convert_to_tensor(values, dtype=torch.float32, track_meta=False)


def _loss(logits: Tensor, label: Tensor, head: Head) -> Tensor:
    """Return the mean cross-entropy of logits with labels (B, structures, \\*spatial)."""
    if head == "softmax" and label.shape[1] == logits.shape[1] - 1:
        label = torch.cat([1 - label.sum(dim=1, keepdim=True).clamp(max=1), label], dim=1)
    return cross_entropy(logits, label, head).mean()
