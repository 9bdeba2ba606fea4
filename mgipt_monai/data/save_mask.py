# SPDX-License-Identifier: Apache-2.0
"""Write a predicted mask in the geometry of its input."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from mgipt_monai.state_file import atomic_path

from .label_map import draw_label_map
from .write_image import output_path, write_image

__all__ = ["SaveMaskd"]


class SaveMaskd(MapTransform):
    """Save masks as one image each: PNG for photographs, NIfTI (same affine) for NIfTI.

    The file is ``<output_dir>/<name><ending>`` with the item's ``name`` (see :func:`mgipt_monai.find_stream`), or the
    input's own name. It is written whole or not at all. The mask must be in the input's geometry already (``Invertd``);
    only the last axis of a NIfTI file of one slice may be missing, and is put back.

    Args:
        keys: masks of 0 and 1, one channel per structure (C, \\*spatial).
        output_dir: folder to write to; it must be possible to write there.
        values: the value that each channel's structure gets; a later channel is drawn over an earlier one.
        reverse_indexing: whether photographs were read columns first, as MONAI's ``PILReader`` does by default.

    Raises:
        OSError: at construction, if the folder cannot be made or written to.
        ValueError: when called, if there are not as many channels as values.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | os.PathLike,
        values: Sequence[int] = (1,),
        reverse_indexing: bool = False,
    ) -> None:
        super().__init__(keys)
        self.reverse_indexing = reverse_indexing
        self.output_dir = Path(output_dir)
        self.values = values
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.output_dir / "write_test") as part:
                part.touch()
        except OSError as error:
            raise OSError(
                f"cannot write to the output folder {self.output_dir} ({error.strerror}): choose another output_dir"
            ) from error
        (self.output_dir / "write_test").unlink(missing_ok=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save each key's mask; the data pass unchanged."""
        for key in self.keys:
            path = output_path(self.output_dir, data, data[key])
            write_image(draw_label_map(data[key], self.values), path, columns_first=self.reverse_indexing)
        return dict(data)
