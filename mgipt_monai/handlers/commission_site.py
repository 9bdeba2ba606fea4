# SPDX-License-Identifier: Apache-2.0
"""Commissions a site in an existing pipeline, with its loader, weights and inferer."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from torch import Tensor

from mgipt_monai.commissioning.commission import check_settings, commission
from mgipt_monai.commissioning.site import commission_cases
from mgipt_monai.commissioning.trial import BASES, read_candidates
from mgipt_monai.handlers.evaluators import check_evaluator, network_of
from mgipt_monai.networks.prompts.early_stop import Head
from mgipt_monai.stream.records import Identifiers
from mgipt_monai.utils.files import file_names, stem

__all__ = ["CommissioningHandler"]


class CommissioningHandler:
    """Commissions a site with the labelled images, network and inferer of a ``SupervisedEvaluator``, not its run.

    When the evaluator starts, and the handlers attached earlier have run (a ``CheckpointLoader`` loads the weights),
    its images and labels are read as its network would get them. :func:`mgipt_monai.commission` then finds out what
    helps on them, the site's folder is written, and the run ends. One additional forward counts the classes.

    Args:
        site_dir: the site's folder, see :func:`mgipt_monai.commissioning.write_site`.
        head: how logits become masks, ``softmax`` (channel 0 is background) or ``sigmoid``.
        mode: ``new``, or ``audit`` to check the certificate in the folder on new labelled images.
        identifiers: whether the page contains the images' ``names`` or hides them (``hashed``).
        settings: of :func:`mgipt_monai.commission`, such as ``candidates`` and ``fallback``.

    Raises:
        ValueError: at construction, for settings out of range.
        TypeError: at construction, for a setting that :func:`mgipt_monai.commission` does not have.

    Example:
        >>> import tempfile
        >>> network = torch.nn.Conv2d(1, 1, 1)
        >>> network.load_state_dict({"weight": torch.full((1, 1, 1, 1), 4.0), "bias": torch.zeros(1)})
        <All keys matched successfully>
        >>> images = [torch.rand(1, 1, 24, 24) for _ in range(6)]
        >>> loader = [{"image": image, "label": (image > 0.7).float()} for image in images]
        >>> evaluator = SupervisedEvaluator("cpu", loader, network=network)
        >>> site = tempfile.mkdtemp()
        >>> CommissioningHandler(site, head="sigmoid", candidates=["none + offset"]).attach(evaluator)
        >>> evaluator.run()  # doctest: +ELLIPSIS
        With 90% confidence, 'none + offset' raises the mean DSC ...
        >>> sorted(name for name in os.listdir(site) if name.startswith("site"))
        ['site.pt', 'site.yaml', 'site_existing.yaml']
    """

    def __init__(
        self,
        site_dir: str | os.PathLike[str],
        head: Head = "softmax",
        mode: Literal["new", "audit"] = "new",
        identifiers: Identifiers = "names",
        **settings: Any,
    ) -> None:
        bound = inspect.signature(commission).bind(None, (), head=head, **settings)
        bound.apply_defaults()
        asked = bound.arguments
        check_settings(**{key: asked[key] for key in inspect.signature(check_settings).parameters})
        read_candidates(asked["candidates"], {**BASES, **(asked["bases"] or {})})
        if mode not in ("new", "audit"):
            raise ValueError(f"mode must be new or audit, got {mode!r}")
        self.site_dir, self.head, self.mode, self.identifiers = site_dir, head, mode, identifiers
        self.settings = settings

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator, after the handler that loads its weights.

        Raises:
            TypeError: for an engine that is not a ``SupervisedEvaluator``, or an inferer that is not supported.
        """
        network_of(check_evaluator(type(self).__name__, engine))
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: SupervisedEvaluator) -> None:
        """Commission, write the folder and end the run."""
        settings = {"device": engine.state.device, "head": self.head, **self.settings}
        if not isinstance(engine.inferer, SimpleInferer):
            settings.setdefault("inferer", engine.inferer)
        engine.network.eval()
        commission_cases(engine.network, self._cases(engine), self.site_dir, self.mode, self.identifiers, **settings)
        engine.terminate()

    def _cases(self, engine: SupervisedEvaluator) -> Iterator[dict[str, Any]]:
        """Yield the evaluator's images and labels as it would pass them to its network, one by one, with a name."""
        classes, number = 0, 0
        for batch in engine.data_loader:
            images, labels = engine.prepare_batch(batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)[
                :2
            ]
            if labels is None:
                raise ValueError(
                    "the evaluator's images have no labels: use the config that evaluates the network, whose "
                    "transforms load both, and point its dataset to the labelled images"
                )
            if not classes:
                with torch.no_grad():
                    outputs = engine.inferer(images[:1], engine.network).shape[1]
                classes = outputs - (self.head == "softmax")
            names = file_names(batch) if isinstance(batch, Mapping) else []
            for place, (image, label) in enumerate(zip(images, labels, strict=True)):
                name = stem(names[place]) if place < len(names) else f"image {number}"
                number += 1
                yield {"image": image, "label": channels_of(label, classes, self.head, name), "name": name}


def channels_of(label: Tensor, classes: int, head: Head, name: str) -> Tensor:
    """Return a label with one channel of 0 and 1 for each class, without the background.

    Args:
        label: (classes, \\*spatial), with softmax also (1 + classes, \\*spatial) with the background first, or class
            numbers from 1 with 0 for the background, (1, \\*spatial).
        classes: number of classes that the network predicts.
        head: how its logits become masks.
        name: of the image, for the message.

    Raises:
        ValueError: for another number of channels, or a class that the network does not have.

    Example:
        >>> channels_of(torch.tensor([[0, 1, 2, 2]]), 2, "softmax", "ct_1").tolist()
        [[0, 1, 0, 0], [0, 0, 1, 1]]
    """
    channels = label.shape[0]
    if channels == classes and (classes > 1 or label.max() <= 1):
        return label
    if channels == classes + 1 and head == "softmax":
        return label[1:]
    if channels != 1:
        raise ValueError(
            f"{name}: the label has {channels} channels and the network predicts {classes} classes ({head} head): give "
            "one channel for each class, or one channel of class numbers"
        )
    if (highest := int(label.max())) > classes:
        raise ValueError(
            f"{name}: the label has class {highest} and the network predicts {classes} classes ({head} head): set "
            "adaptation_head, or map the label's values to 0, 1, ... in the bundle's transforms"
        )
    return torch.cat([label == number for number in range(1, classes + 1)]).to(label.dtype)
