# SPDX-License-Identifier: Apache-2.0
"""PraNet, the source network of the polyp protocol, and its encoder Res2Net-50."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional

from mgipt_monai.networks.nets.resunet import check_sides

__all__ = ["PraNet", "Res2Net"]

_SCALES = 4  # groups of channels in a block
_BASE_WIDTH = 26  # channels of a group for every 64 of the block's plain width
_EXPANSION = 4  # output channels of a block per channel of its plain width
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # plain width, blocks and stride of each stage


class _Block(nn.Module):
    """Bottleneck with a split 3x3 convolution: each group of channels also gets the output of the group before it."""

    def __init__(self, in_channels: int, plain_width: int, stride: int, is_first: bool) -> None:
        super().__init__()
        width, out_channels = plain_width * _BASE_WIDTH // 64, plain_width * _EXPANSION
        self.is_first = is_first
        self.conv1 = nn.Conv2d(in_channels, width * _SCALES, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width * _SCALES)
        # the last group is not convolved
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False) for _ in range(_SCALES - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(_SCALES - 1))
        self.conv3 = nn.Conv2d(width * _SCALES, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(3, stride=stride, padding=1) if is_first else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if is_first:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *groups, last = torch.relu(self.bn1(self.conv1(x))).chunk(_SCALES, dim=1)
        found: list[torch.Tensor] = []
        for group, conv, bn in zip(groups, self.convs, self.bns, strict=True):
            # in the first block of a stage, the groups are independent
            joined = group if self.is_first or not found else group + found[-1]
            found.append(torch.relu(bn(conv(joined))))
        y = self.bn3(self.conv3(torch.cat((*found, self.pool(last)), dim=1)))
        return torch.relu(y + self.downsample(x))


class Res2Net(nn.Module):
    """Res2Net-50 (26w, 4s), version 1b: three 3x3 convolutions as stem, average pooling in the shortcuts.

    The state-dict keys are those of the published ImageNet checkpoint, including the unused classifier ``fc``.

    Source: Gao et al., "Res2Net: A New Multi-scale Backbone Architecture", IEEE TPAMI 2019; the stem and the shortcuts
    are those of ResNet-D (He et al., "Bag of Tricks", CVPR 2019).

    Args:
        in_channels: channels of the image.

    Example:
        >>> import torch
        >>> features = Res2Net(in_channels=3).eval()(torch.rand(1, 3, 64, 64))
        >>> [tuple(feature.shape[1:]) for feature in features]
        [(256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, in_channels: int = 3) -> None:
        """Build the encoder with random weights."""
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for number, (plain_width, blocks, stride) in enumerate(_STAGES, start=1):
            out_channels = plain_width * _EXPANSION
            stage = [_Block(channels, plain_width, stride, is_first=True)]
            stage += [_Block(out_channels, plain_width, 1, is_first=False) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            channels = out_channels
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the features of the four stages, finest first, for images (B, in_channels, H, W).

        H and W are multiples of 32. The features have 256, 512, 1024 and 2048 channels at a 4th, 8th, 16th and 32nd of
        the resolution.
        """
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features


_WIDTH = 32  # channels of each receptive field block
_STRIDE = 32  # of the encoder's last stage
# per level: channels of the encoder's features, width of the branch, kernels of its convolutions after the first
_BRANCHES: dict[int, tuple[int, int, tuple[int, ...]]] = {
    4: (2048, 256, (5, 5, 5, 1)),
    3: (1024, 64, (3, 3, 3)),
    2: (512, 64, (3, 3, 3)),
}


def _conv_bn(
    in_channels: int, out_channels: int, kernel: int | tuple[int, int] = 1, dilation: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size, and batch norm; no activation."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding="same", dilation=dilation, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


def _enlarge(x: torch.Tensor, factor: int = 2) -> torch.Tensor:
    """Upsampling inside the partial decoder."""
    return functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)


def _resize(logits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Resize logits to the size of `like`."""
    return functional.interpolate(logits, size=like.shape[2:], mode="bilinear", align_corners=False)


class _ReceptiveField(nn.Module):
    """Receptive field block: four branches with receptive fields of 1, 3, 5 and 7 pixels, and a shortcut."""

    branch1: nn.Sequential
    branch2: nn.Sequential
    branch3: nn.Sequential

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch0 = nn.Sequential(_conv_bn(in_channels, _WIDTH))
        for number, size in enumerate((3, 5, 7), start=1):
            branch = nn.Sequential(
                _conv_bn(in_channels, _WIDTH),
                _conv_bn(_WIDTH, _WIDTH, (1, size)),
                _conv_bn(_WIDTH, _WIDTH, (size, 1)),
                _conv_bn(_WIDTH, _WIDTH, 3, dilation=size),
            )
            self.add_module(f"branch{number}", branch)
        self.conv_cat = _conv_bn(4 * _WIDTH, _WIDTH, 3)
        self.conv_res = _conv_bn(in_channels, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [branch(x) for branch in (self.branch0, self.branch1, self.branch2, self.branch3)]
        return torch.relu(self.conv_cat(torch.cat(branches, dim=1)) + self.conv_res(x))


class _PartialDecoder(nn.Module):
    """Partial decoder: multiply each level by all deeper ones, then merge them from the deepest up."""

    conv_upsample1: nn.Sequential
    conv_upsample2: nn.Sequential
    conv_upsample3: nn.Sequential
    conv_upsample4: nn.Sequential

    def __init__(self) -> None:
        super().__init__()
        for number in range(1, 5):
            self.add_module(f"conv_upsample{number}", _conv_bn(_WIDTH, _WIDTH, 3))
        self.conv_upsample5 = _conv_bn(2 * _WIDTH, 2 * _WIDTH, 3)
        self.conv_concat2 = _conv_bn(2 * _WIDTH, 2 * _WIDTH, 3)
        self.conv_concat3 = _conv_bn(3 * _WIDTH, 3 * _WIDTH, 3)
        self.conv4 = _conv_bn(3 * _WIDTH, 3 * _WIDTH, 3)
        self.conv5 = nn.Conv2d(3 * _WIDTH, 1, 1)

    def forward(self, fine: torch.Tensor, middle: torch.Tensor, deep: torch.Tensor) -> torch.Tensor:
        mixed_middle = self.conv_upsample1(_enlarge(deep)) * middle
        # twice by 2 instead of once by 4: these differ with aligned corners
        mixed_fine = self.conv_upsample2(_enlarge(_enlarge(deep))) * self.conv_upsample3(_enlarge(middle)) * fine
        joined = self.conv_concat2(torch.cat((mixed_middle, self.conv_upsample4(_enlarge(deep))), dim=1))
        joined = self.conv_concat3(torch.cat((mixed_fine, self.conv_upsample5(_enlarge(joined))), dim=1))
        return self.conv5(self.conv4(joined))


class PraNet(nn.Module):
    """Parallel reverse attention network with a Res2Net-50 encoder; one structure, logits at the input's resolution.

    A partial decoder predicts a coarse map from the three deepest levels. From the deepest level up, a branch attends
    to the background of the current map and corrects it. This attention needs a single channel, so the network is
    binary.

    The state-dict keys and shapes are those of the published checkpoints. No pretrained weights are downloaded; a file
    with those of an encoder trained on ImageNet loads into ``net.resnet``.

    Adaptation: the published protocol aligns only the batch norms of the encoder, ``aligned_layers=r"^resnet\\."``.

    Training: in training mode the output is a list of four, for MONAI's ``DeepSupervisionLoss``. The paper adds the
    four losses with equal weights (``weight_mode="same"``); the default halves the weight from output to output. The
    loss is :class:`mgipt_monai.networks.nets.losses.BoundaryWeightedLoss`.

    Source: Fan et al., "PraNet: Parallel Reverse Attention Network for Polyp Segmentation", MICCAI 2020; its partial
    decoder: Wu et al., CVPR 2019; its receptive field block: Liu et al., ECCV 2018.

    Args:
        in_channels: channels of the image.

    Example:
        >>> import torch
        >>> from monai.losses import DeepSupervisionLoss
        >>> from mgipt_monai.networks.nets.losses import BoundaryWeightedLoss
        >>> from mgipt_monai.networks.nets.pranet import PraNet
        >>> net = PraNet()
        >>> outputs = net.train()(torch.rand(2, 3, 64, 32))
        >>> loss = DeepSupervisionLoss(BoundaryWeightedLoss(), weight_mode="same")
        >>> len(outputs), loss(outputs, torch.ones(2, 1, 64, 32)).shape
        (4, torch.Size([]))
        >>> tuple(net.eval()(torch.rand(1, 3, 64, 32)).shape)
        (1, 1, 64, 32)
    """

    def __init__(self, in_channels: int = 3) -> None:
        """Build the network with random weights."""
        super().__init__()
        self.resnet = Res2Net(in_channels)
        self.rfb2_1 = _ReceptiveField(512)
        self.rfb3_1 = _ReceptiveField(1024)
        self.rfb4_1 = _ReceptiveField(2048)
        self.agg1 = _PartialDecoder()
        for level, (channels, width, (*kernels, last)) in _BRANCHES.items():
            convs = [
                _conv_bn(channels, width),
                *(_conv_bn(width, width, kernel) for kernel in kernels),
                _conv_bn(width, 1, last),
            ]
            for number, conv in enumerate(convs, start=1):
                self.add_module(f"ra{level}_conv{number}", conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Segment a batch of images.

        Args:
            x: images (B, in_channels, H, W), in the value range the weights were trained with (the polyp protocol
                standardises with ImageNet's mean and standard deviation); H and W multiples of 32.

        Returns:
            Logits (B, 1, H, W), unbounded; sigmoid turns them into probabilities. In training mode a list of four such
            tensors: after the last correction, after the second, after the first, and the partial decoder's.

        Raises:
            ValueError: if `x` is not 4-D or a side is not a positive multiple of 32.
        """
        check_sides(x, _STRIDE)
        _, *levels = self.resnet(x)
        blocks = (self.rfb2_1, self.rfb3_1, self.rfb4_1)
        outputs = [self.agg1(*(block(features) for block, features in zip(blocks, levels, strict=True)))]
        for level, features in zip(_BRANCHES, reversed(levels), strict=True):
            outputs.append(self._correct(outputs[-1], level, features))
        if not self.training:
            return _resize(outputs[-1], x)
        return [_resize(output, x) for output in reversed(outputs)]

    def _correct(self, logits: torch.Tensor, level: int, features: torch.Tensor) -> torch.Tensor:
        """Reverse attention: correct the current map at the size of a level's features."""
        logits = _resize(logits, features)
        count = len(_BRANCHES[level][2]) + 1
        first, *middle, last = (getattr(self, f"ra{level}_conv{number}") for number in range(1, count + 1))
        y = first(features * (1 - torch.sigmoid(logits)))
        for conv in middle:
            y = torch.relu(conv(y))
        return last(y) + logits
