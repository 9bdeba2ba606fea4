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
    """Makes an inferer run a predictor's own sliding window: its patches, weights, mirroring and precision."""

    def _take(self, predictor: nnUNetPredictor) -> None:
        self._predictor = copy.copy(predictor)
        self._predictor.network = self._predictor.list_of_parameters = None
        axes = predictor.allowed_mirroring_axes if predictor.use_mirroring else None
        # a resumed stream must have the same
        self.mirror_axes = "" if axes is None else ", ".join(map(str, axes))
        self.gaussian = predictor.use_gaussian

    def __call__(self, inputs: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Predict images (B, C, \\*spatial), in the range of nnU-Net's preprocessing: logits (B, K, \\*spatial)."""
        predictor = copy.copy(self._predictor)  # of this call, as other threads may predict at the same time
        predictor.network = _Forward(network)
        flat = inputs.ndim == 4  # nnU-Net takes a 2D image for a volume with one slice
        logits = []
        for image in inputs:
            found = predictor.predict_sliding_window_return_logits(image[:, None] if flat else image)
            logits.append((found[:, 0] if flat else found).to(inputs.device, torch.float32))
        return torch.stack(logits)


def _sides(predictor: nnUNetPredictor) -> list[int]:
    return [int(side) for side in predictor.configuration_manager.patch_size]


class NnunetWindows(_OwnPrediction, SlidingWindowInferer):  # type: ignore[misc] # is called with images alone
    """nnU-Net's prediction of an image in patches of as many axes as the image has.

    Mirrored passes and patches are forwards of one image. Logits are nnU-Net's own, in half precision as it computes
    them, returned in single precision.

    Args:
        predictor: an initialised predictor, for its plans and settings; its network is not used.
    """

    def __init__(self, predictor: nnUNetPredictor) -> None:
        super().__init__(_sides(predictor), overlap=1 - predictor.tile_step_size)
        self._take(predictor)


class NnunetSlices(_OwnPrediction, SliceInferer):  # type: ignore[misc] # is called with images alone
    """nnU-Net's prediction of a volume with a 2D configuration, slice by slice along the first axis.

    Args:
        predictor: an initialised predictor, for its plans and settings; its network is not used.
    """

    def __init__(self, predictor: nnUNetPredictor) -> None:
        super().__init__(spatial_dim=0, roi_size=_sides(predictor), overlap=1 - predictor.tile_step_size)
        self._take(predictor)
