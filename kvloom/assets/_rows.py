"""Rows of evaluation data in their published schemas: local files always, the hub where it can be reached."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvloom.errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of a data set.

    Attributes:
        rows: in their order.
        source: where they come from, for records.
    """

    rows: tuple[Row, ...]
    source: str

    @property
    def sha256(self) -> str:
        """Sha256 of the rows, in hex."""
        return sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()

    @property
    def facts(self) -> dict[str, str]:
        """Source and digest, as records have them."""
        return {"source": self.source, "sha256": self.sha256}

    def need(self, *fields: str) -> Rows:
        """The same rows, if every one has these fields.

        Raises:
            DataError: a field is missing, or there are no rows.
        """
        if not self.rows:
            raise DataError(f"{self.source} holds no rows: give the data set's published file.")
        for number, row in enumerate(self.rows, start=1):
            if absent := [field for field in fields if field not in row]:
                raise DataError(
                    f"Row {number} of {self.source} has no {absent[0]!r}: give the data set's published file."
                )
        return self


def local_file(folder: Path | None, name: str) -> Path:
    """A file of a data folder.

    Args:
        folder: of data sets, each in its own folder.
        name: of the file, in that folder.

    Raises:
        DataError: it is not there.
    """
    file = (folder or Path("DATA")) / name
    if folder is None or not file.is_file():
        raise DataError(f"There is no {str(file)!r}: put the published file there and name the folder with --data.")
    return file


def json_file(folder: Path | None, name: str) -> Any:
    """What a JSON file of a data folder holds.

    Raises:
        DataError: it is not there, or is not JSON.
    """
    file = local_file(folder, name)
    try:
        return json.loads(_text(file))
    except ValueError as error:
        raise DataError(f"{str(file)!r} is not JSON ({error}): give the data set's published file.") from error


def jsonl_rows(file: Path) -> Rows:
    """Rows of a file of one JSON object a line.

    Raises:
        DataError: it cannot be read, or a line is not an object.
    """
    return Rows(tuple(parse_rows(_text(file), file.name)), file.name)


def parse_rows(text: str, name: str) -> Iterator[Row]:
    """Rows of a text of one JSON object a line; blank lines are passed over.

    Raises:
        DataError: a line is not an object.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"Line {number} of {name} is not a JSON object: give the data set's published file.")
        yield row


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(file)!r} cannot be read ({error}): give a file of UTF-8 text.") from error
