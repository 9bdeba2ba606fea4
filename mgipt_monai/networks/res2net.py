# SPDX-License-Identifier: Apache-2.0
"""Res2Net-50, the encoder of PraNet: a ResNet whose 3x3 convolutions work at four scales inside each block."""

from __future__ import annotations

import torch
from torch import nn

_SCALES = 4  # groups of channels in a block
_BASE_WIDTH = 26  # channels of a group for every 64 of the block's plain width
_EXPANSION = 4  # channels out of a block for each of its plain width
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # plain width, blocks and stride of each stage


class _Block(nn.Module):
    """Bottleneck whose 3x3 convolution is split: each group of channels also sees what the group before it found."""

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
        if is_first:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )
        else:
            self.downsample = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *groups, last = torch.relu(self.bn1(self.conv1(x))).chunk(_SCALES, dim=1)
        found: list[torch.Tensor] = []
        for group, conv, bn in zip(groups, self.convs, self.bns, strict=True):
            # in a stage's first block the groups stay apart
            joined = group if self.is_first or not found else group + found[-1]
            found.append(torch.relu(bn(conv(joined))))
        y = self.bn3(self.conv3(torch.cat((*found, self.pool(last)), dim=1)))
        return torch.relu(y + self.downsample(x))


class Res2Net(nn.Module):
    """Res2Net-50 (26w, 4s) in its version 1b: three 3x3 convolutions as stem, average pooling in the shortcuts.

    The state-dict keys are those of the published ImageNet checkpoint, with the classifier ``fc``, which is not used.

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
