"""Finished pieces of work: JSON lines that survive a killed run."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import DataError

Record = dict[str, Any]


def fingerprint(of: object) -> str:
    """Short hash of anything JSON can write: the key of a piece of work."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:20]


def pack_floats(values: Tensor) -> str:
    """Float32 values as base64 of their little-endian bytes: exact, 5.3 characters a value."""
    return base64.b64encode(values.float().numpy().astype("<f4").tobytes()).decode()


def unpack_floats(text: str) -> Tensor:
    """Inverse of `pack_floats`."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())


class Ledger:
    """Finished pieces of work, one JSON line each with a `key`, appended as they come.

    A last line that a killed run cut short is dropped; its piece is done again.

    Args:
        path: the file, made on the first piece; None keeps the pieces in memory only.
        others: files of other runs that share the work; they are read and never changed.

    Raises:
        DataError: a file exists and is no ledger.
    """

    def __init__(self, path: Path | None, others: Iterable[Path] = ()) -> None:
        self.path = path
        self._pieces: dict[str, Record] = {}
        for other in others:
            self._take(other, _whole_lines(other.read_bytes()))
        if path is not None and path.exists():
            self._read(path)

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def __getitem__(self, key: str) -> Record:
        return self._pieces[key]

    def add(self, kind: str, key: str, piece: Mapping[str, Any]) -> None:
        """Keep a finished piece."""
        record = {"kind": kind, "key": key, **piece}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self._pieces[key] = record

    def fill(self, kind: str, keys: Sequence[str], work: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Do work that makes the pieces of all keys at once, unless they are there; those that are there stay."""
        if all(key in self for key in keys):
            return
        for key, piece in zip(keys, work(), strict=True):
            if key not in self:
                self.add(kind, key, piece)

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = _whole_lines(data)
        if len(whole) < len(data):
            path.write_bytes(whole)
        self._take(path, whole)

    def _take(self, path: Path, whole: bytes) -> None:
        for record in parse_lines(path, whole.decode()):
            if "key" not in record:
                raise DataError(f"{path} is not a file of unfinished kvloom work: delete it.")
            self._pieces[record["key"]] = record


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def pieces_path(results: Path) -> Path:
    """Where the pieces of a results file lie: beside it, under a name no report reads."""
    return results.with_name(results.name + ".pieces")


def parse_lines(path: Path, text: str) -> Iterator[Record]:
    """The objects of a file of JSON lines.

    Raises:
        DataError: a line is no JSON object.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, line {number} is not a JSON object: name another results file, or delete that line."
            )
        yield record
