# SPDX-License-Identifier: Apache-2.0
"""Lays `configs/existing_bundle.yaml` over configs like those of MONAI's model zoo: what adapts, what is refused.

    python benchmarks/zoo_overlays.py                   # all, in half an hour on a busy core
    python benchmarks/zoo_overlays.py --only SwinUNETR  # those whose name has this in it
    python benchmarks/zoo_overlays.py --only UNesT --unest renalStructures_UNEST_segmentation  # the zoo's bundle

The configs are made here, with the zoo's networks (small ones, random weights), its ways to cut images, and two random
images of different size each. Every bundle runs first without the overlay; networks without batch norm are then
measured with `configs/existing_source_statistics.yaml`. A bundle is `green` if both images were adapted to, both masks
have their image's size, and no weight has changed. It is `refused` if the package itself says why; anything else is a
defect.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.inferers import Inferer
from monai.networks.nets import UNet
from monai.networks.nets.dints import DiNTS, TopologyInstance
from monai.utils import set_determinism
from torch import Tensor, nn

from mgipt_monai import RecordFile
from mgipt_monai.utils.files import first_cause, is_own

CONFIGS = Path(__file__).parents[1] / "configs"
ADAPT, MEASURE = (CONFIGS / f"existing_{name}.yaml" for name in ("bundle", "source_statistics"))
CLASSES = 3


class Cut(NamedTuple):
    """How a bundle runs its network on images: the network's axes, the images' sides, the inferer."""

    dims: int
    sides: Sequence[tuple[int, ...]]
    inferer: Mapping[str, Any]


SLICES = {"_target_": "SliceInferer", "spatial_dim": 2}
SLIDING = {"_target_": "SlidingWindowInferer", "sw_batch_size": 4, "overlap": 0.5, "mode": "gaussian"}


def cuts(side: int = 32) -> dict[str, Cut]:
    """Return the zoo's ways to cut images, for a network whose windows need this first side."""
    wide, less = side + 8, side - 2
    return {
        "whole volume": Cut(3, [(less, 28, 32), (side, 32, 40)], {"_target_": "SimpleInferer"}),
        "windows": Cut(3, [(wide, 30, 32), (side, 36, 28)], {**SLIDING, "roi_size": [side, 32, 32]}),
        "slices": Cut(2, [(wide, 36, 5), (less, 48, 4)], {**SLICES, "roi_size": [side, 32]}),
        "whole image": Cut(2, [(60, 50), (41, 70)], {"_target_": "SimpleInferer"}),
        "tiles": Cut(2, [(wide, 50), (less, 70)], {**SLIDING, "roi_size": [side, 32]}),
    }


OWN = "zoo_overlays.OwnInferer"
HOVERNET = {
    "_target_": "monai.apps.pathology.inferers.SlidingWindowHoVerNetInferer",
    "roi_size": 256,
    "overlap": 0.36,
    "extra_input_padding": [46, 46, 46, 46],
}


LIGHT = {"adaptation_windows": 1, "adaptation#instance_sizes": [1], "adaptation#global_sizes": [3]}
"""Settings for networks that cannot be made small: a forward takes seconds, a backward gigabytes."""
UNEST = {"_target_": "scripts.networks.unest.UNesT", "in_channels": 1, "out_channels": CLASSES}
"""The network of two of the zoo's bundles, in their own scripts, with windows of 96 x 96 x 96."""


class Bundle(NamedTuple):
    """One bundle: its network for a number of axes, and what else of the zoo is like it."""

    network: Mapping[str, Any]
    cut: Cut
    channels: int = 1
    evaluator: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}
    writes: bool = True


def networks(dims: int, channels: int = 1) -> dict[str, dict[str, Any]]:
    """Return the zoo's networks as config entries, small, for a number of axes."""
    both = {"spatial_dims": dims, "in_channels": channels, "out_channels": CLASSES}
    unet = {"_target_": "UNet", **both, "channels": [4, 8, 16], "strides": [2, 2], "num_res_units": 1}
    dynunet = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]}
    flexible = {"backbone": "efficientnet-b0", "decoder_channels": [16, 8, 8, 4, 4]}
    features = {"features": [4, 4, 8, 8, 8, 4]}
    swin = {"feature_size": 12, "depths": [1, 1, 1, 1]}
    vision = {"img_size": 32, "feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
    return {
        "UNet, batch norm": {**unet, "norm": "batch", "act": "prelu", "dropout": 0.15},
        "UNet, instance norm": unet,
        "SegResNet": {"_target_": "SegResNet", **both, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]},
        "SwinUNETR": {"_target_": "SwinUNETR", **both, **swin},
        "DynUNet": {"_target_": "DynUNet", **both, **dynunet, "norm_name": "instance", "res_block": True},
        "DiNTS": {"_target_": "zoo_overlays.dints", **both},
        "FlexibleUNet": {"_target_": "FlexibleUNet", **both, **flexible},
        "BasicUNet": {"_target_": "BasicUNet", **both, **features},
        # like UNesT, which is no part of MONAI: layer norm in a transformer, instance norm in its decoder
        "UNETR": {"_target_": "UNETR", **both, **vision},
    }


