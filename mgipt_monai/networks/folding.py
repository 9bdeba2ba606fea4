# SPDX-License-Identifier: Apache-2.0
"""A correction folded into a network of standard layers, for servers that know nothing else."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mgipt_monai.networks.alignment.layers import has_stored_statistics
from mgipt_monai.networks.correction import Correction, NormShift, is_shifted

__all__ = ["fold"]

logger = logging.getLogger(__name__)

UNCHANGING = (nn.Identity, nn.modules.dropout._DropoutNd)
"""Layers that pass on what they get in evaluation mode."""


def fold(network: nn.Module, correction: Correction) -> nn.Module:
    """Return a copy of a network that predicts as the network with the correction; the network does not change.

    Where a correction needs a layer of its own, it is a ``torch.fx.GraphModule``, which has its code in itself.

    Raises:
        ValueError: if the correction does not fit the network.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1))
        >>> folded = fold(network, Correction(offset=torch.tensor([2.0])))
        >>> torch.equal(folded[2].bias, network[2].bias + 2)
        True
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    plain = _with_norms(plain, correction.norms)
    parts = {"network": plain}
    if correction.prompts:
        parts = {"prompts": _graph(Prompts(correction.prompts)), **parts}
    offset, temperature = correction.offset, correction.temperature
    if (offset is not None or temperature != 1) and not _fold_end(plain, offset, temperature):
        parts["logits"] = _graph(Logits(offset, temperature))
    if len(parts) == 1:
        return plain
    like = next(plain.parameters(), torch.empty(0))
    whole = nn.Sequential()
    for name, part in parts.items():
        whole.add_module(name, part if part is plain else part.to(like))
    return whole.eval().requires_grad_(False)


def _graph(module: nn.Module) -> nn.Module:
    """Return a module as one of torch's own, whose code is in itself and needs no import of this package."""
    plain = fx.symbolic_trace(module)
    for node in plain.graph.nodes:
        node.type = None  # as text, which TorchScript does not take
    plain.recompile()
    return plain


def _with_norms(network: nn.Module, norms: Mapping[str, NormShift]) -> nn.Module:
    """Return a network of its own with shifted norm layers."""
    layers = dict(network.named_modules(remove_duplicate=False))
    stored = {name: shift for name, shift in norms.items() if name in layers and has_stored_statistics(layers[name])}
    # checks all layers, but changes those with stored statistics only
    Correction(norms=norms).to_network(network)
    network = Correction(norms=stored).to_network(network)
    for name, shift in norms.items():
        if name not in stored and shift.share.any():
            layer = network.get_submodule(name)
            replaced = _graph(ShiftedNorm(layer, shift)).to(next(network.parameters(), torch.empty(0))).eval()
            # a layer that is used at several places is replaced at each
            for other, each in list(network.named_modules(remove_duplicate=False)):
                if each is layer and other:
                    parent, _, last = other.rpartition(".")
                    setattr(network.get_submodule(parent), last, replaced)
    return network


