# SPDX-License-Identifier: Apache-2.0
"""Put any MONAI bundle into MONAI Label's ``monaibundle`` app, in the form that its server runs.

Run as ``mgipt label-app --app apps/monaibundle``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from mgipt_monai.commissioning.site import SETTING
from mgipt_monai.installed import find_config, installed, presets
from mgipt_monai.methods.commissioned import SiteSetting
from mgipt_monai.utils.files import atomic_path, root_cause
from mgipt_monai.utils.provenance import fingerprint
from mgipt_monai.utils.weights import load_source_weights

__all__ = ["write_label_bundle"]

METHOD = (
    *("identifiers", "seed", "statistics_path", "rule_path", "head", "offset", "instance_prompt", "global_prompts"),
    *("ensemble", "jitter", "guard", "memory", "max_forwards", "method"),
)
"""Keys of the own bundle's ``inference.yaml`` that another bundle gets."""
SERVED = ("state_path", "record_path", "instance_prompt#lr", "global_prompts#lr", "inferer", "tell_result")
"""Keys of the own bundle's ``label.yaml`` that another bundle gets."""
WINDOWS = {"adaptation_windows": 2, "adaptation_slices": "shared"}
"""Further settings for another bundle, as in ``existing_bundle.yaml``."""
_MOVED = {"_target_": "CopyItemsd", "allow_missing_keys": True}
HIDE_PATH = {
    "hide_path": [
        {**_MOVED, "keys": "image_path", "names": "path_of_image"},
        {"_target_": "DeleteItemsd", "keys": "image_path"},
    ]
}
"""Before a bundle's preprocessing: MONAI's ``Spacingd`` takes the server's ``image_path``, a string, for metadata."""
SHOW_PATH = {**_MOVED, "keys": "path_of_image", "names": "image_path"}
"""Undoes ``HIDE_PATH``: the server's writer needs the path."""
MAPS = ("segmentation", "labels")
"""Formats of an output, as the zoo's metadata have them, that are a map of classes."""
KINDS = {
    **dict.fromkeys(("classes", "classification", "labels"), "classifies images"),
    "points": "finds points",
    **dict.fromkeys(("dict", "object", "boxes"), "detects objects"),
}
"""What a network does whose output has another format; any other makes images."""
PROMPTS = ("instance_prompt", "global_prompts")
"""Keys of the parts of a method that change the image."""
NO_IMAGE = re.compile(r"click|guidance|signal|scribble|prompt|point|mask", re.IGNORECASE)
"""Names of input channels that are no image."""
OWN_FILE = re.compile(r"@bundle_root\s*\+\s*(['\"])/?(?P<path>[^'\"]+)\1")
"""How a config names a file of its bundle."""


