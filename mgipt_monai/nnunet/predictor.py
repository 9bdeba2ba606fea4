# SPDX-License-Identifier: Apache-2.0
"""An nnU-Net predictor that adapts: each preprocessed volume is one image for the method."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn

from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.installed import find_config, installed, near, presets
from mgipt_monai.methods.base import AdaptationMethod
from mgipt_monai.networks.alignment import SourceStatistics
from mgipt_monai.networks.alignment.layers import GIVE_A_FILE, MEASURE
from mgipt_monai.networks.prompts.early_stop import Head
from mgipt_monai.nnunet.folds import FoldEnsemble
from mgipt_monai.nnunet.sliding_window import NnunetSlices, NnunetWindows
from mgipt_monai.utils.files import root_cause
from mgipt_monai.utils.provenance import fingerprint

__all__ = ["DEFAULT", "AdaptivePredictor", "find_statistics", "fold_networks", "method_presets"]

DEFAULT = "source"
"""The preset that is used where none is given, see docs/results/nnunet.md."""

Make = Callable[..., AdaptationMethod]


class AdaptivePredictor(nnUNetPredictor):
    """An nnU-Net predictor that adapts to each case before it predicts it.

    The whole preprocessed volume is one image for the method: mirrored passes and patches are forwards of that image.
    Adapted logits come from nnU-Net's own sliding window, with its Gaussian weights, mirroring, autocast and half
    precision; prompts, statistics and losses are in single precision. With ``source`` they are bit-identical to those
    of the predictor that is wrapped. All of nnU-Net's ``predict_from_...`` can be called; a case that cannot be adapted
    to (constant, or with NaN) raises an error and leaves the adaptation state as it was. Cases adapt one after another
    in the order of the call. The state lasts as long as the predictor; ``mgipt nnunet-predict`` keeps it in a file.

    Each fold is a network of its own with its own method and state, and the logits of all are averaged
    (:class:`FoldEnsemble`). The wrapped predictor is not changed. A network that was compiled runs uncompiled.

    Args:
        predictor: an initialised predictor.
        method: a preset of the method or ``source``, see :func:`method_presets`; or a callable such as
            :class:`mgipt_monai.MGIPT`, called for each fold with its network, ``statistics`` and ``head``.
        statistics: a folder or file that ``mgipt nnunet-calibrate`` wrote, which networks without batch norm need; or
            statistics as such.
        windows: maximum number of patches in which the alignment loss is measured; see :class:`AdaptiveInferer`.
        configs: overlays on a preset, files or names such as ``guard``.

    Raises:
        TypeError: for a predictor that is not initialised.
        ValueError: for a cascade, an unknown preset, or a method that does not fit the network.

    Example:
        ::

            predictor = nnUNetPredictor(device=torch.device("cpu"))
            predictor.initialize_from_trained_model_folder("nnUNetTrainer__nnUNetPlans__3d_fullres", None)
            adaptive = AdaptivePredictor(predictor, "fast", statistics="statistics")
            adaptive.predict_from_files("imagesTs", "masks")
    """

    def __init__(
        self,
        predictor: nnUNetPredictor,
        method: str | Make = DEFAULT,
        statistics: str | os.PathLike[str] | SourceStatistics | None = None,
        windows: int = 2,
        configs: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        make = preset_maker(method, configs) if isinstance(method, str) else method
        networks = fold_networks(predictor)
        self.__dict__.update(vars(predictor))
        self.head: Head = "sigmoid" if self.label_manager.has_regions else "softmax"
        of_folds = [find_statistics(statistics, network) for network in networks]
        methods = [
            make(network, statistics=own, head=self.head) for network, own in zip(networks, of_folds, strict=True)
        ]
        self.method = methods[0] if len(methods) == 1 else FoldEnsemble(methods)
        self.network = self.method.network
        patch = self.configuration_manager.patch_size
        self.is_flat = len(patch) == 2 and self.plans_manager.plans["original_median_shape_after_transp"][0] == 1
        volumes_in_slices = len(patch) == 2 and not self.is_flat
        own = NnunetSlices(predictor) if volumes_in_slices else NnunetWindows(predictor)
        self.inferer = AdaptiveInferer(self.method, own, windows)

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Adapt to one case and predict it.

        Args:
            data: the preprocessed case (C, \\*spatial).

        Returns:
            Logits (K, \\*spatial) in half precision on the CPU, as nnU-Net's.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(min(default_num_processes, threads))  # as nnU-Net does
        try:
            return self.to_logits(self.method(self.to_image(data).to(self.device)))
        finally:
            torch.set_num_threads(threads)

    def to_image(self, data: Tensor) -> Tensor:
        """Return a preprocessed case (C, \\*spatial) as an image (1, C, \\*spatial), a 2D one without slices."""
        if self.is_flat and data.shape[1] != 1:
            raise ValueError(f"the network takes 2D images, got a volume of shape {tuple(data.shape[1:])}")
        return (data[:, 0] if self.is_flat else data)[None]

    def to_logits(self, logits: Tensor) -> Tensor:
        """Return a method's logits (1, K, \\*spatial) as nnU-Net goes on with them."""
        found = logits[0].detach().to("cpu", torch.half)
        return found[:, None] if self.is_flat else found


