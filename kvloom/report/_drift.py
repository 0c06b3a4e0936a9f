"""Drift: KLD of every block of decoded steps, and the slope over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.report._chart import Axis, Datum, Plot, Series
from kvloom.report._format import DASH, format_bits, format_bounds, format_count, format_small
from kvloom.report._records import Record
from kvloom.report._runs import config_order, of_kind, text_names, unique
from kvloom.report._style import named_style
from kvloom.report._table import Entry, Table, headings
from kvloom.report._values import Interval, number, numbers

X_AXIS = Axis("Decoded step")
Y_AXIS = Axis("Mean KLD, nats per token", log=True)


@dataclass(frozen=True)
class Drift:
    """The drift of caches on one model and text: the curves, where some are positive, and the slopes."""

    title: str
    plots: tuple[Plot, ...]
    table: Table


def build_drifts(records: Sequence[Record]) -> list[Drift]:
    """A part for each model and text; of two records of one cache the later counts."""
    found: dict[tuple[str, ...], dict[tuple[str, str], Record]] = {}
    for record in of_kind(records, "drift"):
        found.setdefault(_run(record), {})[record["name"], str(record.get("prefill"))] = record
    return [_drift(sorted(own.values(), key=config_order)) for own in found.values()]


def _run(record: Record) -> tuple[str, ...]:
    text = record.get("text")
    digest = text.get("sha256") if isinstance(text, dict) else None
    return (*(str(record.get(key)) for key in ("model", "device", "dtype", "steps", "windows")), str(digest))


def _drift(records: Sequence[Record]) -> Drift:
    title = ", ".join(str(records[0][key]) for key in ("model", "device", "dtype") if records[0].get(key))
    compressed = [record for record in records if record.get("method") != "dense"]
    lines = [(record, _points(record)) for record in compressed]
    series = tuple(
        Series(record["name"], named_style(n), points, points) for n, (record, points) in enumerate(lines) if points
    )
    label = f"Mean KLD against decoded step, {title}"
    plots = (Plot("drift", title, label, series, X_AXIS, Y_AXIS),) if series else ()
    return Drift(title, plots, _table(compressed or records, title))


def _points(record: Record) -> tuple[Datum, ...]:
    """The mean KLD of every block of steps, at its middle; blocks of no KLD have no place on a log axis."""
    blocks, steps = numbers(record.get("blocks")), number(record.get("steps"))
    if not blocks or not steps:
        return ()
    size = number(record.get("block")) or steps / len(blocks)
    ends = [(n * size, min((n + 1) * size, steps)) for n in range(len(blocks))]
    return tuple(
        Datum(
            (start + end) / 2,
            kld,
            f"{record['name']}\nsteps {format_count(start + 1)} to {format_count(end)}\nKLD {format_small(kld)}",
        )
        for (start, end), kld in zip(ends, blocks, strict=True)
        if kld is not None and kld > 0
    )


def _table(records: Sequence[Record], title: str) -> Table:
    return Table(
        f"Drift, {title}",
        headings("Cache", "True bits", "Mean KLD", "Slope per 1,000 steps", ""),
        tuple(_row(record) for record in records),
        caption=_caption(records[0]),
    )


def _row(record: Record) -> tuple[Entry, ...]:
    slope = Interval.of(record.get("slope"))
    return (
        Entry(record["name"]),
        Entry(format_bits(number(record.get("true_bits")))),
        Entry(format_small(number(record.get("kld")))),
        Entry(format_small(slope.value), format_bounds(slope, format_small)),
        Entry(_verdict(slope)),
    )


def _verdict(slope: Interval) -> str:
    if slope.bounds is None:
        return DASH
    low, high = slope.bounds
    return "gets worse" if low > 0 else "gets better" if high < 0 else "no drift seen"


def _caption(record: Record) -> str:
    names = unique(text_names(record))
    told = [
        f"{format_count(number(record.get('steps')))} steps" if record.get("steps") else "",
        f"of {format_count(number(record.get('windows')))} windows of real text" if record.get("windows") else "",
        f"({len(names)} texts)" if names else "",
    ]
    return (
        f"{' '.join(filter(None, told))}. Slopes are in nats per token with 95 % intervals; no drift is seen where one "
        "holds 0."
    ).lstrip(". ")
