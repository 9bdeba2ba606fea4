# SPDX-License-Identifier: Apache-2.0
"""Variants of the method of a config, each defined by a config overlay, as further rows of a benchmark."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from functools import partial

from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv
from torch import nn

from mgipt_monai.methods import AdaptationMethod

__all__ = ["overlaid_method"]


def overlaid_method(
    config: ConfigParser, overlay: str | os.PathLike[str], network: nn.Module
) -> Callable[[], AdaptationMethod]:
    """Return a function that builds the ``method`` of a config with one more overlay, around an existing network.

    Args:
        config: the config as read; it is not changed.
        overlay: file of changes to the method and its parts, such as ``configs/ablations/aip_only.yaml``.
        network: the source network with its weights, shared with the other methods of the benchmark.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> config = ConfigParser({"network": None, "lr": 0.1})
        >>> config["method"] = {"_target_": "mgipt_monai.VPTTA", "network": "@network", "lr": "@lr"}
        >>> overlay = Path(tempfile.mkdtemp()) / "slow.yaml"
        >>> _ = overlay.write_text("lr: 0.001")
        >>> make = overlaid_method(config, overlay, nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)))
        >>> make().lr, config["lr"]
        (0.001, 0.1)
    """
    changed = ConfigParser(deepcopy(config.get()))
    for key, value in ConfigParser.load_config_file(overlay).items():
        merge_kv(changed, key, value)
    changed["network"] = network
    return partial(changed.get_parsed_content, "method")