def write_label_bundle(
    bundle: str | os.PathLike,
    folder: str | os.PathLike,
    overlays: Sequence[str | os.PathLike] = (),
    ckpt_path: str | os.PathLike | None = None,
    head: str | None = None,
    statistics: str | os.PathLike | None = None,
) -> None:
    """Write a copy of a bundle that a MONAI Label server can run; an adaptation state in ``folder`` stays as it is.

    The server reads one config, so ``configs/inference.yaml`` is made of the bundle's own, the overlays, and what a
    server needs. The project's bundle brings that in ``configs/label.yaml``. Any other bundle, in JSON or YAML, keeps
    its network, preprocessing, inferer and postprocessing; a :class:`mgipt_monai.PersistentInferer` predicts through
    its inferer, and the method has the keys of the project's ``inference.yaml``, so that presets and methods are
    overlays here too. The bundle itself is only read.

    The server loads weights without looking whether they fit, so they are checked here, and are the only ``.pt`` file
    in ``models/``. Whatever else would stop its first request is raised here. For the project's bundle, classes are
    numbered in ``metadata.json`` as they are drawn, by ``mask_values``. Source statistics, and the setting of a
    commissioned site, are copied into ``folder``, so that measuring again does not change what a running server does.

    Args:
        bundle: the bundle's folder.
        folder: where to write. Label tells a model's task by the folder's name: one with ``segmentation`` in it.
        overlays: configs to lay over the bundle's inference config.
        ckpt_path: the source network's weights; None takes the bundle's ``models/model.pt``.
        head: ``softmax`` (channel 0 is background) or ``sigmoid`` (one structure per channel). None takes the config's,
            for another bundle than the project's ``softmax``.
        statistics: file of source statistics, needed by networks without batch norm; None takes the config's.

    Raises:
        FileExistsError: if there is a bundle in ``folder`` that was not written here.
        FileNotFoundError: if a config, the weights, the statistics or the site's setting are absent.
        ValueError: if the bundle is no segmentation, or takes clicks and the prompts' ``channels`` are not set; if
            the weights do not fit the network, the method does not fit the network or its inferer, the site was
            commissioned with other weights, the bundle's config has keys of the same names as the method's, or there
            are other ``.pt`` files in ``folder/models``.
    """
    bundle, folder = Path(bundle), Path(folder)
    _check_target(bundle, folder)
    own = (bundle / "configs" / "label.yaml").is_file()
    metadata = _metadata(bundle)
    if own:
        configs = bundle / "configs"
        config = ConfigParser.load_config_files(
            [str(configs / "inference.yaml"), *map(str, overlays), str(configs / "label.yaml")]
        )
    else:
        config = _adapted(bundle, overlays, next(iter(metadata["network_data_format"]["outputs"])))
        _check_kind(bundle.name, metadata["network_data_format"], config)
    if head is not None:
        config["head"] = head
    if statistics is not None:
        config["statistics_path"] = os.fspath(statistics)

    parser = ConfigParser({**config, "bundle_root": str(bundle)})
    with _code_of(bundle):
        network = _made(parser, "network_def")
        load_source_weights(network, bundle / "models" / "model.pt" if ckpt_path is None else ckpt_path)
        site = Path(parser.get_parsed_content("site_dir")) / SETTING if "site_dir" in config else None
        if site is not None and SiteSetting.load(site).fingerprint != fingerprint(network):
            raise ValueError(f"{site} was commissioned with other weights: give those, or commission the site again")
        measured = parser.get_parsed_content("statistics_path")
        if measured is not None and not os.path.isfile(measured):
            raise FileNotFoundError(f"there are no source statistics at {measured}")
        for key in () if own else ("inferer", "preprocessing", "postprocessing"):
            _made(parser, key)
    if own:
        names, values = (parser.get_parsed_content(key) for key in ("class_names", "mask_values"))
        drawn = {str(value): name for value, name in zip(values, names, strict=True)}
        metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": "background", **drawn}

    with atomic_path(folder / "models" / "model.pt") as part:
        torch.save(network.state_dict(), part)
    if site is not None:
        _copy(site, folder / "site" / SETTING)
        config["site_dir"] = "$@bundle_root + '/site'"
    if measured is not None:
        _copy(Path(measured), folder / "source_statistics.pt")
        config["statistics_path"] = "$@bundle_root + '/source_statistics.pt'"
    if not own:
        config = _with_files(config, bundle, folder)
    with atomic_path(folder / "configs" / "metadata.json") as part:
        part.write_text(json.dumps(metadata, indent=4) + "\n", encoding="utf-8")
    with atomic_path(folder / "configs" / "inference.yaml") as part:
        ConfigParser.export_config_file(config, str(part), fmt="yaml", sort_keys=False)


def _check_target(bundle: Path, folder: Path) -> None:
    written = folder / "configs" / "inference.yaml"
    ours = written.is_file() and "mgipt_monai.PersistentInferer" in written.read_text(encoding="utf-8")
    # before the first time there may be the state of a server, and nothing else that could be written over
    others = [path.name for path in folder.iterdir() if path.name != "adaptation"] if folder.is_dir() else []
    if (others and not ours) or written.with_suffix(".json").is_file() or folder.resolve() == bundle.resolve():
        raise FileExistsError(f"{folder} has files that this command did not write: give another --name")
    others = sorted(path.name for path in (folder / "models").glob("*.pt") if path.name != "model.pt")
    if others:
        raise ValueError(
            f"{folder / 'models'} holds {', '.join(others)}, which MONAI Label might load: leave only model.pt there"
        )


