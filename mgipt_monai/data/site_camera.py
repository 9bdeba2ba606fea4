# SPDX-License-Identifier: Apache-2.0
"""Photographs as another camera of each site would have taken them, to see how methods bear a stronger shift."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from .cameras import CAMERAS

__all__ = ["SiteCamerad"]


class SiteCamerad(MapTransform):
    """Show photographs through one of the demo's cameras, the same for all images of a site.

    Which camera a site has follows from (seed, ``site``), and how it is set for an image from the image's ``name``, so
    that neither depends on the order of the stream. Where things are in an image does not change, nor does its mask.

    Args:
        keys: photographs (C, H, W) in [0, 1].
        severity: in [0, 1]; 0 leaves them as they are, 1 is the camera in full.
        seed: of the choice of cameras.

    Raises:
        ValueError: if ``severity`` is outside [0, 1].

    Example:
        >>> eye = {"image": torch.rand(3, 32, 32), "name": "north/eye_1", "site": "north"}
        >>> SiteCamerad("image", severity=0.5)(eye)["image"].shape
        torch.Size([3, 32, 32])
    """

    def __init__(self, keys: KeysCollection, severity: float = 1.0, seed: int = 0) -> None:
        super().__init__(keys)
        cameras = [camera for name, camera in CAMERAS.items() if name != "source"]
        self.cameras = [camera.scaled(severity) for camera in cameras]
        self.severity, self.seed = severity, seed

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Show each key's photograph through its site's camera."""
        if self.severity == 0:
            return dict(data)
        camera = self.cameras[(zlib.crc32(str(data["site"]).encode()) + self.seed) % len(self.cameras)]
        image_seed = zlib.crc32(str(data["name"]).encode())
        result = dict(data)
        for key in self.keys:
            image = data[key]
            seen = camera.jittered(image_seed)(np.moveaxis(np.asarray(image, dtype=np.float32), 0, -1), image_seed)
            seen = torch.from_numpy(np.ascontiguousarray(np.moveaxis(seen, -1, 0)))
            result[key] = MetaTensor(seen).copy_meta_from(image) if isinstance(image, MetaTensor) else seen
        return result
