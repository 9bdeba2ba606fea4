# SPDX-License-Identifier: Apache-2.0
"""The command ``mgipt``: a thin front of ``python -m monai.bundle run``, and of the package's other commands."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from mgipt_monai.bundle_runs import BundleRun, as_path, errors_last, read_settings, split_settings
from mgipt_monai.data import find_stream
from mgipt_monai.installed import copy_folder, find_config, installed, near, overlays, presets, require

__all__ = ["main"]


@dataclass(frozen=True)
class BundleCommand:
    """A command that runs the bundle.

    Args:
        what: it does, in a few words.
        folders: the bundle's key of each argument, with the word for it and what to give.
        configs: of the bundle, merged in order.
        example: of its use.
        extra: without which it cannot work.
        weights: whether it takes the source network's weights.
        method: whether it takes a preset of the method.
        resumes: how an interrupted run is continued.
        short: keys of the bundle that have an option with one dash too, with what they are.
    """

    what: str
    folders: Mapping[str, tuple[str, str]]
    configs: Sequence[str]
    example: str
    extra: str | None = None
    weights: bool = True
    method: bool = True
    resumes: str = "--resume True"
    short: Mapping[str, str] = field(default_factory=dict)


SITES = ("SITES", "folder with SITE/images and SITE/masks for each site, or a list of images (JSON, CSV)")
RESULTS = ("RESULTS", "folder to write to")

BUNDLE_COMMANDS = {
    "predict": BundleCommand(
        "adapt to each image of a stream and write its mask",
        {
            "dataset_dir": (
                "IMAGES",
                "folder, glob pattern or list (JSON, CSV) of images: PNG, JPEG, TIFF, BMP, NIfTI",
            ),
            "output_dir": ("MASKS", "folder to write masks and records to"),
        },
        ["inference"],
        "mgipt predict photographs masks --weights network.pt --config my_network.yaml --preset steady",
    ),
    "evaluate": BundleCommand(
        "the same on a stream with masks, and how well it went",
        {"dataset_dir": SITES, "output_dir": RESULTS},
        ["inference", "evaluate"],
        "mgipt evaluate sites results --weights network.pt --config methods/source",
    ),
    "benchmark": BundleCommand(
        "every method over one stream with masks, and a report",
        {"dataset_dir": SITES, "output_dir": RESULTS},
        ["inference", "evaluate", "benchmark"],
        'mgipt benchmark sites results --weights network.pt --rounds 2 --compare "[source, steady, mgipt]"',
        extra="benchmark",
        resumes="the same command",
    ),
    "source-statistics": BundleCommand(
        "measure what source images look like inside a network without batch norm",
        {
            "dataset_dir": ("SOURCE_IMAGES", "images that the network was trained on, or others of their kind"),
            "statistics_path": ("FILE", "file to write, for the key statistics_path of later runs"),
        },
        ["inference", "source_statistics"],
        "mgipt source-statistics source_images statistics.pt --weights network.pt",
        method=False,
        resumes="",
    ),
    "site-rule": BundleCommand(
        "learn from labelled source images how far --preset steady may trust what it sees with this network",
        {
            "dataset_dir": SITES,
            "rule_path": ("FILE", "file to write, for the key rule_path of --preset steady"),
        },
        ["inference", "train", "site_rule"],
        'mgipt site-rule sites rule.pt --sites "[clinic]" --weights network.pt',
        method=False,
        resumes="",
    ),
    "interpolation-weights": BundleCommand(
        "learn from labelled source images how much of an image's statistics each channel takes (method ttn)",
        {
            "dataset_dir": SITES,
            "interpolation_path": ("FILE", "file to write, for the key interpolation_path of --config methods/ttn"),
        },
        ["inference", "train", "interpolation_weights"],
        'mgipt interpolation-weights sites ttn.pt --sites "[clinic]" --weights network.pt',
        method=False,
        resumes="",
    ),
    "commission": BundleCommand(
        "find out on five to twenty labelled images of a site what helps there, and prove it",
        {
            "dataset_dir": ("LABELLED", "folder with images and masks, a list of both, or MONAI Label's studies"),
            "output_dir": ("SITE", "folder to write the report to, and site.yaml, for --config of mgipt predict"),
        },
        ["inference", "evaluate", "commission"],
        "mgipt commission labelled site --weights network.pt",
        extra="commission",
        method=False,
        resumes="",
    ),
    "export": BundleCommand(
        "write a commissioned network as TorchScript, ONNX or weights, which run without this package",
        {
            "site_dir": ("SITE", "folder that mgipt commission wrote, or its site.pt"),
            "export_path": ("FILE", "file to write: .ts (TorchScript), .onnx, or .pt (weights for the same network)"),
        },
        ["inference", "export"],
        "mgipt export site network.ts --weights network.pt",
        method=False,
        resumes="",
    ),
    "suggest": BundleCommand(
        "choose which images of a site to label",
        {
            "dataset_dir": ("IMAGES", "folder, glob pattern or list (JSON, CSV) of images of one site, without masks"),
            "suggestions_path": ("FILE", "datalist to write (JSON), to which you add the masks"),
        },
        ["inference", "suggest"],
        "mgipt suggest photographs to_label.json -k 10 --weights network.pt",
        method=False,
        resumes="",
        short={"k": "number of images to suggest (default 10)"},
    ),
    "train": BundleCommand(
        "train a source network on sites with masks",
        {"dataset_dir": SITES, "output_dir": ("FOLDER", "folder to write model.pt to")},
        ["inference", "train"],
        'mgipt train sites trained --sites "[clinic]" --max_epochs 40',
        weights=False,
        method=False,
    ),
}
ALIASES = {"calibrate": "source-statistics"}

MODULES = {
    "demo": ("mgipt_monai.demo", "three cameras that the network has never seen, without and with adaptation"),
    "records": ("mgipt_monai.report.record_summary", "sum up records of runs, with alerts"),
    "state": ("mgipt_monai.stream.command", "show, roll back or compare a stream's state"),
    "protocol": ("mgipt_monai.benchmark.protocol", "a published benchmark: each site in turn is the source"),
    "report": ("mgipt_monai.report.__main__", "rewrite a benchmark's report"),
    "compare": ("mgipt_monai.benchmark.comparison", "tables of a benchmark, or of several runs, in Markdown"),
    "datalist": ("mgipt_monai.data.datalists", "write a stream as a list of images"),
    "published": ("mgipt_monai.data.published.__main__", "convert a published data set that you have"),
    "nnunet-predict": ("mgipt_monai.nnunet.predict", "nnUNetv2_predict with adaptation"),
    "nnunet-calibrate": ("mgipt_monai.nnunet.calibrate", "measure what source images look like inside an nnU-Net"),
    "label-app": ("mgipt_monai.label_app", "put a bundle into MONAI Label"),
}
"""Commands that are modules of their own."""

RESUMES = {"protocol": "the same command", "nnunet-predict": "--resume"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    # MONAI asks for a DICOM decoder that it does without, each time that it makes a reader
    warnings.filterwarnings("ignore", "NvImgCodecPydicomReader")
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    name = words[0] if words else "--help"
    name = ALIASES.get(name, name)
    if name in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if name == "--version":
        from mgipt_monai import __version__

        print(f"mgipt {__version__}")
        return 0
    resumes = BUNDLE_COMMANDS[name].resumes if name in BUNDLE_COMMANDS else RESUMES.get(name, "")
    with errors_last(debug, resumes):
        if name in BUNDLE_COMMANDS:
            _bundle(name, words[1:])
        elif name in MODULES:
            importlib.import_module(MODULES[name][0]).main(words[1:])
        elif name in FOLDER_COMMANDS:
            FOLDER_COMMANDS[name][0](words[1:])
        else:
            known = [*BUNDLE_COMMANDS, *ALIASES, *MODULES, *FOLDER_COMMANDS]
            print(f"error: there is no command {name}{near(name, known)}: `mgipt --help` has them", file=sys.stderr)
            return 2
    return 0


def _help() -> str:
    commands = {name: command.what for name, command in BUNDLE_COMMANDS.items()}
    commands = {"demo": MODULES["demo"][1], **commands, **{name: what for name, (_, what) in MODULES.items()}}
    commands |= {name: what for name, (_, what) in FOLDER_COMMANDS.items()}
    return "\n".join(
        [
            "usage: mgipt COMMAND ...",
            "",
            "Test-time adaptation for medical image segmentation. `mgipt COMMAND --help` has options and an example.",
            "",
            *(f"  {name:<19}{what}" for name, what in commands.items()),
            "",
            "options: --version; --debug shows the traceback of an error",
            "example: mgipt predict photographs masks --weights network.pt --preset steady",
        ]
    )


def _bundle(name: str, arguments: Sequence[str]) -> None:
    command = BUNDLE_COMMANDS[name]
    parser = _bundle_parser(name, command)
    own = ["--help", "--config", "--bundle", "--bundle_root", "--print-command"]
    own += ["--weights", "--ckpt_path"] * command.weights + ["--preset"] * command.method
    rest, written = split_settings(arguments, own)
    options = vars(parser.parse_args(rest))
    for key in command.folders:  # they may also be given by their keys
        if options[key] is None:
            options[key] = written.pop(key, None)
    missing = [key for key in command.folders if options[key] is None]
    kept, last = options["config"][: -len(missing)], options["config"][-len(missing) :]
    if missing and kept and not any(_is_config(word) for word in last):
        options |= {"config": kept, **dict(zip(missing, last, strict=True))}  # --config has taken them
    elif missing:
        behind = ": put them before --config, which takes all words behind it" if options["config"] else ""
        names = ", ".join(command.folders[key][0] for key in missing)
        parser.error(f"the following arguments are required: {names}{behind}")
    if command.extra:
        require(command.extra)
    overlays = [find_config(config) for config in options.pop("config")]
    preset = options.pop("preset", None)
    if preset is not None and (path := _preset(preset)) is not None:
        overlays.insert(0, path)
    printed, _ = options.pop("print_command"), options.pop("debug")
    bundle = options["bundle_root"] = options["bundle_root"] or str(installed())
    configs = [Path(bundle) / "configs" / f"{config}.yaml" for config in command.configs]
    if absent := [path for path in configs if not path.is_file()]:
        raise FileNotFoundError(f"there is no {absent[0]}: give --bundle a folder such as `mgipt init` writes")
    configs += overlays
    short = {key: value for key in command.short if (value := options.pop(key)) is not None}
    given = {key: as_path(value) for key, value in options.items() if value is not None}
    if twice := (given.keys() | short.keys()) & written.keys():
        raise ValueError(f"{', '.join(sorted(twice))} is given twice: leave out --{min(twice)}")
    config = ConfigParser.load_config_files([str(path) for path in configs])
    if "tracking" in written:
        written["tracking"], more = _tracking(name, written["tracking"], Path(bundle))
        config = {**more, **config}
    run = BundleRun(configs, {**given, **read_settings({**written, **short}, config, own)})
    run.check()
    if name == "train":
        _check_masks(run)
    if printed:
        print(run.command())
        return
    if command.weights and run.has_demo_weights:
        print(
            "note: the network is the demo's, for synthetic photographs of the optic disc; --weights takes yours",
            file=sys.stderr,
        )
    run.run()


def _is_config(word: str) -> bool:
    return Path(word).suffix in (".yaml", ".yml", ".json") or word.removeprefix("configs/") in overlays()


def _tracking(name: str, tracking: str | None, bundle: Path) -> tuple[str, dict[str, Any]]:
    """Return the settings file of a tracking, and the keys that it brings; MONAI's own mlflow knows only the end."""
    if name not in ("predict", "evaluate") and tracking == "mlflow":
        raise ValueError(f"--tracking mlflow works with predict and evaluate, not with {name}")
    path = bundle / "configs" / "tracking_mlflow.yaml" if tracking == "mlflow" else Path(tracking or "")
    if tracking == "mlflow":
        require("tracking")
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: write --tracking mlflow, or --tracking with a file of settings")
    found = ConfigParser.load_config_files(str(path))
    return str(path), {key: value for key, value in found["configs"].items() if key not in found["handlers_id"]}


