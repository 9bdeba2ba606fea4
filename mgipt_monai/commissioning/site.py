# SPDX-License-Identifier: Apache-2.0
"""The folder of a commissioned site: what deploys it, what it rests on, and later labelled images."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from torch import nn

from mgipt_monai.commissioning.audit import Audit, audit
from mgipt_monai.commissioning.commission import Commissioning, commission
from mgipt_monai.data.dataset import FAILURE
from mgipt_monai.methods.commissioned import SiteSetting
from mgipt_monai.stream.pseudonyms import Pseudonyms
from mgipt_monai.utils.outputs import OutputFolder
from mgipt_monai.utils.provenance import versions

__all__ = ["commission_cases", "commission_site", "read_labelled", "with_earlier", "write_site"]

SETTING, OVERLAY, EXISTING, REPORT, PAGE = (
    "site.pt",
    "site.yaml",
    "site_existing.yaml",
    "commissioning.json",
    "commissioning.html",
)
VERSION = 1

Mode = Literal["new", "add", "audit"]


def commission_site(
    network: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    items: Sequence[Mapping[str, Any]],
    output_dir: str | os.PathLike[str],
    mode: Mode = "new",
    identifiers: Literal["names", "hashed"] = "names",
    **settings: Any,
) -> Commissioning | Audit:
    """Commission a site on a dataset and write its folder, or check its certificate on new labelled images.

    Args:
        network: the frozen source network, with its weights.
        dataset: what is labelled, preprocessed: see :func:`read_labelled`.
        items: the same images as :func:`mgipt_monai.find_stream` lists them.
        output_dir: the site's folder.
        mode: ``new`` and ``add`` commission (``items`` of ``add`` are those of :func:`with_earlier`); ``audit`` only
            compares the setting in the folder with no adaptation on these images, and adds the result to
            ``commissioning.json``.
        identifiers: ``hashed`` writes pseudonyms instead of names, with the key in ``commissioning.key``, and no paths.
        settings: of :func:`mgipt_monai.commission`.

    Raises:
        FileNotFoundError: for ``audit`` in a folder without a commissioned setting.
        ValueError: as :func:`mgipt_monai.commission`, and for an image that cannot be read.
    """
    return commission_cases(network, _labelled(dataset, items), output_dir, mode, identifiers, items, **settings)


def commission_cases(
    network: nn.Module,
    cases: Iterable[dict[str, Any]],
    output_dir: str | os.PathLike[str],
    mode: Mode = "new",
    identifiers: Literal["names", "hashed"] = "names",
    items: Sequence[Mapping[str, Any]] = (),
    **settings: Any,
) -> Commissioning | Audit:
    """Commission a site on labelled images that another pipeline reads, as :func:`commission_site` does.

    Args:
        network: the frozen source network, with its weights.
        cases: as for :func:`mgipt_monai.commission`; they are read once, after the settings have been checked.
        output_dir: the site's folder.
        mode: as for :func:`commission_site`.
        identifiers: as for :func:`commission_site`.
        items: where the images are, so that more can be added later; nothing writes none.
        settings: of :func:`mgipt_monai.commission`.

    Raises:
        FileNotFoundError: for ``audit`` in a folder without a commissioned setting.
        ValueError: as :func:`mgipt_monai.commission`.
    """
    if mode not in ("new", "add", "audit"):
        raise ValueError(f"mode must be new, add or audit, got {mode!r}")
    if identifiers not in ("names", "hashed"):
        raise ValueError(f"identifiers must be names or hashed, got {identifiers!r}")
    folder = OutputFolder(output_dir)
    pseudonyms = Pseudonyms(folder.file("commissioning.key")) if identifiers == "hashed" else None
    read: list[dict[str, Any]] = []

    def reading() -> Iterator[dict[str, Any]]:
        """Yield the images, which are read only when the settings have been checked."""
        for case in cases:
            if pseudonyms is not None:
                case |= {key: pseudonyms.of(case[key]) for key in ("name", "group") if key in case}
            read.append(case)
            yield read[-1]

    if mode == "audit":
        return _audit_site(network, reading(), folder, settings)
    result = commission(network, reading(), **settings)
    write_site(result, output_dir, read, items if pseudonyms is None else [])
    _tell(result.statement, folder.path / PAGE, folder.path / OVERLAY)
    return result


def read_labelled(dataset: Iterable[Mapping[str, Any]], items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read a dataset of labelled images, with the names and groups of its items.

    Raises:
        ValueError: for an image or a label that cannot be read, with the reason, or for two files of different sizes.
    """
    return list(_labelled(dataset, items))