def fold_networks(predictor: nnUNetPredictor) -> list[nn.Module]:
    """Return a copy of a predictor's network for each of its folds, on its device, without deep supervision.

    Raises:
        TypeError: for a predictor that is not initialised.
        ValueError: for a cascade.
    """
    if not isinstance(predictor, nnUNetPredictor) or predictor.network is None:
        raise TypeError("the predictor is not initialised: call initialize_from_trained_model_folder first")
    previous = predictor.configuration_manager.previous_stage_name
    if previous is not None:
        raise ValueError(
            f"this is the second stage of a cascade, after {previous}, whose masks are channels of its input: "
            "adaptation supports only configurations that take the image alone"
        )
    plain = getattr(predictor.network, "_orig_mod", predictor.network)
    networks = []
    for weights in predictor.list_of_parameters or [plain.state_dict()]:
        network = copy.deepcopy(plain)
        network.load_state_dict(weights)
        if hasattr(getattr(network, "decoder", None), "deep_supervision"):
            network.decoder.deep_supervision = False
        networks.append(network.to(predictor.device).eval())
    return networks


def find_statistics(
    statistics: str | os.PathLike[str] | SourceStatistics | None, network: nn.Module
) -> SourceStatistics | None:
    """Return the statistics that belong to a network's weights, from a folder of them, a file, or as such.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if none belong to these weights.
    """
    if statistics is None or isinstance(statistics, SourceStatistics):
        return statistics
    paths = sorted(Path(statistics).glob("*.pt")) if os.path.isdir(statistics) else [Path(statistics)]
    weights = fingerprint(network)
    for found in map(SourceStatistics.load, paths):
        if found.fingerprint == weights:
            return found
    raise ValueError(
        f"{statistics} has no source statistics of these weights: measure them with mgipt nnunet-calibrate"
    )


def method_presets() -> dict[str, Path | None]:
    """Return the presets for nnU-Nets: those of ``mgipt predict``, and ``source``, without adaptation."""
    return {"source": find_config("methods/source"), **presets()}


def preset_maker(name: str, configs: Sequence[str | os.PathLike[str]] = ()) -> Make:
    """Return a function that builds the method of a preset and of overlays on it.

    Raises:
        FileNotFoundError: for an unknown overlay.
        ValueError: for an unknown preset.
    """
    known = method_presets()
    if name not in known:
        raise ValueError(f"there is no preset {name}{near(name, known)}: choose from {', '.join(known)}")
    files = [installed() / "configs" / "inference.yaml", known[name], *map(find_config, configs)]
    paths = [str(path) for path in files if path is not None]

    def make(network: nn.Module, statistics: SourceStatistics | None, head: Head) -> AdaptationMethod:
        config: dict[str, Any] = ConfigParser.load_config_files(paths)
        parser = ConfigParser({**config, "head": head})
        parser["network"], parser["statistics_path"] = network, statistics
        try:
            method = parser.get_parsed_content("method")
        except RuntimeError as error:  # of MONAI, around the method's own
            measure = "measure them with `mgipt nnunet-calibrate`, and give --statistics"
            cause = root_cause(error).replace(GIVE_A_FILE, measure).replace(MEASURE, "`mgipt nnunet-calibrate`")
            raise ValueError(f"the preset {name} does not fit this network: {cause}") from error
        assert isinstance(method, AdaptationMethod)
        return method

    return make
