# SPDX-License-Identifier: Apache-2.0
"""Names of version 0.1 that have moved: each still works for one version, with a warning that gives the new name.

Old modules are not kept as files. A finder answers the import of one with a module that looks every name up in its
new place. Remove this module, and the two lines that call it in the packages, with version 0.3.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

__all__ = ["install", "renamed_names"]

PACKAGE = __name__.partition(".")[0]

MODULES = {
    "audit_trail": "stream.records",
    "benchmark.tables": "benchmark.results",
    "data.adaptation_result": "data.transforms",
    "data.cameras": "data.demo.cameras",
    "data.datalist_readers": "data.streams",
    "data.demo_stream": "data.demo.stream",
    "data.fundus_vessels": "data.demo.fundus",
    "data.label_map": "data.masks",
    "data.save_mask": "data.masks",
    "data.site_camera": "data.demo.cameras",
    "data.stream_dataset": "data.dataset",
    "data.stream_order": "data.order",
    "data.stream_share": "data.order",
    "data.synthetic_fundus": "data.demo.fundus",
    "data.uncertainty": "data.masks",
    "data.write_image": "data.masks",
    "errors": "utils.files",
    "file_names": "utils.files",
    "fingerprint": "utils.provenance",
    "handlers.source_statistics": "handlers.measure_source",
    "handlers.stream_position": "stream.images",
    "handlers.supervised_evaluator": "handlers.evaluators",
    "image_measures": "metrics",
    "losses": "networks.nets.losses",
    "methods.cotta": "methods.weight_updates.cotta",
    "methods.grata": "methods.weight_updates.grata",
    "methods.guarded": "methods.guard.guarded",
    "methods.image_checks": "methods.base",
    "methods.prediction_losses": "methods.weight_updates.losses",
    "methods.sar": "methods.weight_updates.sar",
    "methods.settings": "methods.base",
    "methods.site_calibration": "methods.site_correction",
    "methods.tent": "methods.weight_updates.tent",
    "methods.trained_copy": "methods.weight_updates.base",
    "methods.views": "methods.weight_updates.views",
    "methods.weight_adaptation": "methods.weight_updates.base",
    "networks.aligned_layer": "networks.alignment.norms",
    "networks.blended_norms": "networks.alignment.norms",
    "networks.calibration": "networks.alignment.norms",
    "networks.disagreement": "networks.ensemble",
    "networks.early_stop": "networks.prompts.early_stop",
    "networks.forward_end": "networks.alignment.shortcuts",
    "networks.frequency_prompt": "networks.prompts.frequency",
    "networks.frozen_prelu": "networks.alignment.shortcuts",
    "networks.fused_normalization": "networks.alignment.fused",
    "networks.global_prompts": "networks.prompts.global_prompts",
    "networks.guard": "methods.guard.guard",
    "networks.input_sides": "networks.nets.resunet",
    "networks.instance_prompt": "networks.prompts.instance_prompt",
    "networks.jitter": "networks.prompts.early_stop",
    "networks.layer_features": "networks.alignment.layers",
    "networks.loss_memory": "methods.guard.loss_memory",
    "networks.measure_source": "networks.alignment.source_statistics",
    "networks.memory_layout": "networks.alignment.shortcuts",
    "networks.norm_layers": "networks.alignment.layers",
    "networks.pranet": "networks.nets.pranet",
    "networks.prompt_step": "networks.prompts.frequency",
    "networks.res2net": "networks.nets.pranet",
    "networks.resunet": "networks.nets.resunet",
    "networks.site_norms": "networks.alignment.site",
    "networks.site_statistics": "networks.alignment.site",
    "networks.source_statistics": "networks.alignment.source_statistics",
    "networks.state_checks": "utils.state_checks",
    "networks.thresholds": "methods.guard.guard",
    "networks.windows": "networks.alignment.windows",
    "persistent_inferer": "inferers",
    "protocol": "benchmark.protocol",
    "pseudonyms": "stream.pseudonyms",
    "records": "stream.records",
    "report.alerts": "report.record_summary",
    "report.chart_style": "report.styles",
    "report.chosen": "report.examples",
    "report.comparison": "benchmark.comparison",
    "report.formats": "report.tables",
    "report.prompt_maps": "report.charts",
    "report.protocol": "benchmark.protocol",
    "report.record_reader": "report.record_summary",
    "report.record_table": "report.record_summary",
    "report.records": "report.record_summary",
    "report.stream_chart": "report.charts",
    "state": "stream.command",
    "state_file": "utils.files",
    "stream_content": "stream.state_file",
    "stream_file": "stream.state_file",
    "summary": "stream.summary",
    "versions": "utils.provenance",
    "weights": "utils.weights",
}
"""Old module to new module, without the package's name."""

NAMES = {
    "SiteCalibration": "SiteCorrection",
}
"""Old name of a class or function to its new one, where it changed."""


def install() -> None:
    """Let imports of old modules find the new ones."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def renamed_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that gives old names their new object, with a warning.

    Args:
        module: the module's own name.
        names: old name to the full new one, ``module.name``.
    """

    def look_up(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].rpartition(".")
        _warn(f"{module}.{name}", names[name])
        return getattr(importlib.import_module(place), new)

    return look_up


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes with version 0.3", DeprecationWarning, stacklevel=3)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads the old modules: every name in one is looked up in the new module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != PACKAGE or old not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=fullname)

    def get_source(self, fullname: str) -> str:
        # asked for by ``python -m`` alone: an old command runs the new one
        new = _new_name(fullname)
        return (
            "import runpy, warnings\n"
            f"warnings.warn('python -m {fullname} is now python -m {new}', DeprecationWarning, stacklevel=1)\n"
            f"runpy.run_module({new!r}, run_name='__main__')"
        )

    def exec_module(self, module: ModuleType) -> None:
        new = _new_name(module.__name__)

        def look_up(name: str) -> Any:
            there = importlib.import_module(new)
            if name == "__all__":
                return there.__all__
            found = NAMES.get(name, name)
            if name.startswith("__") or not hasattr(there, found):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}; it is now {new}")
            _warn(f"{module.__name__}.{name}", f"{new}.{found}")
            return getattr(there, found)

        module.__getattr__ = look_up  # type: ignore[method-assign]


def _new_name(old: str) -> str:
    return f"{PACKAGE}.{MODULES[old.partition('.')[2]]}"
