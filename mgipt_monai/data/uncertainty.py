# SPDX-License-Identifier: Apache-2.0
"""Take the latest image's uncertainty from the method, and write it beside its mask."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform

from mgipt_monai.inferers import AdaptiveInferer

from .write_image import is_nifti, output_path, write_image

__all__ = ["AddUncertaintyd", "SaveUncertaintyd"]


class AddUncertaintyd(Transform):
    """Put the map of the views' disagreement (1, \\*spatial) beside the prediction that it belongs to.

    Args:
        inferer: what made the prediction, with a method that has an ``uncertainty``, such as MGIPT.
        prediction: key of the latest prediction, untransformed; its meta data are taken over.
        key: the map's key.

    Raises:
        ValueError: at construction, for a method without views that could disagree, or slices adapted to one by one.
    """

    def __init__(self, inferer: AdaptiveInferer, prediction: str = "pred", key: str = "uncertainty") -> None:
        if not hasattr(inferer.method, "uncertainty"):
            raise ValueError(
                f"{type(inferer.method).__name__} has one view of an image, so none disagree: use MGIPT, or set "
                "save_uncertainty to false"
            )
        if inferer.slices == "own":
            raise ValueError("slices='own' has an uncertainty for each slice, none for the volume: use slices='shared'")
        self.inferer, self.prediction, self.key = inferer, prediction, key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the map."""
        uncertainty = MetaTensor(self.inferer.method.uncertainty[0])
        return {**data, self.key: uncertainty.copy_meta_from(data[self.prediction])}


class SaveUncertaintyd(MapTransform):
    """Save maps in [0, 1] as ``<output_dir>/<name>_uncertainty``: 8-bit PNG (255 is 1), or NIfTI of 32-bit numbers.

    Format, names and geometry are those of :class:`SaveMaskd`, which makes sure that the folder can be written to.

    Args:
        keys: maps (1, \\*spatial).
        output_dir: folder to write to.
        reverse_indexing: whether photographs were read columns first, as MONAI's ``PILReader`` does by default.
    """

    def __init__(self, keys: KeysCollection, output_dir: str | os.PathLike, reverse_indexing: bool = False) -> None:
        super().__init__(keys)
        self.output_dir, self.reverse_indexing = Path(output_dir), reverse_indexing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save each key's map; the data pass unchanged."""
        for key in self.keys:
            values = data[key].clamp(0, 1)
            if not is_nifti(values):
                values = (255 * values).round()
            path = output_path(self.output_dir, data, values, "_uncertainty")
            write_image(values, path, np.float32, self.reverse_indexing)
        return dict(data)
