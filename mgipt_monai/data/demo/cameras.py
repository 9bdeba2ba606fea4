# SPDX-License-Identifier: Apache-2.0
"""Fundus cameras as parametric image shifts: colour response, tone, haze, vignetting, blur and noise.

The shifts are plain image arithmetic, so they also apply to real photographs.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.networks.layers import gaussian_1d, separable_filtering
from monai.transforms import MapTransform

__all__ = ["CAMERAS", "Camera", "SiteCamerad"]

_LIMITS = {"gamma": (0.1, 10.0), "contrast": (0.01, 10.0), "offset": (-1.0, 1.0)}
_LIMITS |= {"vignetting": (0.0, 1.0), "blur": (0.0, 0.1), "noise": (0.0, 1.0)}
_SPREAD = {"gamma": 0.05, "contrast": 0.03, "offset": 0.10, "vignetting": 0.10, "blur": 0.10, "noise": 0.10}


@dataclass(frozen=True)
class Camera:
    """The look of a camera; the default settings leave an image unchanged.

    The settings are applied in the order of the light path: `blur` (optics), `contrast` about mid grey and `offset`
    (haze), `vignetting`, `gain` (sensor colours), `gamma` (tone curve), `noise`.

    Args:
        name: name of the camera and of the folder of its site.
        gain: factors on red, green and blue, each positive. For one channel their mean is used; for other numbers of
            channels they are repeated.
        gamma: exponent of the tone curve, in [0.1, 10]; above 1 darkens.
        contrast: factor on the distance from mid grey (0.5), in [0.01, 10]; below 1 flattens.
        offset: light added everywhere, in [-1, 1]; above 0 is haze.
        vignetting: fraction of the light lost at the image's corners, in [0, 1].
        blur: standard deviation of the Gaussian blur as a fraction of the shorter image side, in [0, 0.1].
        noise: standard deviation of the additive Gaussian noise, in [0, 1].

    Raises:
        ValueError: if a setting is out of its range; the message names the setting and a valid choice.

    Example:
        >>> dim = Camera("dim", gain=(0.8, 0.8, 0.8))
        >>> round(float(dim(np.ones((2, 2, 3), dtype=np.float32), seed=0).max()), 3)
        0.8
        >>> dim.scaled(0.0) == Camera("dim")
        True
    """

    name: str
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gamma: float = 1.0
    contrast: float = 1.0
    offset: float = 0.0
    vignetting: float = 0.0
    blur: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Check all settings."""
        if not self.name or self.name in {".", ".."} or any(c in self.name for c in "/\\"):
            raise ValueError(f"camera name is {self.name!r}; give one without slashes, as it names a folder")
        if len(self.gain) != 3 or not all(np.isfinite(g) and g > 0 for g in self.gain):
            raise ValueError(f"gain is {self.gain}; give three positive factors (red, green, blue), 1.0 for no change")
        for key, (low, high) in _LIMITS.items():
            value = getattr(self, key)
            if not low <= value <= high:  # also catches nan
                raise ValueError(f"{key} is {value}; give a number from {low} to {high}")

    def __call__(self, image: np.ndarray, seed: int) -> np.ndarray:
        """Photograph `image` with this camera.

        Args:
            image: (H, W, C) in [0, 1], any number of channels; values outside are clipped first.
            seed: non-negative integer that fixes the noise.

        Returns:
            float32 of the same shape in [0, 1].

        Raises:
            ValueError: if `image` does not have three axes or holds integers.
        """
        if image.ndim != 3 or not np.issubdtype(image.dtype, np.floating):
            fix = "give floats in [0, 1] of shape (H, W, C), for instance image.astype('float32') / 255"
            raise ValueError(f"image is {image.dtype} of shape {image.shape}; {fix}")
        height, width, channels = image.shape
        out = _blurred(np.clip(image, 0, 1).astype(np.float32), self.blur * min(height, width))
        out = out * self.contrast + (0.5 * (1 - self.contrast) + self.offset)
        y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
        out = out * (1 - self.vignetting * (x**2 + y**2) / 2)[..., None]
        gain = np.mean(self.gain, keepdims=True) if channels == 1 else np.resize(self.gain, channels)
        out = np.clip(out * gain, 0, 1) ** self.gamma
        if self.noise:
            out = out + np.random.default_rng(seed).normal(0, self.noise, out.shape)
        return np.clip(out, 0, 1).astype(np.float32)

    def scaled(self, severity: float) -> Camera:
        """Return this camera at a severity in [0, 1]: 0 is no shift, 1 is this camera.

        `gain`, `gamma` and `contrast` are factors and scale geometrically; the other settings scale linearly. The name
        is kept, so that a demo site has the same eyes at every severity.

        Raises:
            ValueError: if `severity` is outside [0, 1].
        """
        if not 0 <= severity <= 1:
            raise ValueError(f"severity is {severity}; give a number from 0 (no shift) to 1 (this camera)")
        if severity == 1:
            return self  # avoids rounding
        red, green, blue = (g**severity for g in self.gain)
        scaled: dict[str, Any] = {
            key: getattr(self, key) * severity for key in ("offset", "vignetting", "blur", "noise")
        }
        return replace(
            self,
            gain=(red, green, blue),
            gamma=self.gamma**severity,
            contrast=self.contrast**severity,
            **scaled,
        )

    def jittered(self, seed: int) -> Camera:
        """Return this camera with the settings of one photograph, as they vary within a site.

        Each of the eight numbers is multiplied by its own log-normal factor with a standard deviation of 3 % for `gain`
        and `contrast`, 5 % for `gamma` and 10 % for the rest. Zeros stay zero.
        """
        rng = np.random.default_rng(seed)
        red, green, blue = (float(g * f) for g, f in zip(self.gain, np.exp(rng.normal(0, 0.03, 3)), strict=True))
        varied = {key: float(getattr(self, key) * np.exp(rng.normal(0, spread))) for key, spread in _SPREAD.items()}
        clipped: dict[str, Any] = {key: float(np.clip(value, *_LIMITS[key])) for key, value in varied.items()}
        return replace(self, gain=(red, green, blue), **clipped)


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur (H, W, C) with a Gaussian of `sigma` pixels, repeating the edge (zeros would darken the border)."""
    if sigma < 1e-3:
        return image
    kernel = gaussian_1d(torch.tensor(sigma), truncated=4.0, normalize=True)
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    return separable_filtering(planes, [kernel, kernel], mode="replicate")[0].numpy().transpose(1, 2, 0)


# "source" is a good modern camera; the other three are sites that the model has not seen. Their shifts are mostly
# low-frequency (colour balance, tone, haze, falloff), as with a change of camera.
CAMERAS: dict[str, Camera] = {
    camera.name: camera
    for camera in (
        Camera("source", gain=(1.0, 0.98, 0.95), vignetting=0.06, blur=0.004, noise=0.010),
        Camera(
            "low_contrast", gain=(0.85, 0.95, 0.95), gamma=0.75, contrast=0.48, offset=0.05, blur=0.007, noise=0.012
        ),
        Camera("warm_vignetted", gain=(1.05, 0.88, 0.74), gamma=1.15, vignetting=0.40, blur=0.005, noise=0.012),
        Camera("cold_noisy", gain=(0.82, 0.96, 1.15), gamma=1.10, contrast=0.95, vignetting=0.15, noise=0.025),
    )
}


class SiteCamerad(MapTransform):
    """Apply one of the demo's cameras to photographs, the same for all images of a site.

    The camera depends on (seed, ``site``) and its settings for an image on the image's ``name``, so neither depends on
    the order of the stream. The geometry of an image does not change, so its mask stays valid.

    Args:
        keys: photographs (C, H, W) in [0, 1].
        severity: in [0, 1]; 0 leaves the images unchanged, 1 applies the camera in full.
        seed: seed of the choice of cameras.

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
        """Apply the site's camera to the photograph of each key."""
        if self.severity == 0:
            return dict(data)
        camera = self.cameras[(zlib.crc32(str(data["site"]).encode()) + self.seed) % len(self.cameras)]
        image_seed = zlib.crc32(str(data["name"]).encode())
        result = dict(data)
        for key in self.keys:
            image = data[key]
            pixels = camera.jittered(image_seed)(np.moveaxis(np.asarray(image, dtype=np.float32), 0, -1), image_seed)
            shifted = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))
            result[key] = MetaTensor(shifted).copy_meta_from(image) if isinstance(image, MetaTensor) else shifted
        return result
