# SPDX-License-Identifier: Apache-2.0
"""ResUNet, the source network of the optic disc and cup protocol, and the size check of both source networks."""

from __future__ import annotations

import torch
from monai.networks.nets import ResNet
from torch import Tensor, nn

__all__ = ["ResUNet", "check_sides"]


def check_sides(x: Tensor, stride: int) -> None:
    """Raise ValueError unless ``x`` is (B, C, H, W) with H and W positive multiples of ``stride``."""
    if x.ndim != 4 or any(side == 0 or side % stride for side in x.shape[2:]):
        raise ValueError(
            f"input of shape {tuple(x.shape)}: expected (B, C, H, W) with H and W multiples of {stride}; "
            f"resize or pad the image, for example with monai.transforms.DivisiblePad(k={stride})"
        )


# per backbone: MONAI's name of the block, blocks per stage, channels of the four stages
_BACKBONES: dict[str, tuple[str, list[int], list[int]]] = {
    "resnet34": ("basic", [3, 4, 6, 3], [64, 128, 256, 512]),
    "resnet50": ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]),
}
_WIDTH = 256  # channels of each decoder block, half from below and half from the skip connection
_STRIDE = 32  # five halvings: conv1, max pool, layers 2 to 4


class _UpBlock(nn.Module):
    """Double the resolution of `x` and join it with `skip`: bn(relu(concatenation))."""

    def __init__(self, in_channels: int, skip_channels: int) -> None:
        super().__init__()
        self.x_conv = nn.Conv2d(skip_channels, _WIDTH // 2, 1)
        self.tr_conv = nn.ConvTranspose2d(in_channels, _WIDTH // 2, 2, stride=2)
        self.bn = nn.BatchNorm2d(_WIDTH)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        # norm after the activation, unlike in most U-Nets: needed to reproduce the published outputs
        return self.bn(torch.relu(torch.cat((self.tr_conv(x), self.x_conv(skip)), dim=1)))


class ResUNet(nn.Module):
    """ResNet encoder, four skip connections and a narrow decoder; logits at the input's resolution.

    The state-dict keys and shapes are those of the published checkpoints, which load with
    `load_state_dict(..., strict=True)`. No pretrained weights are downloaded.

    Source: ResUNet-34 of the optic disc/cup protocol, the source network of VPTTA and MGIPT (Hu et al.).

    Args:
        backbone: encoder, "resnet34" or "resnet50".
        in_channels: channels of the image.
        out_channels: channels of the logits, one per structure; disc and cup are two sigmoid channels.

    Raises:
        ValueError: if `backbone` is not one of the choices.

    Example:
        >>> import torch
        >>> from mgipt_monai.networks.nets.resunet import ResUNet
        >>> net = ResUNet("resnet34", in_channels=3, out_channels=2).eval()
        >>> tuple(net(torch.rand(1, 3, 64, 96)).shape)
        (1, 2, 64, 96)
    """

    def __init__(self, backbone: str = "resnet34", in_channels: int = 3, out_channels: int = 2) -> None:
        """Build the network with random weights."""
        super().__init__()
        if backbone not in _BACKBONES:
            raise ValueError(f"unknown backbone {backbone!r}; choose one of {', '.join(map(repr, _BACKBONES))}")
        block, layers, stages = _BACKBONES[backbone]
        self.res = ResNet(
            block,
            layers,
            [64, 128, 256, 512],
            spatial_dims=2,
            n_input_channels=in_channels,
            conv1_t_stride=2,
            bias_downsample=False,
            num_classes=1000,  # the ImageNet classifier is never used, but the published checkpoints hold it
        )
        self.up1 = _UpBlock(stages[3], stages[2])
        self.up2 = _UpBlock(_WIDTH, stages[1])
        self.up3 = _UpBlock(_WIDTH, stages[0])
        self.up4 = _UpBlock(_WIDTH, 64)
        self.up5 = nn.ConvTranspose2d(_WIDTH, 32, 2, stride=2)
        self.bnout = nn.BatchNorm2d(32)
        self.seg_head = nn.Conv2d(32, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Segment a batch of images.

        Args:
            x: images (B, in_channels, H, W), in the value range the weights were trained with
                (the disc/cup protocol feeds [0, 1]); H and W multiples of 32.

        Returns:
            Logits (B, out_channels, H, W), unbounded; sigmoid turns them into probabilities.

        Raises:
            ValueError: if `x` is not 4-D or a side is not a positive multiple of 32.
        """
        check_sides(x, _STRIDE)
        res = self.res
        stem = torch.relu(res.bn1(res.conv1(x)))
        stage1 = res.layer1(res.maxpool(stem))
        stage2 = res.layer2(stage1)
        stage3 = res.layer3(stage2)
        y = self.up1(res.layer4(stage3), stage3)
        y = self.up2(y, stage2)
        y = self.up3(y, stage1)
        y = self.up4(y, stem)
        # here the norm comes before the activation
        return self.seg_head(torch.relu(self.bnout(self.up5(y))))
