"""The Pareto plot: mean KLD against true bits, a series for each method."""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.report._chart import Axis, Datum, Plot, Series
from kvloom.report._compare import front, has_place
from kvloom.report._format import (
    format_bits,
    format_budget,
    format_bytes,
    format_interval,
    format_ppl,
    format_rate,
    format_share,
    format_small,
    join_words,
)
from kvloom.report._runs import Row, Run, method_label
from kvloom.report._style import method_style

X_AXIS = Axis("True bits per cached value")
Y_AXIS = Axis("Mean KLD, nats per token", log=True)


@dataclass(frozen=True)
class Pareto:
    """The plot of a run, and the rows it cannot show."""

    plot: Plot
    left_out: str


def build_pareto(runs: list[Run]) -> list[Pareto]:
    """Plot every run that has a point to show."""
    return [_pareto(run) for run in runs if any(map(has_place, run.rows))]


def _pareto(run: Run) -> Pareto:
    series = tuple(
        _series(method, [row for row in run.of(method) if has_place(row)])
        for method in run.methods
        if any(map(has_place, run.of(method)))
    )
    label = f"Mean KLD against true bits, {run.title}"
    missing = [row.label for row in run.rows if not has_place(row)]
    return Pareto(
        Plot("pareto", run.title, label, series, X_AXIS, Y_AXIS),
        left_out=join_words(missing) if missing else "",
    )


def _series(method: str, rows: list[Row]) -> Series:
    return Series(
        label=method_label(method),
        style=method_style(method),
        points=tuple(_datum(row) for row in sorted(rows, key=lambda row: row.true_bits or 0.0)),
        line=tuple(_datum(row) for row in front(rows)),
    )


def _datum(row: Row) -> Datum:
    return Datum(
        x=row.true_bits or 0.0,
        y=row.kld.value or 0.0,
        low=row.kld.low,
        high=row.kld.high,
        tip=describe(row),
    )


def describe(row: Row) -> str:
    """What a point says when it is hovered or focused; lines apart, absent figures left out."""
    facts = {
        "": row.label,
        "budget": row.target_bits is not None and f"{format_budget(row.target_bits)} bits",
        "true bits": format_bits(row.true_bits),
        "KLD": format_interval(row.kld, format_small),
        "p99 KLD": row.kld_p99.value is not None and format_small(row.kld_p99.value),
        "perplexity": row.ppl.value is not None and format_interval(row.ppl, format_ppl),
        "top-1": row.top1.value is not None and format_share(row.top1.value),
        "live": row.live_bytes is not None and format_bytes(row.live_bytes),
        "decode": row.tokens_per_s.value is not None and f"{format_rate(row.tokens_per_s.value)} tokens/s",
    }
    return "\n".join(f"{name} {text}".strip() for name, text in facts.items() if text)
