# SPDX-License-Identifier: Apache-2.0
"""A bundle's own transform, which Python finds only with the bundle on its path."""

from __future__ import annotations

from monai.transforms import ScaleIntensityRanged


class SoftTissued(ScaleIntensityRanged):
    """Scale soft tissue in CT to [0, 1]."""

    def __init__(self, keys: str) -> None:
        super().__init__(keys, a_min=-60, a_max=160, b_min=0, b_max=1, clip=True)