def _check_masks(run: BundleRun) -> None:
    """Raise an error that names a mask which training would miss only when the image's turn has come."""
    source, sites, limit = (run.value(key) for key in ("dataset_dir", "sites", "limit"))
    masks = [path for item in find_stream(source, sites, True, limit) for path in ensure_tuple(item["label"])]
    if absent := [path for path in masks if not Path(path).is_file()]:
        raise FileNotFoundError(f"{len(absent)} of {len(masks)} images have no mask, the first {absent[0]}: add them")


def _bundle_parser(name: str, command: BundleCommand) -> argparse.ArgumentParser:
    places = " ".join(word for word, _ in command.folders.values())
    parser = argparse.ArgumentParser(
        prog=f"mgipt {name}",
        usage=f"mgipt {name} {places} [options] [--KEY VALUE ...]",
        description=f"{command.what[0].upper()}{command.what[1:]}.",
        epilog=f"example: {command.example}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for key, (word, what) in command.folders.items():
        parser.add_argument(key, metavar=word, nargs="?", help=what)
    if command.weights:
        parser.add_argument(
            "--weights", "--ckpt_path", dest="ckpt_path", metavar="FILE", help="source network's weights"
        )
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="CONFIG",
        help="after the folders, overlays: files of yours, or names of those in `mgipt path configs`, such as guard or "
        "methods/bn. A config is code: take none that you do not trust",
    )
    if command.method:
        parser.add_argument("--preset", help=f"method's settings, under those of --config: {', '.join(presets())}")
    parser.add_argument("--bundle", "--bundle_root", dest="bundle_root", metavar="FOLDER", help="default: `mgipt path`")
    parser.add_argument("--print-command", action="store_true", help="print the equal command of MONAI and end")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for key, what in command.short.items():
        parser.add_argument(f"-{key}", metavar=key.upper(), help=what)
    parser.add_argument_group(
        "any key of the bundle's configs", "--limit 3, --color_mode RGB, --instance_prompt#steps 5"
    )
    return parser


