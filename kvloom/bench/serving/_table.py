"""Runs against servers as tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.bench._table import Table
from kvloom.evaluate import Record

_PERCENTILES = ("p50", "p90", "p99")
_HEADINGS = (
    "server",
    "requests/s",
    "tokens/s",
    "×",
    *(f"first token {name} ms" for name in _PERCENTILES),
    "×",
    *(f"between {name} ms" for name in _PERCENTILES),
    "×",
)


def serve_tables(records: Sequence[Record]) -> list[Table]:
    """One table for each traffic.

    Args:
        records: One run's, as `bench_serve` returns them.
    """
    return [
        _table([record for record in records if record["traffic"] == traffic])
        for traffic in dict.fromkeys(record["traffic"] for record in records)
    ]


def _table(cells: Sequence[Record]) -> Table:
    first = cells[0]
    title = (
        f"{first['model']}, {first['traffic']}: {first['requests']} requests of {first['prompt_tokens']} + "
        f"{first['new_tokens']} tokens"
    )
    notes = tuple(f"{record['server']}: {record['url']}" for record in cells)
    if len(cells) > 1:
        notes = (*notes, f"×: how many times as good as {first['server']}, for times by their medians")
    return Table(title, _HEADINGS, tuple(map(_row, cells)), notes, 1)


def _row(record: Record) -> tuple[str, ...]:
    times = record["times_first"]
    return (
        record["server"],
        f"{record['requests_per_s']:,.2f}",
        f"{record['output_tokens_per_s']:,.1f}",
        f"{times['output_tokens_per_s']:.2f}",
        *_milliseconds(record["first_token_s"], times["first_token_s"]),
        *_milliseconds(record["inter_token_s"], times["inter_token_s"]),
    )


def _milliseconds(seconds: dict[str, float] | None, times: float | None) -> tuple[str, ...]:
    if seconds is None:
        return ("-",) * (len(_PERCENTILES) + 1)
    return (*(f"{seconds[name] * 1e3:,.1f}" for name in _PERCENTILES), "-" if times is None else f"{times:.2f}")
