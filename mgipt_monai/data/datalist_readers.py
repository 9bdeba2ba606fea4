# SPDX-License-Identifier: Apache-2.0
"""Read lists of images: MONAI's JSON form and CSV tables."""

from __future__ import annotations

import csv
import json
import os
from typing import Any

from monai.data import load_decathlon_datalist

__all__ = ["read_csv", "read_json"]


def read_json(path: str, key: str) -> list[dict[str, Any]]:
    """Read one list of a datalist in MONAI's form, ``{key: [{"image": ..., "label": ...}, ...]}``.

    Relative paths are relative to the file's folder. Further keys are kept.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a list.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        items = load_decathlon_datalist(path, is_segmentation=True, data_list_key=key)
        if not all("image" in item for item in items):
            raise ValueError("an entry has no image")
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f'{path} is not a datalist {{"{key}": [{{"image": ...}}, ...]}}: {error}') from error
    for item, entry in zip(items, content[key], strict=True):
        # MONAI makes a path of every word that names something in the list's folder, such as a site's own folder
        item |= {word: entry[word] for word in ("site", "name") if isinstance(entry, dict) and word in entry}
    return items


def read_csv(path: str) -> list[dict[str, str]]:
    """Read a CSV table, one image per line under a header.

    Columns are ``image`` and optionally ``label`` (or ``mask``), ``site`` and ``name``; others are left out, and so are
    empty cells. Relative paths are relative to the file's folder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, has no column ``image``, or a line without an image.
    """
    # with the mark that spreadsheet programs put before UTF-8
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
            items.append(item | {key: row[key] for key in ("site", "name") if row.get(key)})
    return items