def bundles() -> dict[str, Bundle]:
    """Return every bundle by name: each network in each cut, then those with something of their own."""
    found = {}
    for way in cuts():
        for name in networks(2):
            # its positions are those of one size, so it sees no whole images of others
            if name != "UNETR" or not way.startswith("whole"):
                cut = cuts(64 if name == "SwinUNETR" else 32)[way]
                found[f"{name}, {way}"] = Bundle(networks(cut.dims)[name], cut)
    volume, windows, slices, image, tiles = cuts().values()
    batch, first = "UNet, batch norm", {"adaptation#prompted_channels": [0]}
    hovernet = {"_target_": "HoVerNet", "mode": "fast", "in_channels": 3, "out_classes": CLASSES}
    nuclei = Bundle(hovernet, Cut(2, [(256, 256), (300, 256)], HOVERNET), 3, writes=False)
    adapt = {**windows.inferer, "_target_": "SlidingWindowInfererAdapt"}
    placed = Bundle({"_target_": "zoo_overlays.Placed"}, tiles._replace(inferer={**tiles.inferer, "with_coord": True}))
    return found | {
        "DynUNet with guidance": Bundle(networks(3, 3)["DynUNet"], volume, 3, settings=first),
        "BasicUNet with clicks": Bundle(networks(3, 5)["BasicUNet"], volume, 5, settings=first),
        "four sequences, sigmoid": Bundle(
            networks(3, 4)["SegResNet"], windows, 4, settings={"adaptation_head": "sigmoid"}
        ),
        "mixed precision": Bundle(networks(3)[batch], windows, evaluator={"amp": True}),
        "each slice an image": Bundle(networks(2)[batch], slices, settings={"adaptation_slices": "own"}),
        "windows that leave the GPU": Bundle(networks(3)[batch], windows._replace(inferer=adapt)),
        "HoVerNet": nuclei,
        "HoVerNet, its output named": nuclei._replace(settings={"adaptation#output": "nucleus_prediction", **LIGHT}),
        "windows with coordinates": placed,
        "an inferer of its own": Bundle(networks(2)[batch], image._replace(inferer={"_target_": OWN})),
    }


