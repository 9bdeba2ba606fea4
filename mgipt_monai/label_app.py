# SPDX-License-Identifier: Apache-2.0
"""Put a bundle into MONAI Label's ``monaibundle`` app, in the form that its server runs.

Run as ``mgipt label-app --app apps/monaibundle``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.bundle import ConfigParser

from mgipt_monai.commissioning.site import SETTING
from mgipt_monai.installed import find_config, installed
from mgipt_monai.methods.commissioned import SiteSetting
from mgipt_monai.utils.files import atomic_path
from mgipt_monai.utils.provenance import fingerprint
from mgipt_monai.utils.weights import load_source_weights

__all__ = ["write_label_bundle"]


def write_label_bundle(
    bundle: str | os.PathLike,
    folder: str | os.PathLike,
    overlays: Sequence[str | os.PathLike] = (),
    ckpt_path: str | os.PathLike | None = None,
) -> None:
    """Write a copy of a bundle that a MONAI Label server can run; an adaptation state in ``folder`` stays as it is.

    The server reads one config, so ``configs/inference.yaml`` is made of the bundle's own, the overlays, and the
    bundle's ``configs/label.yaml``. It loads weights without looking whether they fit, so they are checked here, and
    are the only ``.pt`` file in ``models/``. Classes are numbered in ``metadata.json`` as they are drawn, by
    ``mask_values``. The setting of a commissioned site, where an overlay has one, is copied into ``folder``, so that
    commissioning again does not change what a running server does.

    Args:
        bundle: the bundle's folder.
        folder: where to write. Label tells a model's task by the folder's name: one with ``segmentation`` in it.
        overlays: configs to lay over the bundle's ``inference.yaml``.
        ckpt_path: the source network's weights; None takes the bundle's ``models/model.pt``.

    Raises:
        FileNotFoundError: if a config, the weights or the site's setting are absent.
        ValueError: if the weights do not fit the network, the site was commissioned with other ones, or there are other
            ``.pt`` files in ``folder/models``.
    """
    configs, models = Path(bundle) / "configs", Path(folder) / "models"
    others = sorted(path.name for path in models.glob("*.pt") if path.name != "model.pt")
    if others:
        raise ValueError(f"{models} holds {', '.join(others)}, which MONAI Label might load: leave only model.pt there")
    config = ConfigParser.load_config_files(
        [str(configs / "inference.yaml"), *map(str, overlays), str(configs / "label.yaml")]
    )
    parser = ConfigParser(config)
    network = parser.get_parsed_content("network_def")
    load_source_weights(network, Path(bundle) / "models" / "model.pt" if ckpt_path is None else ckpt_path)
    site = Path(parser.get_parsed_content("site_dir")) / SETTING if "site_dir" in config else None
    if site is not None and SiteSetting.load(site).fingerprint != fingerprint(network):
        raise ValueError(f"{site} was commissioned with other weights: give those, or commission the site again")
    metadata = json.loads((configs / "metadata.json").read_text(encoding="utf-8"))
    names, values = (parser.get_parsed_content(key) for key in ("class_names", "mask_values"))
    drawn = {str(value): name for value, name in zip(values, names, strict=True)}
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": "background", **drawn}

    with atomic_path(models / "model.pt") as part:
        torch.save(network.state_dict(), part)
    if site is not None:
        with atomic_path(Path(folder) / "site" / SETTING) as part:
            shutil.copyfile(site, part)
        config["site_dir"] = "$@bundle_root + '/site'"
    with atomic_path(Path(folder) / "configs" / "metadata.json") as part:
        part.write_text(json.dumps(metadata, indent=4) + "\n", encoding="utf-8")
    with atomic_path(Path(folder) / "configs" / "inference.yaml") as part:
        ConfigParser.export_config_file(config, str(part), fmt="yaml", sort_keys=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the bundle into an app as told on the command line."""
    parser = argparse.ArgumentParser(
        prog="mgipt label-app",
        description="Put a bundle into MONAI Label's monaibundle app.",
        epilog="example: mgipt label-app --app apps/monaibundle --overlays my_network.yaml --ckpt_path network.pt",
    )
    parser.add_argument("--bundle", default=installed(), help="the bundle's folder (default: `mgipt path`)")
    parser.add_argument("--app", required=True, help="the app's folder")
    parser.add_argument("--name", default="mgipt_segmentation", help="the model's name (default %(default)s)")
    parser.add_argument(
        "--overlays", nargs="*", default=[], help="files or installed overlays, merged into inference.yaml"
    )
    parser.add_argument("--ckpt_path", help="the source network's weights (default: the bundle's)")
    options = parser.parse_args(arguments)
    folder = Path(options.app) / "model" / options.name
    try:
        overlays = [find_config(overlay) for overlay in options.overlays]
        write_label_bundle(options.bundle, folder, overlays, options.ckpt_path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{folder}: start the server with --app {options.app} --conf models {options.name}")


if __name__ == "__main__":
    main()
