# SPDX-License-Identifier: Apache-2.0
"""What adaptation did to an image, in the answer of a server."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

__all__ = ["AdaptationResultd"]


class AdaptationResultd(MapTransform):
    """Put the record of the request's image where MONAI Label takes its JSON answer from, under ``adaptation``.

    Args:
        keys: the prediction as :class:`mgipt_monai.PersistentInferer` returned it. Transforms that replace its meta
            data (``Invertd``) come after this one.
        result: key of the dict that the server answers with.

    Raises:
        ValueError: when called, if the prediction does not have the record of exactly one image.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> pred = MetaTensor(torch.rand(2, 8, 8), meta={"adaptation": [{"position": 3}]})
        >>> AdaptationResultd("pred")({"pred": pred})["result"]
        {'adaptation': {'position': 3}}
    """

    def __init__(self, keys: KeysCollection, result: str = "result") -> None:
        super().__init__(keys)
        self.result = result

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add each key's record; nothing else changes."""
        answer = dict(data.get(self.result, {}))
        for key in self.keys:
            rows = getattr(data[key], "meta", {}).get("adaptation", [])
            if len(rows) != 1:
                raise ValueError(
                    f"{key} has the adaptation records of {len(rows)} images, one is needed: predict with a "
                    "PersistentInferer, and put AdaptationResultd first in the postprocessing"
                )
            (answer["adaptation"],) = rows
        return {**data, self.result: answer}
