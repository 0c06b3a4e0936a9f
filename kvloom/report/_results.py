"""The results table of the page: the shared columns, grouped by budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from kvloom.report._columns import COLUMNS, Cell
from kvloom.report._format import format_budget, format_count, join_words
from kvloom.report._records import Record
from kvloom.report._runs import Row, Run, of_kind, unique
from kvloom.report._style import Style, method_style
from kvloom.report._values import number


@dataclass(frozen=True)
class TableRow:
    """A row of cells; `first` opens a budget, `best` has its lowest KLD."""

    cells: tuple[Cell, ...]
    style: Style
    first: bool
    best: bool


@dataclass(frozen=True)
class ResultsTable:
    """The table of one run."""

    title: str
    rows: tuple[TableRow, ...]
    decode: str


def build_results(runs: Sequence[Run], records: Sequence[Record]) -> list[ResultsTable]:
    """A table for each run, and how the decode speeds in it were measured."""
    decode = _decode(of_kind(records, "decode"))
    return [_table(run, decode) for run in runs]


def _decode(records: list[Record]) -> str:
    if not records:
        return ""
    steps, contexts = _values(records, "steps"), _values(records, "context")
    devices = unique(str(record["device"]) for record in records if record.get("device"))
    told = [
        f"over {join_words(steps)} steps" if steps else "",
        f"after {join_words(contexts)} tokens of context" if contexts else "",
        f"on {join_words(devices)}" if devices else "",
    ]
    return f"Decode speed {' '.join(filter(None, told))}".strip() + "."


def _values(records: list[Record], key: str) -> list[str]:
    return unique(format_count(number(record[key])) for record in records if record.get(key))


def _table(run: Run, decode: str) -> ResultsTable:
    rows = [
        _table_row(row, first=index == 0, best=row is best)
        for _, group in groupby(run.rows, key=lambda row: format_budget(row.target_bits))
        for members in [list(group)]
        for best in [_best(members)]
        for index, row in enumerate(members)
    ]
    return ResultsTable(run.title, tuple(rows), decode)


def _table_row(row: Row, *, first: bool, best: bool) -> TableRow:
    cells = tuple(column.cell(row) for column in COLUMNS)
    return TableRow(cells, method_style(row.method), first, best)


def _best(rows: list[Row]) -> Row | None:
    """The row of lowest KLD, where a budget has several to choose from."""
    known = [row for row in rows if row.target_bits is not None and row.kld.value is not None]
    return min(known, key=lambda row: row.kld.value or 0.0) if len(known) > 1 else None
