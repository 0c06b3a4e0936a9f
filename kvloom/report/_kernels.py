"""Kernels measured: the roofline, attention beside the best dense one, packing and appending.

S. Williams, A. Waterman, D. Patterson, *Roofline: an insightful visual performance model* (CACM 52(4), 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

from kvloom.report._chart import Axis, Datum, Plot, Series
from kvloom.report._format import DASH, format_context, format_seconds, format_small, format_times
from kvloom.report._records import Record
from kvloom.report._runs import of_kind, unique
from kvloom.report._style import Style, named_style
from kvloom.report._table import Entry, Table
from kvloom.report._values import number

X_AXIS = Axis("Operations a byte", log=True)
Y_AXIS = Axis("TFLOP/s", log=True)
_TERA = 1e12
_DENSE = Style("dense", "circle")
_WORK = {
    "attend": (
        "Attention",
        "Time of one decode step, batch × tokens; below it how many times as fast as the fastest dense attention of "
        "the same run.",
    ),
    "encode": ("Packing", "Time of packing a whole cache, batch × tokens."),
    "append": ("Appending", "Time of appending a token to one layer, by batch, its share of packing a page included."),
}
_RUN = ("device", "dtype", "query_heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class Kernels:
    """What was measured on one device with one shape of heads; the roofline where its ceilings are known."""

    title: str
    plots: tuple[Plot, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def build_kernels(records: Sequence[Record]) -> list[Kernels]:
    """A part for each device, dtype and shape of heads."""
    timed = [
        record for kind in ("dense", "attend", "encode", "append") for record in of_kind(records, f"kernel_{kind}")
    ]
    runs = unique(tuple(record.get(key) for key in _RUN) for record in timed)
    return [_part(records, [it for it in timed if tuple(it.get(key) for key in _RUN) == run]) for run in runs]


def _part(records: Sequence[Record], timed: Sequence[Record]) -> Kernels:
    first = timed[0]
    here = [it for it in records if (it.get("device"), it.get("dtype")) == (first.get("device"), first.get("dtype"))]
    title = f"{first.get('device')}, {first.get('dtype')}"
    if first.get("head_dim"):
        title += f", {first.get('query_heads')} query and {first.get('kv_heads')} KV heads of {first['head_dim']}"
    notes = unique(_notes(timed, here))
    return Kernels(title, tuple(_roofline(timed, here, title)), tuple(_tables(timed)), tuple(notes))


def _roofline(timed: Sequence[Record], here: Sequence[Record], title: str) -> list[Plot]:
    roofs = [it for it in of_kind(here, "kernel_ceilings") if _positive(it, "read_bytes_per_s", "flops_per_s")]
    points = {
        "dense": _points(of_kind(timed, "kernel_dense"), itemgetter("name")),
        **{
            backend: _points([it for it in of_kind(timed, "kernel_attend") if it.get("backend") == backend], _pair)
            for backend in unique(str(it.get("backend")) for it in of_kind(timed, "kernel_attend"))
        },
    }
    series = [
        Series(name, _DENSE if name == "dense" else named_style(n - 1), own, ())
        for n, (name, own) in enumerate(points.items())
        if own
    ]
    if not roofs or not series:
        return []
    roof = _roof(roofs[-1], [point.x for one in series for point in one.points])
    label = f"Roofline of decode attention, {title}"
    return [Plot("kernels", title, label, (roof, *series), X_AXIS, Y_AXIS)]


def _points(records: Iterable[Record], name: Callable[[Record], object]) -> tuple[Datum, ...]:
    """Attention that was measured, and computes attention."""
    return tuple(
        Datum(
            record["flops"] / record["nbytes"],
            record["flops"] / record["seconds"] / _TERA,
            f"{name(record)}\n{_shape(record)}\n{format_seconds(record['seconds'])}, {_rate(record)}{_times(record)}",
        )
        for record in records
        if _positive(record, "flops", "nbytes", "seconds") and not record.get("fault")
    )


def _roof(ceilings: Record, intensities: Sequence[float]) -> Series:
    """The least of bandwidth and arithmetic, to a little beyond the points and the ridge."""
    read, flops = ceilings["read_bytes_per_s"] / _TERA, ceilings["flops_per_s"] / _TERA
    ridge = flops / read
    start, end = min([*intensities, ridge]) / 1.5, max([*intensities, ridge]) * 1.5
    line = tuple(Datum(x, min(read * x, flops), "") for x in (start, ridge, end))
    return Series(f"read {1e3 * read:,.0f} GB/s, {flops:,.3g} TFLOP/s", Style("uniform", "circle"), (), line)


def _tables(timed: Sequence[Record]) -> Iterator[Table]:
    """For every backend attention, packing and appending: a row for each shape, a column for each pair of bits."""
    for kind, (work, caption) in _WORK.items():
        records = of_kind(timed, f"kernel_{kind}")
        for backend in unique(str(it.get("backend")) for it in records):
            yield _table([it for it in records if it.get("backend") == backend], f"{work}, {backend}", caption)


def _table(records: Sequence[Record], work: str, caption: str) -> Table:
    pairs, shapes = unique(map(_pair, records)), unique(map(_shape, records))
    cells = {(_shape(it), _pair(it)): it for it in records}
    rows = tuple((Entry(at), *(_cell(cells.get((at, pair))) for pair in pairs)) for at in shapes)
    return Table(work, (Entry(work), *map(Entry, pairs)), rows, caption=caption)


def _cell(record: Record | None) -> Entry:
    if record is None:
        return Entry(DASH)
    if lack := record.get("skipped") or record.get("fault"):
        return Entry(DASH, tip=str(lack))
    error, bound, ratio = (number(record.get(key)) for key in ("error", "times_bound", "times_dense"))
    told = [
        f"{_pair(record)}, {_shape(record)}",
        _rate(record),
        f"{format_times(bound)} the bound" if bound is not None else "",
        f"dense: {record['dense']}" if record.get("dense") else "",
        f"error {format_small(error)}" if error is not None else "",
    ]
    return Entry(
        format_seconds(number(record.get("seconds"))),
        below="" if ratio is None else format_times(ratio),
        css="" if ratio is None else "better" if ratio > 1 else "worse",
        tip="\n".join(filter(None, told)),
    )


def _notes(timed: Sequence[Record], here: Sequence[Record]) -> Iterable[str]:
    for record in of_kind(here, "kernel_backend"):
        yield f"{record.get('backend')}: {record.get('skipped')}"
    for record in of_kind(timed, "kernel_dense"):
        if lack := record.get("skipped") or record.get("fault"):
            yield f"{record.get('name')}: {lack}"


def _pair(record: Record) -> str:
    return f"K{record.get('key_bits')}V{record.get('value_bits')}"


def _shape(record: Record) -> str:
    tokens = number(record.get("tokens"))
    return f"{record.get('batch')} × {format_context(tokens)}" if tokens else f"{record.get('batch')}"


def _rate(record: Record) -> str:
    rate, share = number(record.get("bytes_per_s")), number(record.get("share_of_read"))
    if rate is None:
        return ""
    told = f"{rate / 1e9:,.0f} GB/s"
    return told if share is None else f"{told}, {share:.0%} of reading"


def _times(record: Record) -> str:
    ratio = number(record.get("times_dense"))
    return "" if ratio is None else f"\n{format_times(ratio)} as fast as {record.get('dense')}"


def _positive(record: Record, *names: str) -> bool:
    return all((number(record.get(name)) or 0.0) > 0 for name in names)
