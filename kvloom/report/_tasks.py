"""Task scores for terminals: one aligned line for each task, length and cache."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.report._format import DASH, format_bits, format_count, format_interval, format_share
from kvloom.report._needle import needle_lengths
from kvloom.report._records import Record
from kvloom.report._values import Interval, number

_HEADINGS = ("Task", "Tokens", "Cache", "True bits", "Score", "Metric", "Cases", "Prompt")


def render_tasks(records: Sequence[Record]) -> str:
    """The scores of `task` and `needle` records as aligned plain text; "" without any."""
    scored = [record for record in records if record["kind"] in ("task", "needle") and "score" in record]
    if not scored:
        return ""
    lines = [_HEADINGS, *map(_line, scored)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _line(record: Record) -> tuple[str, ...]:
    return (
        str(record.get("task", record["kind"])),
        _tokens(record),
        str(record["name"]),
        format_bits(number(record.get("true_bits"))),
        format_interval(Interval.of(record["score"]), format_share),
        str(record.get("metric", "found")),
        format_count(number(record.get("total"))),
        str(record.get("prefill", DASH)),
    )


def _tokens(record: Record) -> str:
    """The length of a task, or the least and the greatest one of needles."""
    lengths = needle_lengths(record) if record["kind"] == "needle" else []
    if not lengths:
        return format_count(number(record.get("length")))
    return " to ".join(map(format_count, sorted({lengths[0], lengths[-1]})))