def dints(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Return a small DiNTS, whose blocks are made first."""
    space = TopologyInstance(channel_mul=0.125, num_blocks=2, num_depths=2, spatial_dims=spatial_dims)
    return DiNTS(space, in_channels, out_channels, spatial_dims=spatial_dims)


class Placed(nn.Module):
    """A network that also wants to know where a window lies."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = UNet(2, 1, CLASSES, (4, 8), (2,), norm="batch")

    def forward(self, x: Tensor, place: Sequence[Any]) -> Tensor:
        """Return logits that are higher on the right."""
        return self.inner(x) + 1e-3 * float(place[0][-1].start)


class OwnInferer(Inferer):
    """An inferer that only this bundle has."""

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Run the network on the image."""
        return network(inputs)


def inference_config(bundle: Bundle) -> dict[str, Any]:
    """Return the `inference.json` of a bundle, with the entries and names that the zoo has."""
    image = {"keys": "image"}
    whole = bundle.cut.inferer["_target_"] in ("SimpleInferer", OWN)
    pads = [{"_target_": "DivisiblePadd", **image, "k": 32}] if whole else []
    writing = [
        {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"},
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "resample": False},
    ]
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "device": "cpu",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "network_def": bundle.network,
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", **image, "ensure_channel_first": True},
                {"_target_": "ScaleIntensityd", **image},
                *pads,
                {"_target_": "EnsureTyped", **image},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': sorted(glob.glob(case + '/*'))} for case in sorted(glob.glob(@dataset_dir + '/*'))]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": bundle.cut.inferer,
        "postprocessing": {"_target_": "Compose", "transforms": writing if bundle.writes else []},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            },
            {"_target_": "StatsHandler", "iteration_log": False},
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            **bundle.evaluator,
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@evaluator.run()"],
    }


def write_images(folder: Path, bundle: Bundle) -> list[tuple[int, ...]]:
    """Write two random images, a file for each channel, and return their sides."""
    sides = bundle.cut.sides
    generator = np.random.default_rng(0)
    for case, shape in enumerate(sides):
        (folder / f"case_{case}").mkdir(parents=True)
        for channel in range(bundle.channels):
            image = nib.Nifti1Image(generator.normal(100, 20, shape).astype("float32"), np.eye(4))
            nib.save(image, folder / f"case_{case}" / f"{case}_{channel}.nii.gz")
    return list(sides)


def run(config: Path, overlays: Sequence[Path] = (), **settings: Any) -> ConfigParser:
    """Run a bundle in this process as `python -m monai.bundle run` does; return its parsed config."""
    flow = ConfigWorkflow(
        [str(path) for path in (config, *overlays)],
        logging_file=False,
        bundle_root=str(config.parents[1]),
        **settings,
    )
    flow.initialize()
    flow.run()
    return flow.parser


def outcome(bundle: Bundle, root: Path) -> tuple[str, str]:
    """Return `green`, `refused` or `DEFECT`, and what was said or found."""
    set_determinism(seed=0, use_deterministic_algorithms=None)
    (root / "configs").mkdir()
    (root / "models").mkdir()
    config = root / "configs" / "inference.json"
    ConfigParser.export_config_file(inference_config(bundle), str(config))
    ConfigParser.export_config_file({}, str(config.with_name("metadata.json")))
    sides = write_images(root / "data", bundle)
    network = ConfigParser(dict(bundle.network)).get_parsed_content("")
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    torch.save(weights, root / "models" / "model.pt")
    try:
        run(config)
    except Exception as error:
        return "DEFECT", f"of the config itself, which does not run without the overlay: {first_cause(error)}"
    few = {"adaptation#steps": 1, "output_dir": str(root / "adapted"), **bundle.settings}
    try:
        if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules()):
            run(config, [MEASURE])
            few["statistics_path"] = str(root / "adaptation" / "source_statistics.pt")
        parser = run(config, [ADAPT], **few)
    except Exception as error:
        cause = first_cause(error)
        return ("refused" if is_own(cause) else "DEFECT"), str(cause)
    return verdict(parser, root, sides, weights, bundle.writes)


def verdict(
    parser: ConfigParser, root: Path, sides: Sequence[tuple[int, ...]], weights: Mapping[str, Tensor], writes: bool
) -> tuple[str, str]:
    """Look at what a run has left."""
    rows = RecordFile(root / "adaptation" / "records.jsonl").read()
    if [row["status"] for row in rows] != ["ok", "ok"]:
        return "DEFECT", f"records: {[row['status'] for row in rows]}"
    after = parser.get_parsed_content("network").state_dict()
    if not all(torch.equal(value, after[key]) for key, value in weights.items()):
        return "DEFECT", "weights or stored statistics have changed"
    masks = [nib.load(path) for path in sorted((root / "adapted").rglob("*.nii.gz"))]
    if writes and [mask.shape for mask in masks] != list(sides):
        return "DEFECT", f"masks of {[mask.shape for mask in masks]} for images of {list(sides)}"
    return "green", ", ".join(f"{row['forwards']} F" for row in rows)


def unest(bundle: str) -> Bundle:
    """Return the bundle of UNesT, whose code is in the zoo's bundle of this folder."""
    sys.path.insert(0, bundle)
    windows = {**SLIDING, "sw_batch_size": 1, "roi_size": [96, 96, 96]}
    return Bundle(UNEST, Cut(3, [(96, 96, 96), (90, 96, 80)], windows), settings=LIGHT)


def table(found: Mapping[str, Bundle]) -> Iterator[tuple[str, str, str]]:
    """Yield name, outcome and detail of each bundle."""
    for name, bundle in found.items():
        with tempfile.TemporaryDirectory() as folder:
            yield name, *outcome(bundle, Path(folder).resolve())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if there is a defect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the bundles to run")
    parser.add_argument("--unest", help="folder of a bundle of the zoo that has UNesT in its scripts, to run it too")
    words = parser.parse_args(arguments)
    known = bundles() | ({"UNesT": unest(words.unest)} if words.unest else {})
    found = []
    for name, result, detail in table({name: bundle for name, bundle in known.items() if words.only in name}):
        print(f"| {name} | {result} | {detail.splitlines()[0]} |", flush=True)
        found.append(result)
    print(", ".join(f"{found.count(each)} {each}" for each in ("green", "refused", "DEFECT")))
    return int("DEFECT" in found)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.exit(main())
