"""Generation measured: prompts, decoded tokens a second and memory, for each load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.report._format import (
    DASH,
    format_bits,
    format_bytes,
    format_context,
    format_rate,
    format_seconds,
    format_times,
)
from kvloom.report._records import Record
from kvloom.report._runs import of_kind, unique
from kvloom.report._table import Entry, Table, headings
from kvloom.report._values import number

HEADINGS = (
    "Cache",
    "Batch",
    "Prompt",
    "Tokens/s",
    "A step",
    "× bound",
    "× best peer",
    "Live bytes",
    "True bits",
    "Peak",
)
_RUN = ("model", "device", "dtype", "load", "new_tokens", "fill")


@dataclass(frozen=True)
class Generation:
    """One load on one model: the table, and what could not be measured."""

    title: str
    table: Table
    notes: tuple[str, ...]


def build_generations(records: Sequence[Record]) -> list[Generation]:
    """A part for each model, device and load; of two records of one cache the later counts."""
    found: dict[tuple[object, ...], dict[object, Record]] = {}
    for record in of_kind(records, "generate"):
        own = found.setdefault(tuple(record.get(key) for key in _RUN), {})
        own[record.get("name"), record.get("prefill")] = record
    return [_part(list(own.values()), records) for own in found.values()]


def _part(cells: Sequence[Record], records: Sequence[Record]) -> Generation:
    first = cells[0]
    same = [it for it in records if all(it.get(key) == first.get(key) for key in ("model", "device", "dtype"))]
    filled = "random keys and values" if first.get("fill") == "random" else "passed through the model"
    load = "the largest batch that fits" if "*" in str(first.get("load")) else f"batch {first.get('batch')}"
    tokens = f"{format_context(number(first.get('prompt')))} + {first.get('new_tokens')} tokens"
    title = ", ".join(str(first[key]) for key in ("model", "device", "dtype") if first.get(key))
    fastest = max((number(it.get("tokens_per_s")) or 0.0 for it in cells), default=0.0)
    return Generation(
        f"{title}, {load}, {tokens}",
        Table(
            f"Generation, {load}, {tokens}",
            headings(*HEADINGS),
            tuple(_row(it, fastest) for it in cells),
            caption=f"Prompts: {filled}. The bound of a step is the time of reading all weights and the live cache at "
            "the measured bandwidth; the best peer is the fastest of transformers’ own caches. Peak memory is known "
            "on GPUs.",
        ),
        tuple(unique(_notes(same, cells))),
    )


def _row(record: Record, fastest: float) -> tuple[Entry, ...]:
    name = f"{record.get('name')} + compile" if record.get("compiled") else str(record.get("name"))
    if record.get("skipped"):
        return Entry(name, below=str(record["skipped"])), *(Entry(DASH) for _ in HEADINGS[1:])
    rate, peer = number(record.get("tokens_per_s")), number(record.get("times_best_peer"))
    return (
        Entry(name),
        Entry(str(record.get("batch"))),
        Entry(format_seconds(number(record.get("prefill_s")))),
        Entry(format_rate(rate), css="top" if rate == fastest else ""),
        Entry(format_seconds(number(record.get("seconds")))),
        Entry(format_times(number(record.get("times_bound")))),
        Entry(format_times(peer)),
        Entry(format_bytes(number(record.get("live_bytes")))),
        Entry(format_bits(number(record.get("true_bits")))),
        Entry(format_bytes(number(record.get("peak_bytes")))),
    )


def _notes(records: Sequence[Record], cells: Sequence[Record]) -> list[str]:
    runs = {it.get("run") for it in cells}
    ceilings = [it for it in of_kind(records, "generate_ceilings") if it.get("run") in runs]
    return [
        *(str(it.get("skipped")) for it in of_kind(records, "generate_note")),
        *(f"Reads {it['read_bytes_per_s'] / 1e9:,.0f} GB/s." for it in ceilings if number(it.get("read_bytes_per_s"))),
    ]