def _metadata(bundle: Path) -> dict[str, Any]:
    path = bundle / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    data = metadata.get("network_data_format", {})
    if not data.get("inputs") or not data.get("outputs"):
        raise ValueError(f"{path} has no network_data_format with inputs and outputs, which MONAI Label reads")
    return dict(metadata)


def _check_kind(name: str, data: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise ValueError for a bundle that is no segmentation, or whose input has channels that must not be prompted."""
    inputs, outputs = data["inputs"], data["outputs"]
    image, output = next(iter(inputs.values())), next(iter(outputs.values()))
    told = output.get("format", MAPS[0])
    # one number for each class
    flat = 1 in output.get("spatial_shape", ()) and 1 not in image.get("spatial_shape", ())
    if told not in MAPS or (flat and told != MAPS[0]):
        does = next((KINDS[each] for each in (told, output.get("type")) if each in KINDS), "makes images")
        raise ValueError(
            f"{name} {does} (format {told} in metadata.json): only segmentation can be adapted. If its output is a map "
            f"of logits, write format {MAPS[0]} there, in a copy"
        )
    if len(inputs) > 1:
        raise ValueError(f"{name} takes {', '.join(inputs)}: adaptation passes only an image to the network")
    if len(outputs) > 1 and "output" not in config["method"]:
        raise ValueError(
            f"{name} returns {', '.join(outputs)}: adaptation gives one map of logits. Name it in an overlay with "
            f"method#output: {next(iter(outputs))}, whose postprocessing needs no other"
        )
    names = {str(channel): str(name) for channel, name in (image.get("channel_def") or {}).items()}
    guided = [name for name in names.values() if NO_IMAGE.search(name)]
    guided += sorted({*re.findall(r"Add\w*(?:Guidance|Click)\w*", json.dumps(config, default=str))})
    if guided and any(config[prompt] and "channels" not in config[prompt] for prompt in PROMPTS):
        images = [int(channel) for channel, name in names.items() if not NO_IMAGE.search(name)]
        raise ValueError(
            f"{name} takes clicks or guidance beside the image ({', '.join(guided)}), which must not be prompted: "
            "name the image's channels in an overlay with "
            + " and ".join(f"{prompt}#channels: {images or [0]}" for prompt in PROMPTS)
        )


def _adapted(bundle: Path, overlays: Sequence[str | os.PathLike], prediction: str) -> dict[str, Any]:
    """Return the inference config of a bundle that knows nothing of adaptation, with it and the overlays."""
    # the server looks for them in this order
    found = [path for end in ("json", "yaml", "yml") if (path := bundle / "configs" / f"inference.{end}").is_file()]
    if not found:
        raise FileNotFoundError(
            f"{bundle / 'configs'} has no inference.json or inference.yaml: is it a bundle's folder?"
        )
    config = ConfigParser.load_config_file(found[0])
    if "network_def" not in config:
        raise ValueError(f"{found[0]} has no network_def, which MONAI Label builds the network from")
    ours, served = (
        ConfigParser.load_config_file(installed() / "configs" / f"{name}.yaml") for name in ("inference", "label")
    )
    taken = {
        "bundle_inferer",
        "bundle_preprocessing",
        "bundle_postprocessing",
        *HIDE_PATH,
        *METHOD,
        *WINDOWS,
        *(key for key in SERVED if key != "inferer"),
    }
    if same := sorted(taken & set(config)):
        raise ValueError(f"{found[0]} has {', '.join(same)}, which adaptation needs for itself: rename it in a copy")
    parser = ConfigParser({**config, **{key: ours[key] for key in METHOD}, **WINDOWS, "head": "softmax"})
    for overlay in overlays:
        for key, value in ConfigParser.load_config_file(overlay).items():
            merge_kv(parser, key, value)

    config = parser.get()
    alone = config.get("evaluator", {}).get("inferer", {"_target_": "SimpleInferer"})
    config["bundle_inferer"] = config.pop("inferer", alone)
    for key, older in (("preprocessing", "pre_transforms"), ("postprocessing", "post_transforms")):
        parts = [config.pop(name) for name in (key, older) if name in config]
        config[f"bundle_{key}"] = parts[0] if parts else []
        steps = f"list(getattr(@bundle_{key}, 'transforms', @bundle_{key}))"
        # one flat list, since the server exchanges its readers and leaves out its writers only there
        config[key] = {
            "_target_": "Compose",
            "transforms": f"$@{'hide_path' if key == 'preprocessing' else 'tell_result'} + {steps}",
        }
    config |= HIDE_PATH
    config["network"] = "@network_def"  # the server has one of its own on the device
    parser = ConfigParser(config)
    for key in SERVED:
        merge_kv(parser, key, served[key])
    config = parser.get()
    config["displayable_configs"] = {**config.get("displayable_configs", {}), **served["displayable_configs"]}
    config["inferer"] |= {
        "inferer": "@bundle_inferer",
        "windows": "@adaptation_windows",
        "slices": "@adaptation_slices",
    }
    config["tell_result"][0]["keys"] = prediction
    config["tell_result"].append(SHOW_PATH)
    return dict(config)


@contextmanager
def _code_of(bundle: Path) -> Iterator[None]:
    """Let a bundle's own ``scripts`` be imported, as the server does, and forget them."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
            del sys.modules[name]

    forget()
    sys.path.insert(0, str(bundle))
    try:
        yield
    finally:
        sys.path.remove(str(bundle))
        forget()


def _made(parser: ConfigParser, key: str) -> Any:
    try:
        return parser.get_parsed_content(key)
    except RuntimeError as error:  # of MONAI, around the part's own
        cause = root_cause(error)
        fix = " (here --statistics FILE)" if "existing_source_statistics" in cause else ""
        raise ValueError(f"{key}: {cause}{fix}") from error


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as part:
        shutil.copyfile(source, part)


def _with_files(config: dict[str, Any], bundle: Path, folder: Path) -> dict[str, Any]:
    """Copy a bundle's scripts, licence and the files that its config names; return the config with their places."""
    if (bundle / "scripts").is_dir():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(bundle / "scripts", folder / "scripts", dirs_exist_ok=True, ignore=ignored)
    if (bundle / "LICENSE").is_file():
        _copy(bundle / "LICENSE", folder / "LICENSE")

    def place(found: re.Match) -> str:
        path = found["path"]
        if path.startswith("models/model.") or ".." in Path(path).parts or not (bundle / path).is_file():
            return found[0]
        # not into models/, where the server might take it for weights
        copied = re.sub("^models/", "resources/", path)
        _copy(bundle / path, folder / copied)
        return found[0].replace(path, copied)

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [changed(item) for item in value]
        return OWN_FILE.sub(place, value) if isinstance(value, str) else value

    return dict(changed(config))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the bundle into an app as told on the command line."""
    parser = argparse.ArgumentParser(
        prog="mgipt label-app",
        description="Put a bundle, the project's or any other in JSON or YAML, into MONAI Label's monaibundle app.",
        epilog="example: mgipt label-app --app apps/monaibundle --bundle spleen_ct_segmentation --preset fast",
    )
    parser.add_argument("--bundle", default=installed(), help="the bundle's folder (default: `mgipt path`)")
    parser.add_argument("--app", required=True, help="the app's folder")
    parser.add_argument(
        "--name", help="the model's name (default mgipt_segmentation, for another bundle its folder's name)"
    )
    parser.add_argument("--preset", choices=presets(), default="paper", help="method's settings (default %(default)s)")
    parser.add_argument(
        "--overlays", nargs="*", default=[], help="files or installed overlays, merged into the inference config"
    )
    parser.add_argument(
        "--head", choices=("softmax", "sigmoid"), help="how channels become a mask (default: the config's)"
    )
    parser.add_argument("--statistics", help="file of source statistics, for networks without batch norm")
    parser.add_argument("--ckpt_path", help="the source network's weights (default: the bundle's)")
    options = parser.parse_args(arguments)
    bundle = Path(options.bundle).resolve()
    own = (bundle / "configs" / "label.yaml").is_file()
    name = options.name or ("mgipt_segmentation" if own else bundle.name)
    folder = Path(options.app) / "model" / name
    try:
        overlays = [
            path for path in (presets()[options.preset], *map(find_config, options.overlays)) if path is not None
        ]
        write_label_bundle(bundle, folder, overlays, options.ckpt_path, options.head, options.statistics)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{folder}: start the server with --app {options.app} --conf models {name}")


if __name__ == "__main__":
    main()
