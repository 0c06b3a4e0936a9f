"""Result files: JSON lines, replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from kvloom._ledger import Record, parse_lines


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Put records into a results file; those with the same `kind` and `id` are replaced.

    The file is replaced as a whole, so that a crash leaves the old one.

    Raises:
        DataError: the file exists and is not JSON lines.
    """
    kept = list(parse_lines(path, path.read_text(encoding="utf-8"))) if path.exists() else []
    merged = {(record.get("kind"), record.get("id", n)): record for n, record in enumerate(kept)}
    merged |= {(record["kind"], record["id"]): record for record in records}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    lines = [json.dumps(record) + "\n" for record in merged.values()]
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)
