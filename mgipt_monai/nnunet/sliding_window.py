# SPDX-License-Identifier: Apache-2.0
"""nnU-Net's own sliding window as a MONAI inferer, which adaptation methods predict through."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from monai.inferers import SliceInferer, SlidingWindowInferer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn

__all__ = ["NnunetSlices", "NnunetWindows"]


class _Forward(nn.Module):
    """What nnU-Net's prediction takes for its network: one forward in the way that a method asks for."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, patch: Tensor) -> Tensor:
        # nnU-Net predicts in inference mode, whose tensors cannot be kept in a method's state
        with torch.inference_mode(False), torch.no_grad():
            logits = self.run(patch.clone() if patch.is_inference() else patch)
        device = patch.device.type
        # methods return 32 bits; the networks end with a convolution, which gives autocast's precision
        return logits.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else logits


class _OwnPrediction:
    """Runs a predictor's own sliding window: its patches, Gaussian weights, mirroring, autocast and half precision."""

    def __init__(self, predictor: nnUNetPredictor) -> None:
        self.predictor = copy.copy(predictor)
        self.predictor.network = self.predictor.list_of_parameters = None
        self.sides = [int(side) for side in predictor.configuration_manager.patch_size]
        self.overlap = 1 - predictor.tile_step_size
        axes = predictor.allowed_mirroring_axes if predictor.use_mirroring else None
        self.mirror_axes = "" if axes is None else ", ".join(map(str, axes))

    def predict(self, images: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        predictor = copy.copy(self.predictor)  # of this call, as other threads may predict at the same time
        predictor.network = _Forward(network)
        flat = images.ndim == 4  # nnU-Net takes a 2D image for a volume with one slice
        logits = []
        for image in images:
            found = predictor.predict_sliding_window_return_logits(image[:, None] if flat else image)
            logits.append((found[:, 0] if flat else found).to(images.device, torch.float32))
        return torch.stack(logits)


class NnunetWindows(SlidingWindowInferer):
    """nnU-Net's prediction of an image in patches of as many axes as the image has.

    Mirrored passes and patches are forwards of one image. Logits are nnU-Net's own, in half precision as it computes
    them, returned in single precision.

    Args:
        predictor: an initialised predictor, for its plans and settings; its network is not used.
    """

    def __init__(self, predictor: nnUNetPredictor) -> None:
        own = _OwnPrediction(predictor)
        super().__init__(own.sides, overlap=own.overlap)
        # a resumed stream must have the same
        self.mirror_axes, self.gaussian = own.mirror_axes, predictor.use_gaussian
        self._own = own

    def __call__(  # type: ignore[override] # nothing else than images
        self, inputs: Tensor, network: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Predict images (B, C, \\*spatial), in the range of nnU-Net's preprocessing: logits (B, K, \\*spatial)."""
        return self._own.predict(inputs, network)


class NnunetSlices(SliceInferer):
    """nnU-Net's prediction of a volume with a 2D configuration, slice by slice along the first axis.

    Args:
        predictor: an initialised predictor, for its plans and settings; its network is not used.
    """

    def __init__(self, predictor: nnUNetPredictor) -> None:
        own = _OwnPrediction(predictor)
        super().__init__(spatial_dim=0, roi_size=own.sides, overlap=own.overlap)
        self.mirror_axes, self.gaussian = own.mirror_axes, predictor.use_gaussian
        self._own = own

    def __call__(  # type: ignore[override] # nothing else than images
        self, inputs: Tensor, network: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Predict images (B, C, \\*spatial) as :class:`NnunetWindows` does."""
        return self._own.predict(inputs, network)
