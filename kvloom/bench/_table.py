"""A run's records as tables of text, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvloom.bench._grid import Pair, Shape
from kvloom.evaluate import Record

_ATTEND = ("pair", "backend", "µs", "GB/s", "read", "copy", "× bound", "× dense", "bytes allow", "error")
_ENCODE = ("shape", "pair", "backend", "µs", "GB/s", "of copy")
_APPEND = ("batch", "pair", "backend", "µs a step")


@dataclass(frozen=True)
class Table:
    """Text cells under headings.

    Attributes:
        title: One line above.
        headings: One for each column; the columns before ``numbers_from`` hold words.
        rows: Cells.
        notes: Lines below.
        numbers_from: First column of numbers.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    numbers_from: int


def tables(records: Sequence[Record]) -> list[Table]:
    """One table of attention for each shape, then packing, then appending.

    Args:
        records: One run's, as `bench_kernels` returns them.
    """
    return [*_attend_tables(records), _encode_table(records), _append_table(records)]


def _attend_tables(records: Sequence[Record]) -> Iterator[Table]:
    attends = [record for record in records if record["kind"] == "kernel_attend"]
    for shape in dict.fromkeys(map(_shape, attends)):
        rows = tuple(_attend_row(record) for record in attends if _shape(record) == shape)
        dense = [record for record in records if record["kind"] == "kernel_dense" and _shape(record) == shape]
        first = attends[0]
        title = (
            f"{shape.label} + {first['window']} exact tokens, {first['query_heads']}/{first['kv_heads']} heads of "
            f"{first['head_dim']}, {first['dtype']}"
        )
        yield Table(title, _ATTEND, rows, ("dense: " + "; ".join(map(_dense_note, dense)),), 2)


def _attend_row(record: Record) -> tuple[str, ...]:
    name = (_pair(record), record["backend"])
    if record["skipped"]:
        return (*name, record["skipped"], *[""] * (len(_ATTEND) - 3))
    ratios = [f"{record[key]:.2f}" if record[key] else "-" for key in ("times_bound", "times_dense", "bytes_allow")]
    shares = [f"{record[key]:.0%}" for key in ("share_of_read", "share_of_copy")]
    error = "not finite" if record["error"] is None else f"{record['error']:.1e}"
    return (*name, _micro(record), _rate(record), *shares, *ratios, error)


def _dense_note(record: Record) -> str:
    if record["skipped"]:
        return f"{record['name']} {record['skipped']}"
    return f"{record['name']} {_micro(record)} µs" + (f" ({record['fault']})" if record["fault"] else "")


def _encode_table(records: Sequence[Record]) -> Table:
    rows = []
    for record in (record for record in records if record["kind"] == "kernel_encode"):
        name = (_shape(record).label, _pair(record), record["backend"])
        figures = (record["skipped"], "", "")
        if not record["skipped"]:
            figures = (_micro(record), _rate(record), f"{record['share_of_copy']:.0%}")
        rows.append((*name, *figures))
    return Table("Packing", _ENCODE, tuple(rows), (), 3)


def _append_table(records: Sequence[Record]) -> Table:
    rows = tuple(
        (str(record["batch"]), _pair(record), record["backend"], record["skipped"] or _micro(record))
        for record in records
        if record["kind"] == "kernel_append"
    )
    return Table("Appending to one layer", _APPEND, rows, tuple(_run_notes(records)), 3)


def _run_notes(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record["kind"] == "kernel_backend":
            yield f"{record['backend']}: {record['skipped']}"
    if any(record.get("method") == "events" for record in records):
        yield "* launched one by one: the code waits for the device, so that no CUDA graph can hold it"
    (run,) = (record for record in records if record["kind"] == "kernel_ceilings")
    driver = f", driver {run['driver']}" if run["driver"] else ""
    yield (
        f"{run['device']}{driver}, torch {run['torch']}: reads {run['read_bytes_per_s'] / 1e9:,.0f} GB/s, copies "
        f"{run['copy_bytes_per_s'] / 1e9:,.0f} GB/s"
    )


def _shape(record: Record) -> Shape:
    return Shape(record["batch"], record["tokens"])


def _pair(record: Record) -> str:
    return Pair(record["key_bits"], record["value_bits"]).label


def _micro(record: Record) -> str:
    mark = "*" if record["method"] == "events" else ""
    return f"{record['seconds'] * 1e6:,.1f}{mark}"


def _rate(record: Record) -> str:
    return f"{record['bytes_per_s'] / 1e9:,.1f}"
