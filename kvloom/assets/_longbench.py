"""LongBench (Bai et al. 2023, arXiv 2308.14508)."""

from __future__ import annotations

import zipfile
from pathlib import Path

from kvloom.assets._hub import hub_file
from kvloom.assets._rows import Rows, jsonl_rows, local_file, parse_rows
from kvloom.errors import DataError

_REPOSITORY = "THUDM/LongBench"
_FIELDS = ("input", "context", "answers", "all_classes", "_id")


def longbench_rows(name: str, folder: Path | None) -> Rows:
    """Rows of one set, in the published schema.

    Args:
        name: of the set.
        folder: with `longbench/NAME.jsonl`; None takes the hub's.

    Raises:
        DataError: there are none, or they lack a field.
    """
    rows = _hub(name) if folder is None else jsonl_rows(local_file(folder, f"longbench/{name}.jsonl"))
    return rows.need(*_FIELDS)


def _hub(name: str) -> Rows:
    inside = f"data/{name}.jsonl"
    try:
        with zipfile.ZipFile(hub_file(_REPOSITORY, "data.zip")) as archive:
            text = archive.read(inside).decode()
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"data.zip of {_REPOSITORY} has no {inside}: name a folder of local files with --data."
        ) from error
    return Rows(tuple(parse_rows(text, inside)), f"{_REPOSITORY}/{inside}")
