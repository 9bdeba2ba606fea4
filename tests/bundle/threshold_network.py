# SPDX-License-Identifier: Apache-2.0
"""A network that shows where bright voxels are."""

from __future__ import annotations

import torch
from torch import nn


class ThresholdNetwork(nn.Module):
    """Logit of each voxel: how far its brightness is above the middle of [0, 1]; batch norm only to be adapted with."""

    def __init__(self, in_channels: int, spatial_dims: int = 2) -> None:
        super().__init__()
        self.norm = (nn.BatchNorm2d if spatial_dims == 2 else nn.BatchNorm3d)(1, affine=False)
        self.norm.running_mean.fill_(0.5)
        self.norm.running_var.fill_(0.05)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 20 * self.norm(image.mean(dim=1, keepdim=True))