def _labelled(dataset: Iterable[Mapping[str, Any]], items: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for case, item in zip(dataset, items, strict=True):
        if FAILURE in case:
            raise ValueError(str(case[FAILURE]))
        # both have the network's size by now
        image, label = (_size_in_file(case[key]) for key in ("image", "label"))
        if image and label and image != label:
            raise ValueError(
                f"{item.get('label', 'the label')} is {'x'.join(map(str, label))}, but its image is "
                f"{'x'.join(map(str, image))}: draw the label on the whole image"
            )
        kept = {key: str(item[key]) for key in ("name", "group") if key in item}
        yield {"image": case["image"], "label": case["label"], **kept}


def _size_in_file(image: Any) -> list[int]:
    """Return the sides of an image's file, without those of one pixel at the end; nothing where they are not known."""
    sides = [int(side) for side in getattr(image, "meta", {}).get("spatial_shape", ())]
    while sides and sides[-1] == 1:
        sides.pop()
    return sides


def with_earlier(
    items: Sequence[dict[str, Any]], output_dir: str | os.PathLike[str], mode: Mode = "new"
) -> list[dict[str, Any]]:
    """Return the labelled images, for ``add`` after those that the site was commissioned on before.

    Raises:
        FileNotFoundError: if the site was not commissioned before.
        ValueError: if the report does not say where its images are, as names were hidden.
    """
    if mode != "add":
        return list(items)
    report = _read_report(Path(output_dir) / REPORT)
    if not report["images"]:
        raise ValueError(
            f"{Path(output_dir) / REPORT} does not say where its images are (their names were hidden, or another "
            "bundle's pipeline read them): commission the site again with all labelled images"
        )
    paths = {os.path.realpath(item["image"]) for item in report["images"]}
    return [*report["images"], *(item for item in items if os.path.realpath(str(item["image"])) not in paths)]


def write_site(
    result: Commissioning,
    output_dir: str | os.PathLike[str],
    labelled: Sequence[Mapping[str, Any]],
    items: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write what :func:`mgipt_monai.commission` found into the site's folder.

    ``site.yaml`` deploys it over the bundle's configs, and ``site_existing.yaml`` over another bundle's; ``site.pt``
    has its numbers, ``commissioning.json`` what it rests on (schema in docs/reference), ``commissioning.html`` a page.

    Args:
        result: of :func:`mgipt_monai.commission`.
        output_dir: the folder.
        labelled: the images and labels that were commissioned on, for the page.
        items: where they are, so that more can be added later; nothing writes none.

    Raises:
        FileExistsError: if a file stands there that no run wrote.
    """
    from mgipt_monai.commissioning.page import commissioning_page

    folder = OutputFolder(output_dir)
    page = commissioning_page(result, labelled)
    if result.setting is None:
        folder.check(SETTING)
        folder.file(SETTING).unlink(missing_ok=True)  # an earlier run's, which no overlay names any more
    else:
        with folder.writing(SETTING) as part:
            result.setting.save(part)
    report = {
        "version": VERSION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "statement": result.statement,
        "certified": result.certified,
        "chosen": result.chosen,
        "gain": result.gain,
        "lower_bound": result.lower_bound,
        "harm": result.harm,
        "harm_bound": result.harm_bound,
        "settings": dict(result.settings),
        "candidates": [asdict(row) for row in result.table],
        "skipped": dict(result.skipped),
        "quality_calibration": result.quality_calibration,
        "cases": result.cases,
        "versions": versions(),
        "images": [_located(item) for item in items],
        "audits": [],
    }
    _write(folder, REPORT, json.dumps(_finite(report), indent=2, ensure_ascii=False) + "\n")
    _write(folder, PAGE, page)
    for name, kind in ((OVERLAY, "bundle"), (EXISTING, "existing")):
        _write(folder, name, _overlay(result, folder.path, kind))


def _located(item: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: item[key] for key in ("name", "site", "group") if key in item}
    return {**{key: os.path.abspath(str(item[key])) for key in ("image", "label")}, **kept}


def _write(folder: OutputFolder, name: str, text: str) -> None:
    with folder.writing(name) as part:
        part.write_text(text, encoding="utf-8")


def _overlay(result: Commissioning, folder: Path, kind: str) -> str:
    """Return an overlay that deploys the setting, over the bundle's configs or an existing bundle's."""
    over_bundle = kind == "bundle"
    head = "@head" if over_bundle else "@adaptation_head"
    network = "@network" if over_bundle else "$@adapted_evaluator.network"
    base = {key: head if value == "@head" else value for key, value in result.base_config.items()}
    base = {"_target_": base.pop("_target_"), "network": network, **base}
    config: dict[str, Any] = {}
    if result.setting is None:
        config["method" if over_bundle else "adaptation"] = base
    else:
        config["site_dir"] = os.path.abspath(folder)
        config["site_base"] = base
        config["method" if over_bundle else "adaptation"] = {
            "_target_": "mgipt_monai.methods.Commissioned",
            "method": "@site_base",
            "site": f"$@site_dir + '/{SETTING}'",
            "head": head,
            # a run that was killed between the two files, or a file of another site, does not pass unnoticed
            "correction": result.setting.correction.digest[:12],
        }
    if over_bundle and result.quality_calibration is not None:
        config["quality_calibration"] = [[round(number, 4) for number in line] for line in result.quality_calibration]
    where = "any of the bundle's configs" if over_bundle else "a bundle's inference config and existing_bundle.yaml"
    lines = [
        f"Overlay on {where}: the site's setting, as `mgipt commission` found it.",
        *textwrap.wrap(result.statement, 116),
    ]
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _finite(value: Any) -> Any:
    """Return a value with None in place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _read_report(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: commission the site first")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["version"] != VERSION or not isinstance(report["images"], list):
            raise ValueError("another version")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a readable report of commissioning ({error}): commission the site again"
        ) from None
    return report


def _audit_site(
    network: nn.Module, labelled: Iterable[Mapping[str, Any]], folder: OutputFolder, settings: Mapping[str, Any]
) -> Audit:
    report = _read_report(folder.file(REPORT))
    path = folder.file(SETTING)
    if not path.is_file():
        raise FileNotFoundError(f"{folder.path} deploys nothing that could be audited: {report['statement']}")
    base = yaml.safe_load(folder.file(OVERLAY).read_text(encoding="utf-8"))["site_base"]
    base = {key: value for key, value in base.items() if key != "network"}
    used = {key: settings[key] for key in ("head", "statistics", "inferer", "confidence") if key in settings}
    used |= {key: report["settings"][key] for key in ("metric", "boundary", "tolerated_loss", "bound", "seed")}
    known = {case["sha256"] for case in report["cases"]}
    found = audit(network, labelled, SiteSetting.load(path), base, known=known, **used)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report["audits"].append(_finite({"date": date, **asdict(found)}))
    _write(folder, REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _tell(found.statement, folder.path / REPORT)
    return found


def _tell(statement: str, *paths: Path) -> None:
    print(statement)
    for path in paths:
        print(path)
