"""Reading result records: JSON lines, one record a line, `kind` names the schema."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from kvloom.errors import DataError

Record = dict[str, Any]

NAMED = ("fidelity", "decode", "sample", "needle", "drift", "task", "memory", "signal_comparison")
BENCH = ("ceilings", "backend", "dense", "attend", "encode", "append")
GENERATE = ("generate", "generate_ceilings", "generate_note")
KINDS = (*NAMED, "signal", "random_plan", "front", *(f"kernel_{kind}" for kind in BENCH), *GENERATE)


def load_records(source: str | Path) -> list[Record]:
    """Read the records of one `.jsonl` file, or of every `*.jsonl` file below a folder.

    A last line cut short by an interrupted run is skipped with a `UserWarning`.

    Args:
        source: A file of JSON lines, or a folder searched recursively in sorted order.

    Returns:
        The records in file order; kinds that this version does not know are kept.

    Raises:
        DataError: The path does not exist, a file is not one of kvloom's result files, or no
            record of a kind that this version knows was found.
    """
    records = [record for file in _result_files(Path(source)) for record in _read_file(file)]
    if not records:
        raise DataError(f"{source} holds no result records; write some with `kvloom eval` first.")
    if not any(record["kind"] in KINDS for record in records):
        raise DataError(
            f"{source} holds no record whose `kind` is one of {', '.join(KINDS)}; name results written by kvloom."
        )
    return records


def _result_files(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(source.rglob("*.jsonl"))
    if source.is_file():
        return [source]
    raise DataError(f"{source} does not exist; name a results file (.jsonl) or a folder of them.")


def _read_file(file: Path) -> list[Record]:
    lines = [(number, line) for number, line in enumerate(file.read_bytes().splitlines(), start=1) if line.strip()]
    records: list[Record] = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == lines[-1][0] and line.lstrip().startswith(b"{"):
                warnings.warn(
                    f"{file}, line {number}: the last record is cut short and was skipped; "
                    "run the evaluation again to complete it.",
                    stacklevel=3,
                )
                break
            raise DataError(
                f"{file}, line {number} is not JSON; name a results file written by kvloom, or delete that line."
            ) from error
        records.append(_checked(record, file, number))
    return records


def _checked(record: object, file: Path, number: int) -> Record:
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise DataError(
            f"{file}, line {number} has no `kind`, so it is no result record; name a results file written by kvloom."
        )
    if record["kind"] in NAMED and not isinstance(record.get("name"), str):
        raise DataError(f"{file}, line {number}: the {record['kind']} record has no `name`; run that evaluation again.")
    return record
