"""Runs of generation, and what fits, as tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvloom.bench._table import Table
from kvloom.bench.generation._fit import Capacity, Fit
from kvloom.evaluate import Record

_HEADINGS = (
    "cache",
    "batch",
    "prefill s",
    "tokens/s",
    "ms a step",
    "bound ms",
    "× bound",
    "× best peer",
    "cache MiB",
    "true bits",
    "peak GiB",
)


def generate_tables(records: Sequence[Record]) -> list[Table]:
    """One table for each load.

    Args:
        records: One run's, as `bench_generate` returns them.
    """
    cells = [record for record in records if record["kind"] == "generate"]
    loads = list(dict.fromkeys(record["load"] for record in cells))
    made = [_table([record for record in cells if record["load"] == load]) for load in loads]
    last = made[-1]
    notes = (*last.notes, *_run_notes(records))
    return [*made[:-1], Table(last.title, last.headings, last.rows, notes, last.numbers_from)]


def fit_table(capacity: Capacity) -> Table:
    """What `fit` predicts and `verify` found, with the numbers of sequences over the uncompressed cache's."""
    sizes = (capacity.weight_nbytes, capacity.reserve)
    weights, reserve = (f"{size / 2**30:.2f} GiB" for size in sizes)
    title = f"Sequences of {capacity.tokens:,} tokens in {capacity.memory / 2**30:.2f} GiB"
    note = (
        f"weights {weights} ({str(capacity.dtype).removeprefix('torch.')}), reserved {reserve}, a decode step "
        f"{capacity.step_nbytes / 2**20:.2f} MiB a sequence; prompts' passes are not counted"
    )
    first = capacity.fits[0]
    rows = tuple(_fit_row(row, first) for row in capacity.fits)
    return Table(title, ("cache", "MiB a sequence", "true bits", "predicted", "verified", "×"), rows, (note,), 1)


def _fit_row(row: Fit, first: Fit) -> tuple[str, ...]:
    counts = [(it.predicted if it.verified is None else it.verified) for it in (row, first)]
    return (
        row.name,
        f"{row.sequence_nbytes / 2**20:,.1f}",
        f"{row.true_bits:.2f}",
        str(row.predicted),
        _or_dash(row.verified, "{}"),
        f"{counts[0] / counts[1]:.2f}" if counts[1] else "-",
    )


def _table(cells: Sequence[Record]) -> Table:
    first = cells[0]
    prompt = "passed through the model" if first["fill"] == "prompt" else "random keys and values, not computed"
    where = first["dtype"] if first["world_size"] == 1 else f"{first['dtype']}, {first['world_size']} processes"
    title = f"{first['model']}, {first['load']} + {first['new_tokens']} tokens, {where}; prompts: {prompt}"
    return Table(title, _HEADINGS, tuple(map(_row, cells)), (), 1)


def _row(record: Record) -> tuple[str, ...]:
    if record["skipped"]:
        return (f"{record['name']}: {record['skipped']}", *[""] * (len(_HEADINGS) - 1))
    name = f"{record['name']} + compile" if record["compiled"] else record["name"]
    return (
        name,
        str(record["batch"]),
        _or_dash(record["prefill_s"], "{:.3f}"),
        f"{record['tokens_per_s']:,.1f}",
        f"{record['seconds'] * 1e3:.2f}",
        f"{record['bound_s'] * 1e3:.2f}",
        f"{record['times_bound']:.2f}",
        _or_dash(record["times_best_peer"], "{:.2f}"),
        f"{record['live_bytes'] / 2**20:,.1f}",
        f"{record['true_bits']:.2f}",
        _or_dash(record["peak_bytes"] and record["peak_bytes"] / 2**30, "{:.2f}"),
    )


def _or_dash(number: float | None, form: str) -> str:
    return "-" if number is None else form.format(number)


def _run_notes(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record["kind"] == "generate_note":
            yield str(record["skipped"])
    (run,) = (record for record in records if record["kind"] == "generate_ceilings")
    yield (
        f"{run['device']}, torch {run['torch']}: reads {run['read_bytes_per_s'] / 1e9:,.0f} GB/s; the bound is all "
        "weights and the live cache at that rate"
    )
