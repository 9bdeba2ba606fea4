# SPDX-License-Identifier: Apache-2.0
"""Find the images of a stream in a folder, with a glob pattern, or in a list (JSON, CSV)."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.data import load_decathlon_datalist
from monai.utils import ensure_tuple

from mgipt_monai.data.dicom import is_series
from mgipt_monai.data.outputs import check_names
from mgipt_monai.utils.files import IMAGE_ENDINGS, stem

__all__ = ["find_stream", "read_csv", "read_json"]

IMAGES, MASKS = "images", "masks"
FINAL = os.path.join("labels", "final")
"""Where MONAI Label's server keeps final annotations, in the folder of the images."""


def find_stream(
    source: str | os.PathLike[str],
    sites: Sequence[str] | None = None,
    labelled: bool = False,
    limit: int | None = None,
    datalist_key: str = "testing",
) -> list[dict[str, Any]]:
    """List the images of a stream in order.

    A folder of DICOM slices is one image. Any other folder contains images, or ``images/`` and ``masks/``, or one such
    folder per site. The folder name is the name of the site. An image and its mask have the same name (the extension
    may differ). Images are sorted by name within a site.

    Where a folder of images has ``labels/final``, it is the studies folder of a MONAI Label server: if labelled, the
    images with a final annotation are listed, with it.

    Args:
        source: a folder, an image file, a glob pattern, or a datalist, whose order is kept. A datalist is a MONAI JSON
            file with items of ``image`` and optionally ``label``, ``site`` and ``name``, or a CSV file with these
            columns (or ``mask`` instead of ``label``). The default site of a CSV file is its file name.
        sites: the sites to use, in this order; None uses all, with folders in alphabetical order.
        labelled: whether each image needs a mask. A missing mask is reported when the image is loaded.
        limit: at most this number of images per site; None for all.
        datalist_key: key of the list in a JSON datalist.

    Returns:
        Items with ``image``, ``site``, ``name`` (output path without extension) and, if labelled, ``label``.

    Raises:
        FileNotFoundError: if the source does not exist, has no image, or lacks one of the sites.
        ValueError: if two images have the same output name on some system, a name leaves the output folder, a datalist
            is invalid or lacks a mask, or a final annotation cannot be read or is there twice.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "clinic" / "images").mkdir(parents=True)
        >>> (root / "clinic" / "images" / "eye.png").touch()
        >>> item = find_stream(root)[0]
        >>> item["site"], item["name"]
        ('clinic', 'clinic/eye')
    """
    source = os.fspath(source)
    if source.endswith((".json", ".csv")):
        items = _from_datalist(source, datalist_key, labelled)
    elif os.path.isdir(source):
        items = _from_folder(Path(source), labelled)
    else:
        found = sorted(path for path in glob.glob(source, recursive=True) if _is_image(Path(path)))
        items = [_item(Path(path), labelled) for path in found]
    if not items:
        endings = " ".join(IMAGE_ENDINGS)
        raise FileNotFoundError(
            f"no image found at {source!r}: give a folder, a glob pattern or a datalist of images ({endings})"
        )
    if sites is not None:
        absent = [site for site in sites if site not in {item["site"] for item in items}]
        if absent:
            known = ", ".join(dict.fromkeys(item["site"] for item in items))
            raise FileNotFoundError(f"no image of site {', '.join(absent)} at {source!r}: the sites there are {known}")
        items = [item for site in sites for item in items if item["site"] == site]
    check_names(items)
    if limit is not None:
        by_site: dict[str, list[dict[str, Any]]] = {}
        for item in items:
            by_site.setdefault(item["site"], []).append(item)
        kept = {item["name"] for of_site in by_site.values() for item in of_site[:limit]}
        items = [item for item in items if item["name"] in kept]
    return items


def _from_datalist(path: str, key: str, labelled: bool) -> list[dict[str, Any]]:
    items, site = (read_csv(path), Path(path).stem) if path.endswith(".csv") else (read_json(path, key), "")
    for item in items:
        if labelled and "label" not in item:
            raise ValueError(f"{item['image']} has no label in {path}: add its mask, or run without masks")
    # an image with several files, one per channel, is named after the first
    stems = [stem(ensure_tuple(item["image"])[0]) for item in items]
    return [{"site": site, "name": os.path.join(i.get("site", ""), s), **i} for i, s in zip(items, stems, strict=True)]


def _from_folder(root: Path, labelled: bool) -> list[dict[str, Any]]:
    if _images_of(root):
        return _of_site(root, labelled)
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return [item for folder in folders for item in _of_site(folder, labelled, folder.name)]


def _of_site(folder: Path, labelled: bool, site_folder: str = "") -> list[dict[str, Any]]:
    images = _images_of(folder)
    if not labelled or (folder / IMAGES).is_dir() or not (folder / FINAL).is_dir():
        return [_item(path, labelled, site_folder) for path in images]
    labels: dict[str, list[Path]] = {}
    for path in sorted((folder / FINAL).iterdir()):
        # the ending may be of a format that is not read, such as NRRD
        name = stem(path) if path.name.lower().endswith(IMAGE_ENDINGS) else path.stem
        labels.setdefault(name, []).append(path)
    annotated = [path for path in images if stem(path) in labels]
    if images and not annotated:
        raise FileNotFoundError(f"none of the {len(images)} images has a final annotation in {folder / FINAL}")
    return [{**_item(path, False, site_folder), "label": _annotation(path, labels[stem(path)])} for path in annotated]


