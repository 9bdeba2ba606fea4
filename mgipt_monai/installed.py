# SPDX-License-Identifier: Apache-2.0
"""What comes with the package: the bundle, the overlays, and which optional packages a part needs.

It imports nothing but the standard library, since ``setup.py`` runs it too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

__all__ = ["copy_folder", "find_config", "installed", "near", "overlays", "presets", "require"]

FILES = {
    "bundle": ("LICENSE", "configs/*", "docs/*", "models/model.pt", "models/model.pt.sha256"),
    "configs": ("*.yaml", "*/*.yaml"),
}
"""The files of each folder that are installed. All else in it is a user's: masks, states, source statistics."""

EXTRAS = {
    "benchmark": {"matplotlib": "matplotlib", "jinja2": "jinja2", "scipy": "scipy", "py_sod_metrics": "pysodmetrics"},
    "commission": {"matplotlib": "matplotlib", "jinja2": "jinja2", "scipy": "scipy"},
    "demo": {"matplotlib": "matplotlib"},
    "export": {"onnx": "onnx"},
    "nnunet": {"nnunetv2": "nnunetv2"},
    "tracking": {"mlflow": "mlflow"},
}
"""Extra to its modules, and the packages that they are from."""


def installed(folder: str = "bundle") -> Path:
    """Return where the ``bundle`` or the overlays (``configs``) are: in the package, or beside it in a checkout.

    Raises:
        FileNotFoundError: if they are in neither place.
    """
    package = Path(__file__).parent
    for place in (package / folder, package.parent / folder):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"there is no {folder} in {package}: reinstall mgipt_monai")


def copy_folder(source: Path, target: Path) -> None:
    """Copy those files of a ``bundle`` or ``configs`` folder that are installed; links become files.

    Raises:
        FileExistsError: if the target is there already.
    """
    if target.exists():
        raise FileExistsError(f"{target} is there already, and nothing is written over it: choose another folder")
    for path in _files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _files(folder: Path) -> list[Path]:
    return sorted(path for pattern in FILES[folder.name] for path in folder.glob(pattern) if path.is_file())


def overlays() -> dict[str, Path]:
    """Return the installed overlays by name, such as ``guard``, ``methods/bn`` and ``presets/fast``."""
    root = installed("configs")
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in _files(root)}


def presets() -> dict[str, Path | None]:
    """Return the presets' overlays by name; the bundle's default, ``paper``, has none."""
    found = {name.rpartition("/")[2]: path for name, path in overlays().items() if name.startswith("presets/")}
    return {"paper": None, **found} | {"paper": None}


def find_config(name: str | os.PathLike, folder: str = "") -> Path:
    """Return the config file of a path, or of the name of an installed overlay.

    Args:
        name: a path that ends in .yaml, .yml or .json, or a name such as ``guard`` or ``methods/bn``.
        folder: where a name is looked up first, such as ``protocols``.

    Raises:
        FileNotFoundError: if there is no such config, with the names of those that there are.
    """
    path, known = Path(name), overlays()
    if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
        return path
    # documents name overlays as configs/methods/bn.yaml
    short = path.as_posix().removesuffix(".yaml").removeprefix("configs/")
    for place in (f"{folder}/{short}", short):
        if place in known:
            return known[place]
    deeper = [other for other in known if other.endswith(f"/{short}")]
    raise FileNotFoundError(
        f"there is no config {path}{near(short, known, deeper)}: give a .yaml or .json file, or one of "
        f"{', '.join(known)}"
    )


def near(name: str, known: Iterable[str], better: Iterable[str] = ()) -> str:
    """Ask in words whether a name that is like this one was meant; nothing where none is like it.

    Example:
        >>> near("gaurd", ["guard", "folder"]), near("x", ["guard"])
        (' (did you mean guard?)', '')
    """
    found = [*better, *get_close_matches(name, list(known), n=1)]
    return f" (did you mean {found[0]}?)" if found else ""


def require(extra: str, *modules: str) -> None:
    """Raise an error with the fix unless an extra's modules are there.

    Args:
        extra: one of ``EXTRAS``.
        modules: those of its modules that are needed; none means all.

    Raises:
        ModuleNotFoundError: naming what is absent and how to install it.

    Example:
        >>> require("demo")
    """
    packages = EXTRAS[extra]
    absent = [packages[module] for module in modules or packages if find_spec(module) is None]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        raise ModuleNotFoundError(
            f'this needs {", ".join(absent)}, which {verb} not installed: pip install "mgipt_monai[{extra}]"'
        )
