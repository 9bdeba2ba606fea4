# SPDX-License-Identifier: Apache-2.0
"""Runs several methods over one stream, one after the other, and writes their results."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from ignite.engine import Events
from torch import nn

from mgipt_monai.engines import StreamFailedError, StreamingAdaptationEvaluator
from mgipt_monai.handlers import PeakMemoryHandler, TestTimeAdaptationHandler
from mgipt_monai.inferers import AdaptiveInferer
from mgipt_monai.methods import AdaptationMethod, Source
from mgipt_monai.report.folder import SCHEMA, SCHEMA_VERSION
from mgipt_monai.report.pictures import PictureWriter
from mgipt_monai.stream.records import Identifiers, RecordFile, check_identifiers
from mgipt_monai.utils.outputs import OutputFolder
from mgipt_monai.utils.provenance import fingerprint

from .results import summarise, timing, write_images_csv

__all__ = ["Benchmark"]

logger = logging.getLogger(__name__)

FILES = ("results.json", "timing.json", "images.csv", "report.html", "records.key")
METHOD_FILES = (
    "adaptation_state.pt",
    "adaptation_state.pt.attempt",
    "records.jsonl",
    "records.runs.json",
    "records.key",
    "settings.json",
)


class Benchmark:
    """Runs each method over the same stream and writes results, tables and a report.

    ``output_dir`` gets ``results.json`` (the same for an interrupted and resumed run), ``timing.json``, ``images.csv``,
    ``report.html``, and a folder per method with its records, its adaptation state and small **pictures of the images**
    for the report. The cost is the sum of the costs of the methods.

    Args:
        evaluator: builds a :class:`StreamingAdaptationEvaluator` over the stream. It is called for each method with
            ``inferer`` and ``val_handlers`` (in a config: the evaluator with ``_mode_: callable``).
        methods: name to method, or to a function that builds it (in a config: with ``_mode_: callable``). The first
            :class:`Source` is the baseline.
        output_dir: folder to write to.
        compare: names of the methods to run, in this order; None runs all.
        resume: continue an interrupted run with the same settings; False starts again.
        identifiers: ``hashed`` hides the images' names in everything that is written, see
            :class:`mgipt_monai.stream.records.AuditTrail`; the key is ``records.key`` in ``output_dir``.
        settings: plain settings of the stream that a resumed run must share (seed, order, rounds, ...). ``seed`` is
            that of the bootstrap; ``reset_at_site`` is passed to each :class:`TestTimeAdaptationHandler`.
        about: what the report's title names beside the network, such as ``data`` and ``weights``; texts.

    Raises:
        ValueError: at construction, if there is no method or ``compare`` has an unknown name.
    """

    def __init__(
        self,
        evaluator: Callable[..., StreamingAdaptationEvaluator],
        methods: Mapping[str, AdaptationMethod | Callable[[], AdaptationMethod]],
        output_dir: str | os.PathLike[str],
        compare: list[str] | None = None,
        resume: bool = True,
        settings: Mapping[str, Any] | None = None,
        identifiers: Identifiers = "names",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        unknown = [name for name in compare or [] if name not in methods]
        if not methods:
            raise ValueError("methods is empty: give at least one method")
        if unknown:
            raise ValueError(f"there is no method {', '.join(unknown)}: choose from {', '.join(methods)}")
        self.methods = {name: methods[name] for name in compare or methods}
        self.evaluator, self.folder, self.resume = evaluator, OutputFolder(output_dir), resume
        self.settings = {"seed": 0, "order": "sites", "rounds": 1, "reset_at_site": False, **(settings or {})}
        self.identifiers = check_identifiers(identifiers)
        self.about = {key: str(value) for key, value in (about or {}).items()}
        self.unit: str | None = None

    def run(self) -> dict[str, Any]:
        """Run what has not been run yet, and return the content of ``results.json``.

        Raises:
            FileExistsError: at the start, if files stand in ``output_dir`` that no run wrote.
            ModuleNotFoundError: at the start, if a package that the report needs is not installed.
            ValueError: if ``output_dir`` holds a run with other settings, or no image was processed by every method.
        """
        # imported here because the rest of the package does not need matplotlib
        from mgipt_monai.report.page import write_report

        self.folder.prepare()
        self.folder.claim(*FILES, *(f"{name}/{file}" for name in self.methods for file in METHOD_FILES))
        settings: dict[str, Any] = {}
        prompts: dict[str, Any] = {}
        lines: dict[str, str] = {}
        baseline, weights, about = None, "", self.about
        for name in self.methods:
            method = self._build(name)
            settings[name], weights = method.settings(), fingerprint(method.network)
            lines[name], about = self._line(name, method), {**self.about, "network": described(method.network)}
            self._run(name, method, {**self.settings, "weights": weights, "method": settings[name]})
            prompts[name] = {side: prompt.tolist() for side, prompt in method.prompt_maps().items()}
            baseline = name if baseline is None and isinstance(method, Source) else baseline
        results = self._write({**self.settings, "weights": weights, "methods": settings}, baseline, about)
        for name, method in results["methods"].items():
            method |= {"prompts": prompts[name], "about": lines[name]}
        self._write_json("results.json", results)
        logger.info("report: %s", write_report(self.folder.path))
        return results

    def _build(self, name: str) -> AdaptationMethod:
        method = self.methods[name]
        if not isinstance(method, AdaptationMethod):
            method = method()
        method.reset()
        return method

    def _run(self, name: str, method: AdaptationMethod, settings: dict[str, Any]) -> None:
        wanted = self._check_settings(name, settings)
        folder = self.folder.path / name
        logger.info("%s", name)
        keeps = TestTimeAdaptationHandler(
            state_path=folder / "adaptation_state.pt",
            record_path=folder / "records.jsonl",
            resume=self.resume,
            reset_at_site=self.settings["reset_at_site"],
            snapshots=0,
            identifiers=self.identifiers,
            key_path=self.folder.path / "records.key",  # one for all methods, whose images are compared
        )
        changes_input = type(method).adapted_input is not AdaptationMethod.adapted_input
        evaluator = self.evaluator(
            inferer=AdaptiveInferer(method),
            val_handlers=[
                PeakMemoryHandler(),
                PictureWriter(
                    folder / "pictures",
                    adapted_input=method.adapted_input if changes_input else None,
                    reference=self.folder.path / "reference" / "pictures",
                    shown=keeps.shown,
                ),
                keeps,
            ],
        )
        self.unit = self.unit or unit_of_distances(evaluator.data_loader)
        # with the first image, as the handler replaces the records of an earlier run
        evaluator.add_event_handler(
            Events.ITERATION_STARTED(once=1), lambda: self._write_json(f"{name}/settings.json", wanted)
        )
        try:
            evaluator.run()
        except StreamFailedError as error:
            logger.warning("%s: %s", name, error)

    def _check_settings(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Refuse to mix runs with different settings; return those of this run as they are saved."""
        path = self.folder.file(f"{name}/settings.json")
        wanted = json.loads(json.dumps(settings))
        if self.resume and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
            if differing:
                raise ValueError(
                    f"{path.parent} holds a run of {name} with other settings ({', '.join(differing)}): choose another "
                    "output_dir, or start again with resume=False"
                )
        return wanted

    def _line(self, name: str, method: AdaptationMethod) -> str:
        """Return the first line of the documentation of what builds a method, such as ``MGIPT.released``."""
        builder = getattr(self.methods[name], "func", None)  # of a config: a partial function of the class
        named = builder if inspect.isclass(builder) or inspect.ismethod(builder) else type(method)
        return (inspect.getdoc(named) or "").partition("\n")[0]

    def _write(self, settings: dict[str, Any], baseline: str | None, about: dict[str, str]) -> dict[str, Any]:
        runs = {name: RecordFile(self.folder.path / name / "records.jsonl").read() for name in self.methods}
        figures = summarise(runs, baseline, self.settings["seed"], self.unit)
        results = {"schema": SCHEMA, "version": SCHEMA_VERSION, "about": about, "settings": settings, **figures}
        self._write_json("timing.json", timing(runs))
        write_images_csv(runs, self.folder.file("images.csv"))
        return results

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        with self.folder.writing(name) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def described(network: nn.Module) -> str:
    """Return a network's class and size.

    Example:
        >>> described(nn.Conv2d(3, 2, 1))
        'Conv2d, 8 parameters'
    """
    return f"{type(network).__name__}, {sum(parameter.numel() for parameter in network.parameters()):,} parameters"


def unit_of_distances(loader: Any) -> str | None:
    """Return the unit of distances between the masks of a stream: pixels, mm for NIfTI; None if it is not known.

    Example:
        >>> from monai.data import DataLoader, Dataset
        >>> unit_of_distances(DataLoader(Dataset([{"label": "eye.png"}])))
        'pixels'
    """
    items = getattr(getattr(loader, "dataset", None), "data", None) or ()
    paths = [item.get("label") if isinstance(item, Mapping) else None for item in items]
    names = [os.fspath(path).lower() for path in paths if isinstance(path, (str, os.PathLike))]
    if len(names) < len(paths):
        return None
    volumes = {name.endswith((".nii", ".nii.gz")) for name in names}
    return None if len(volumes) != 1 else "mm" if volumes.pop() else "pixels"