def _annotation(image: Path, found: Sequence[Path]) -> str:
    """Return the one annotation of an image, if it is in a format that goes with the image's."""
    if len(found) > 1:
        raise ValueError(f"{image} has the final annotations {found[0]} and {found[1]}: keep one")
    (label,) = found
    volumes = [path.name.lower().endswith((".nii", ".nii.gz")) or path.is_dir() for path in (image, label)]
    if not label.name.lower().endswith(IMAGE_ENDINGS) or volumes[0] != volumes[1]:
        raise ValueError(
            f"the annotation {label} of {image.name} cannot be used: save it as {'NIfTI' if volumes[0] else 'PNG'}"
        )
    return str(label)


def _images_of(folder: Path) -> list[Path]:
    folder = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    return [folder] if is_series(folder) else sorted(path for path in folder.iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    return is_series(path) if path.is_dir() else path.name.lower().endswith(IMAGE_ENDINGS)


def _item(image: Path, labelled: bool, site_folder: str = "") -> dict[str, Any]:
    own_folder = image.parent.parent if image.parent.name == IMAGES else image.parent
    item = {
        "image": str(image),
        "site": site_folder or own_folder.name,
        "name": os.path.join(site_folder, stem(image)),
    }
    if labelled:
        masks = own_folder / MASKS
        same = masks / image.name
        others = [] if same.exists() else [masks / f"{stem(image)}{ending}" for ending in IMAGE_ENDINGS]
        item["label"] = str(next((path for path in others if path.exists()), same))
    return item


def read_json(path: str, key: str) -> list[dict[str, Any]]:
    """Read one list of a MONAI datalist, ``{key: [{"image": ..., "label": ...}, ...]}``.

    Relative paths are relative to the file's folder. Other keys are kept.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not such a datalist.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        for number, entry in enumerate(content[key], start=1):
            _check_entry(number, entry)
        items = load_decathlon_datalist(path, is_segmentation=True, data_list_key=key)
    except FileNotFoundError:
        raise
    except Exception as error:
        text = f"it has no key {key}" if isinstance(error, KeyError) else error
        raise ValueError(f'{path} is not a datalist {{"{key}": [{{"image": ...}}, ...]}}: {text}') from error
    for item, entry in zip(items, content[key], strict=True):
        # MONAI turns any value that exists as a path in the folder of the list into a path, such as the name of a site
        item |= {key: entry[key] for key in ("site", "name", "group") if isinstance(entry, dict) and key in entry}
    return items


def _check_entry(number: int, entry: Any) -> None:
    """Raise ValueError for an entry of a JSON datalist whose values have other types than an item's."""
    if isinstance(entry, str):  # as MONAI reads the list "test"
        entry = {"image": entry}
    if not isinstance(entry, dict):
        raise ValueError(f'entry {number} is {_shown(entry)}: write {{"image": "FILE"}}')
    if "image" not in entry:
        raise ValueError(f"entry {number} has no image: {_shown(entry)}")
    for key in ("image", "label"):
        paths = ensure_tuple(entry[key]) if key in entry else ("",)
        if not paths or not all(isinstance(path, str) and "\0" not in path for path in paths):
            raise ValueError(f"entry {number} has {key} {_shown(entry[key])}: write the path of a file as a text")
    for key in ("site", "name", "group"):
        if key in entry and not isinstance(entry[key], str):
            raise ValueError(f"entry {number} has {key} {_shown(entry[key])}: write it as a text, or leave it out")
    rounds = entry.get("round", 1)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"entry {number} has round {_shown(rounds)}: write a whole number from 1, or leave it out")
    if empty := [key for key, value in entry.items() if value is None]:
        raise ValueError(f"entry {number} has no value for {', '.join(empty)}: leave out what is null")


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def read_csv(path: str) -> list[dict[str, str]]:
    """Read a CSV table with a header and one image per line.

    Columns are ``image`` and optionally ``label`` (or ``mask``), ``site``, ``name`` and ``group`` (the patient); other
    columns and empty cells are ignored. Relative paths are relative to the file's folder.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is no table, is empty, or has no column ``image`` or a line without an image.
    """
    try:
        return _read_csv(path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV table in UTF-8 ({error}): save it as one") from error


def _read_csv(path: str) -> list[dict[str, str]]:
    # utf-8-sig skips the byte order mark that spreadsheet programs write
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, skipinitialspace=True)
        if table.fieldnames is None:
            raise ValueError(f"{path} is empty: its first line must name the columns, such as image,label,site")
        if "image" not in table.fieldnames:
            raise ValueError(f"{path} has no column image: its first line is {','.join(table.fieldnames)!r}")
        items = []
        for row in table:
            if not row["image"]:
                raise ValueError(f"{path} has no image in line {table.line_num}")
            paths = {"image": row["image"], "label": row.get("label") or row.get("mask")}
            item = {key: os.path.normpath(os.path.join(os.path.dirname(path), p)) for key, p in paths.items() if p}
            items.append(item | {key: row[key] for key in ("site", "name", "group") if row.get(key)})
    return items