class ShiftedNorm(nn.Module):
    """Instance or group norm with shifted statistics, as :class:`mgipt_monai.networks.correction.ShiftedNorm`.

    Of the share a of the mean M and the share b of the deviation S the layer's own mean m and deviation s become
    m + a (M - m) and s ** (1 - b) * S ** b.
    """

    scale: Tensor
    bias: Tensor
    site_mean: Tensor

    def __init__(self, layer: nn.Module, shift: NormShift) -> None:
        super().__init__()
        assert is_shifted(layer)
        like = shift.mean
        self.groups = len(shift.mean)
        channels = cast(int, layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features)
        mean_share, std_share = shift.share.double().tolist()
        self.width, self.eps = channels // self.groups, cast(float, layer.eps)
        self.kept, self.power = 1 - mean_share, -(1 - std_share) / 2
        place = (self.groups, self.width, 1)
        own = cast("tuple[Tensor | None, Tensor | None]", (layer.weight, layer.bias))
        weight = torch.ones(channels) if own[0] is None else own[0].detach().to(like)
        bias = torch.zeros(channels) if own[1] is None else own[1].detach().to(like)
        site_std = shift.std.double().pow(-std_share).view(-1, 1, 1)
        self.register_buffer("scale", (weight.reshape(place).double() * site_std).to(like).clone())
        self.register_buffer("bias", bias.reshape(place).clone())
        self.register_buffer("site_mean", (mean_share * shift.mean.double()).view(-1, 1, 1).to(like).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features, (B, C, \\*spatial)."""
        grouped = x.reshape(x.size(0), self.groups, self.width, -1)
        mean = grouped.mean((2, 3), keepdim=True)
        variance = (grouped - mean).square().mean((2, 3), keepdim=True)
        scale = (variance + self.eps).pow(self.power) * self.scale
        return ((grouped - (mean * self.kept + self.site_mean)) * scale + self.bias).reshape(x.size())


class Logits(nn.Module):
    """Offset and temperature behind a network."""

    offset: Tensor

    def __init__(self, offset: Tensor | None, temperature: float) -> None:
        super().__init__()
        self.scale = 1 / temperature
        self.register_buffer("offset", torch.zeros(1, 1) if offset is None else offset.detach().clone().view(-1, 1))

    def forward(self, logits: Tensor) -> Tensor:
        """Return the corrected logits, (B, K, \\*spatial)."""
        return ((logits.flatten(2) + self.offset) * self.scale).reshape(logits.size())


class Prompts(nn.Module):
    """A site's prompts in one, as :meth:`Correction.to_image`, in real numbers and with operations of every server.

    The image must be at least as large as the largest prompt along each axis.
    """

    change: Tensor
    frequencies: Tensor

    def __init__(self, prompts: Sequence[Tensor]) -> None:
        super().__init__()
        for prompt in prompts:
            if len(set(prompt.shape[2:])) != 1 or prompt.shape[1:2] != prompts[0].shape[1:2]:
                raise ValueError(
                    f"a prompt of the shape {tuple(prompt.shape)} fits no image: commission the site again"
                )
        largest = max(prompts, key=lambda prompt: prompt.shape[-1])
        side, self.axes = largest.shape[-1], largest.ndim - 2
        change = torch.zeros_like(largest)
        for prompt in prompts:
            part = change
            for axis in range(2, largest.ndim):  # the frequency zero of each is in its middle
                part = part.narrow(axis, side // 2 - prompt.shape[axis] // 2, prompt.shape[axis])
            part += prompt - 1
        self.side = side
        self.register_buffer("change", change)
        self.register_buffer("frequencies", torch.arange(side)[:, None] - side // 2)

    def forward(self, image: Tensor) -> Tensor:
        """Return the changed image, (B, C, \\*spatial)."""
        waves = []
        for axis in range(2, 2 + self.axes):
            size = image.size(axis)
            torch._assert(size >= self.side, "the image is smaller than the site's prompts")
            positions = torch.arange(size, device=image.device)
            # reduced in whole numbers, so that large images lose no precision
            angle = ((positions * self.frequencies) % size).to(image.dtype) * (2 * torch.pi / size)
            waves.append((angle.cos(), angle.sin()))
        real, imaginary = image, image * 0
        for axis, (cosine, sine) in enumerate(waves, start=2):
            cosine, sine = cosine.transpose(0, 1) / image.size(axis), sine.transpose(0, 1) / image.size(axis)
            real, imaginary = real.transpose(axis, -1), imaginary.transpose(axis, -1)
            real, imaginary = real @ cosine + imaginary @ sine, imaginary @ cosine - real @ sine
            real, imaginary = real.transpose(axis, -1), imaginary.transpose(axis, -1)
        real, imaginary = real * self.change, imaginary * self.change
        for axis, (cosine, sine) in enumerate(waves, start=2):
            real, imaginary = real.transpose(axis, -1), imaginary.transpose(axis, -1)
            real, imaginary = real @ cosine - imaginary @ sine, imaginary @ cosine + real @ sine
            real, imaginary = real.transpose(axis, -1), imaginary.transpose(axis, -1)
        return image + real


def _fold_end(network: nn.Module, offset: Tensor | None, temperature: float) -> bool:
    """Put offset and temperature into the weights of the network's last layers; return whether that can be done."""
    try:
        graph = fx.Tracer().trace(network)
    except Exception as error:  # whatever a network's code does that cannot be followed without an image
        logger.debug("%s cannot be followed: %s", type(network).__name__, error)
        return False
    last = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(last, fx.Node):
        raise ValueError(
            f"{type(network).__name__} returns several outputs, and the offset is for one: pass a network that returns "
            "its logits alone"
        )
    scaled = {} if temperature == 1 else _scaled(network, last)
    conv = None if offset is None else _last_convolution(network, last)
    if scaled is None or (offset is not None and conv is None):
        return False
    if offset is not None and conv is not None:
        if len(offset) not in (1, conv.out_channels):
            raise ValueError(f"the offset is for {len(offset)} channels, the network has {conv.out_channels}")
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        conv.bias = nn.Parameter(bias + offset.to(bias), requires_grad=False)
    for layer, is_source in scaled.items():
        if is_source:
            layer.weight = nn.Parameter(cast(Tensor, layer.weight) / temperature, requires_grad=False)
        if layer.bias is not None:
            layer.bias = nn.Parameter(cast(Tensor, layer.bias) / temperature, requires_grad=False)
    return True


def _last_convolution(network: nn.Module, node: fx.Node) -> _ConvNd | None:
    """Return the convolution that gives a node's value, or a term of the sum that does; None if there is none."""
    if len(node.users) != 1:  # another part of the network takes it too
        return None
    layer = _layer(network, node)
    if isinstance(layer, _ConvNd):
        return layer if _is_used_once(network, layer, node) else None
    if isinstance(layer, UNCHANGING) or (_is_sum(node) and node.args[0] is not node.args[1]):
        found = (_last_convolution(network, each) for each in node.all_input_nodes)
        return next((conv for conv in found if conv is not None), None)
    return None


def _scaled(network: nn.Module, last: fx.Node) -> dict[nn.Module, bool] | None:
    """Find the layers that scale the network's output by a positive number if their weights are scaled by it.

    Returns:
        Layer to whether its weight is scaled, and not only its bias since its input is scaled already; None if there
        are no such layers.
    """
    region: dict[fx.Node, nn.Module | None] = {last: _layer(network, last)}
    todo = [last]
    while todo:
        node = todo.pop()
        layer, needed = region[node], [user for user in node.users if user.op != "output"]
        if isinstance(layer, (*UNCHANGING, nn.ReLU, nn.LeakyReLU, nn.PReLU)) or _is_sum(node):
            needed += node.all_input_nodes
        elif layer is None or not (_is_affine(layer) and _is_used_once(network, layer, node)):
            return None
        todo += [each for each in needed if each not in region]
        region |= {each: _layer(network, each) for each in needed}
    sources = {}
    for node, layer in region.items():
        if layer is not None and _is_affine(layer):
            sources[layer] = node.all_input_nodes[0] not in region
    normalised = any(not is_source and not isinstance(layer, _ConvNd) for layer, is_source in sources.items())
    return None if normalised else sources


def _is_affine(layer: nn.Module | None) -> bool:
    """Whether a layer's output is linear in its weight and bias: a convolution, or a norm with an affine part."""
    return isinstance(layer, (_ConvNd, _NormBase, nn.GroupNorm)) and layer.weight is not None


def _layer(network: nn.Module, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_sum(node: fx.Node) -> bool:
    is_add = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    return is_add and not node.kwargs and all(isinstance(each, fx.Node) for each in node.args)


def _is_used_once(network: nn.Module, layer: nn.Module, node: fx.Node) -> bool:
    """Whether a layer's weights are its own, serve one call, and are what it works with."""
    own = {id(value) for value in (layer.weight, layer.bias) if value is not None}
    held = [id(value) for module in network.modules() for value in module._parameters.values()]
    names = [name for name, module in network.named_modules(remove_duplicate=False) if module is layer]
    calls = [other for other in node.graph.nodes if other.op == "call_module" and other.target in names]
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return all(held.count(each) == 1 for each in own) and len(calls) == 1 and not hooks