def _preset(name: str) -> Path | None:
    known = presets()
    if name not in known:
        raise ValueError(f"there is no preset {name}{near(name, known)}: choose from {', '.join(known)}")
    return known[name]


def _init(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mgipt init",
        description="Copy the bundle and the overlays to FOLDER/bundle and FOLDER/configs, for you to change.",
        epilog="example: mgipt init mine && mgipt predict photographs masks --bundle mine/bundle",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="nothing in it is written over")
    folder = parser.parse_args(arguments).folder
    targets = {what: folder / what for what in ("bundle", "configs")}
    if present := [str(target) for target in targets.values() if target.exists()]:
        raise FileExistsError(f"{' and '.join(present)} exists, and nothing is written over: choose another folder")
    for what, target in targets.items():
        copy_folder(installed(what), target)
    print(f"{folder / 'bundle'}: run it with --bundle {folder / 'bundle'}")
    print(f"{folder / 'configs'}: merge one with --config {folder / 'configs'}/NAME.yaml")


def _path(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mgipt path",
        description="Print the folder of the installed bundle, or of the overlays.",
        epilog='example: python -m monai.bundle run --config_file "$(mgipt path)/configs/inference.yaml" '
        '--bundle_root "$(mgipt path)" --dataset_dir photographs --output_dir masks',
    )
    parser.add_argument("what", nargs="?", choices=("bundle", "configs"), default="bundle", help="default: bundle")
    print(installed(parser.parse_args(arguments).what))


FOLDER_COMMANDS: Mapping[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "init": (_init, "copy the bundle and the overlays, for you to change"),
    "path": (_path, "print where the bundle is, or the overlays"),
}


if __name__ == "__main__":
    sys.exit(main())
