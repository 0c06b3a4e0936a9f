"""Memory over context: bytes of every plan at any length, and the contexts that fit beside the weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.report._chart import Axis, Datum, Plot, Rule, Series
from kvloom.report._format import DASH, format_bytes, format_context, format_count, format_times
from kvloom.report._records import Record
from kvloom.report._runs import of_kind
from kvloom.report._style import Style, named_style
from kvloom.report._table import Entry, Table, headings
from kvloom.report._values import number, numbers

X_AXIS = Axis("Tokens of one sequence", log=True, doubling=True, write=format_context)
Y_AXIS = Axis(
    "Bytes of the cache", log=True, doubling=True, write=lambda value: re.sub(r"\.0+", "", format_bytes(value))
)
_GB = 10**9
_DENSE = Style("dense", "circle")


@dataclass(frozen=True)
class Memory:
    """The caches of one model."""

    title: str
    plots: tuple[Plot, ...]
    table: Table


def build_memory(records: Sequence[Record]) -> list[Memory]:
    """A part for each model; of two records of one cache the later counts."""
    found: dict[str, dict[str, Record]] = {}
    for record in of_kind(records, "memory"):
        found.setdefault(str(record.get("model") or ""), {})[record["name"]] = record
    return [_part(model, sorted(own.values(), key=_order)) for model, own in found.items()]


def _order(record: Record) -> tuple[bool, float, str]:
    """The uncompressed cache, then from the smallest."""
    return record.get("method") != "dense", _at_longest(record) or 0.0, record["name"]


def _part(model: str, records: Sequence[Record]) -> Memory:
    lines = [(record, _points(record)) for record in records]
    series = tuple(
        Series(record["name"], _DENSE if record.get("method") == "dense" else named_style(n - 1), points, points)
        for n, (record, points) in enumerate(lines)
        if points
    )
    label = f"Bytes of the cache against tokens, {model}"
    rules = tuple(_rules(records[0]))
    plots = (Plot("memory", model, label, series, X_AXIS, Y_AXIS, rules),) if series else ()
    return Memory(model, plots, _table(model, records))


def _points(record: Record) -> tuple[Datum, ...]:
    tokens, sizes = numbers(record.get("tokens")), numbers(record.get("nbytes"))
    return tuple(
        Datum(at, size, f"{record['name']}\n{format_context(at)} tokens\n{format_bytes(size)}")
        for at, size in zip(tokens, sizes, strict=False)
        if at and size
    )


def _rules(record: Record) -> list[Rule]:
    """What a GPU has left beside the weights."""
    fits, weights = record.get("fits"), number(record.get("weight_bytes")) or 0.0
    rooms = {gpu: float(gpu.split()[0]) * _GB - weights for gpu in fits} if isinstance(fits, dict) else {}
    return [Rule(room, f"{gpu} less weights" if weights else gpu) for gpu, room in rooms.items() if room > 0]


def _table(model: str, records: Sequence[Record]) -> Table:
    gpus = list(dict.fromkeys(gpu for it in records for gpu in _fits(it)))
    dense = next((_at_longest(it) for it in records if it.get("method") == "dense"), None)
    longest = next((format_context(it["tokens"][-1]) for it in records if numbers(it.get("tokens"))), "")
    columns = headings("Cache", f"At {longest}", "Bytes a token", "Smaller by", *(f"Fits in {gpu}" for gpu in gpus))
    return Table(
        f"Memory, {model}",
        columns,
        tuple(_row(it, gpus, dense) for it in records),
        caption=_caption(records[0]),
    )


def _row(record: Record, gpus: Sequence[str], dense: float | None) -> tuple[Entry, ...]:
    size, tokens, fits = _at_longest(record), numbers(record.get("tokens")), _fits(record)
    return (
        Entry(record["name"]),
        Entry(format_bytes(size)),
        Entry(format_count(size / tokens[-1]) if size and tokens[-1] else DASH),
        Entry(format_times(dense / size) if dense and size else DASH),
        *(Entry(_context(number(fits.get(gpu)))) for gpu in gpus),
    )


def _context(tokens: float | None) -> str:
    return format_context(tokens) if tokens else DASH


def _at_longest(record: Record) -> float | None:
    sizes = numbers(record.get("nbytes"))
    return sizes[-1] if sizes and len(sizes) == len(numbers(record.get("tokens"))) else None


def _fits(record: Record) -> Record:
    fits = record.get("fits")
    return fits if isinstance(fits, dict) else {}


def _caption(record: Record) -> str:
    weights, most = number(record.get("weight_bytes")), number(record.get("reads_at_most"))
    return " ".join(
        filter(
            None,
            [
                "Exact bytes of one sequence’s full-attention layers in a 16-bit compute dtype, by the arithmetic that "
                "allocates them. A context fits in GB of 10⁹ bytes if the cache does",
                f"beside {format_bytes(weights)} of weights;" if weights else "by itself;",
                "activations do not count.",
                f"The model reads at most {format_count(most)} tokens of one sequence." if most else "",
            ],
        )
    )
