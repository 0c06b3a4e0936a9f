"""Result files: JSON lines, replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvloom._ledger import Ledger, Record, parse_lines, pieces_path
from kvloom._processes import leads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_pieces(out: Path | None, model: PreTrainedModel) -> Ledger:
    """The finished pieces of a results file. Of processes that share a model all read them, and the first one writes.

    Raises:
        DataError: the file of pieces is no ledger, or the results file exists and is not JSON lines.
    """
    if out:
        _read(out)
    path = pieces_path(out) if out else None
    if path is None or leads(model):
        return Ledger(path)
    return Ledger(None, [path] if path.exists() else [])


def write_results(out: Path | None, records: Iterable[Record], model: PreTrainedModel) -> None:
    """`write_records` if there is a results file and, of processes that share a model, in the first one."""
    if out and leads(model):
        write_records(out, records)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Put records into a results file; those with the same `kind` and `id` are replaced.

    The file is replaced as a whole, so that a crash leaves the old one.

    Raises:
        DataError: the file exists and is not JSON lines.
    """
    merged = {(record.get("kind"), record.get("id", n)): record for n, record in enumerate(_read(path))}
    merged |= {(record["kind"], record["id"]): record for record in records}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    lines = [json.dumps(record) + "\n" for record in merged.values()]
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)


def _read(path: Path) -> list[Record]:
    """The records of a results file; none if it is not there."""
    return list(parse_lines(path, path.read_text(encoding="utf-8"))) if path.exists() else []
