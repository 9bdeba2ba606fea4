# SPDX-License-Identifier: Apache-2.0
"""Learns the rule of site correction when a training ends, from the images that the network was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ignite.engine import Engine, Events
from torch import nn

from mgipt_monai.methods.site_rule import LEAST_IMAGES, learn_site_rule
from mgipt_monai.networks.alignment.layers import find_norm_layers
from mgipt_monai.utils.weights import load_source_weights

__all__ = ["SiteRuleHandler"]

ADVICE = (
    "a rule of site correction needs batch norm (norm='batch', track_running_stats=True): train without it (in the "
    "bundle: site_rule false)"
)


class SiteRuleHandler:
    """Learns the rule of site correction for the weights that a training has kept, and writes it beside them.

    When the trainer completes, the weights are loaded into the network, which keeps them, and
    :func:`mgipt_monai.methods.learn_site_rule` runs it over the labelled images. The rule holds for these weights only.

    Args:
        path: the file to write.
        network: the network that is trained, with batch norm.
        weights: file of the weights that the training keeps, such as those of the best epoch.
        batches: labelled source images as the network takes them, without augmentation.
        settings: further arguments of :func:`mgipt_monai.methods.learn_site_rule`, such as ``head`` and ``harm``.

    Raises:
        ValueError: at construction, for a network without batch norm, or a loader of too few images; so that no
            training comes to nothing.

    Example:
        >>> import tempfile, torch
        >>> from ignite.engine import Engine
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
        >>> folder = tempfile.mkdtemp()
        >>> weights, path = os.path.join(folder, "model.pt"), os.path.join(folder, "site_rule.pt")
        >>> torch.save(network.state_dict(), weights)
        >>> batches = [{"image": torch.rand(12, 1, 16, 16), "label": (torch.rand(12, 1, 16, 16) > 0.5).float()}]
        >>> trainer = Engine(lambda engine, batch: None)
        >>> SiteRuleHandler(path, network, weights, batches, sites=1).attach(trainer)
        >>> _ = trainer.run([0])
        >>> os.path.exists(path)
        True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        network: nn.Module,
        weights: str | os.PathLike[str],
        batches: Iterable[Mapping[str, Any]],
        **settings: Any,
    ) -> None:
        find_norm_layers(network, None, ADVICE)
        images = len(getattr(batches, "dataset", range(LEAST_IMAGES)))
        if images < LEAST_IMAGES:
            raise ValueError(
                f"a rule of site correction takes at least {LEAST_IMAGES} labelled source images, got {images}: train "
                "without it (in the bundle: site_rule false)"
            )
        self.path, self.network, self.weights = path, network, weights
        self.batches, self.settings = batches, settings

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after the handler that keeps the weights."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self) -> None:
        """Learn the rule and write the file."""
        load_source_weights(self.network, self.weights)
        learn_site_rule(self.network, self.batches, **self.settings).save(self.path)
