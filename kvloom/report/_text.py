"""The results table for terminals: plain aligned text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvloom.report._columns import COLUMNS
from kvloom.report._records import Record
from kvloom.report._runs import Run, describe_protocol, group_runs
from kvloom.report._tasks import render_tasks

_INTERVALS = "[low, high] are 95 % intervals."


def render_text(records: Sequence[Record]) -> str:
    """Render the results as aligned plain text, one block for each run and one for all tasks.

    Args:
        records: Result records as `load_records` returns them; only the kinds `fidelity`, `decode`,
            `task` and `needle` are read.

    Returns:
        The text, without a trailing newline.
    """
    blocks = [*map(_run_text, group_runs(records)), render_tasks(records)]
    return "\n\n".join(filter(None, blocks)) or _no_scores(records)


def _no_scores(records: Sequence[Record]) -> str:
    """What there is in place of scores."""
    kinds = ", ".join(f"{kind} ({count})" for kind, count in Counter(record["kind"] for record in records).items())
    return f"No fidelity or task records for a table; there are {f'others: {kinds}' if kinds else 'no others'}."


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
