"""The results table for terminals: plain aligned text."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.report._columns import COLUMNS
from kvloom.report._records import Record
from kvloom.report._runs import Run, describe_protocol, group_runs

_INTERVALS = "[low, high] are 95 % intervals."
_EMPTY = "No fidelity records."


def render_text(records: Sequence[Record]) -> str:
    """Render the results as aligned plain text, one block for each run.

    Args:
        records: Result records as `load_records` returns them; only `fidelity` and `decode`
            kinds are read.

    Returns:
        The text, without a trailing newline.
    """
    runs = group_runs(records)
    return "\n\n".join(_run_text(run) for run in runs) if runs else _EMPTY


def _body(run: Run) -> list[list[str]]:
    return [[str(column.cell(row)) for column in COLUMNS] for row in run.rows]


def _run_text(run: Run) -> str:
    body = _body(run)
    headings = [column.heading for column in COLUMNS]
    widths = [max(map(len, texts)) for texts in zip(headings, *body, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [_line(cells, widths) for cells in (headings, rule, *body)]
    title = [run.title, ""] if run.title else []
    return "\n".join([*title, *lines, "", f"{describe_protocol(run)} {_INTERVALS}"])


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [
        cell.rjust(width) if column.numeric else cell.ljust(width)
        for column, cell, width in zip(COLUMNS, cells, widths, strict=True)
    ]
    return "  ".join(padded).rstrip()
