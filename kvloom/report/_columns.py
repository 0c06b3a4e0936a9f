"""The columns of the results table: the one source for terminal, plain text and HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvloom.report import _format as fmt
from kvloom.report._runs import Row
from kvloom.report._values import Interval


@dataclass(frozen=True)
class Cell:
    """One cell: its text, the interval beside it, and what to sort by (None sorts last)."""

    text: str
    bounds: str = ""
    sort: float | str | None = None

    def __str__(self) -> str:
        return f"{self.text} {self.bounds}".rstrip()


@dataclass(frozen=True)
class Column:
    """One column: its heading, what it means, and the cell it makes of a row.

    `numeric` aligns to the right; `ranged` keeps room for intervals.
    """

    key: str
    heading: str
    meaning: str
    cell: Callable[[Row], Cell]
    numeric: bool = True
    ranged: bool = False


def _plain(value: float | None, formatter: fmt.Formatter) -> Cell:
    return Cell(formatter(value), sort=value)


def _ranged(interval: Interval, formatter: fmt.Formatter) -> Cell:
    bounds = fmt.format_bounds(interval, formatter)
    return Cell(formatter(interval.value), bounds, interval.value)


COLUMNS = (
    Column(
        "budget",
        "Budget",
        "The target the plan was made for, in true bits; a dash where there was none.",
        lambda row: _plain(row.target_bits, fmt.format_budget),
    ),
    Column(
        "method",
        "Method",
        "How the precision of each layer was chosen, and by which cache it was stored.",
        lambda row: Cell(row.label, sort=row.label),
        numeric=False,
    ),
    Column(
        "true_bits",
        "True bits",
        "8 × bytes / elements of the cache: scales, zero points and the exact window count; 16-bit compute dtype.",
        lambda row: _plain(row.true_bits, fmt.format_bits),
    ),
    Column(
        "live_bytes",
        "Live bytes",
        "Bytes resident in this run, in this run’s dtype, batch 1, at the stated context.",
        lambda row: _plain(row.live_bytes, fmt.format_bytes),
    ),
    Column(
        "kld",
        "KLD",
        "Mean Kullback-Leibler divergence from the dense cache’s next-token distribution, in nats "
        "per token; lower is better.",
        lambda row: _ranged(row.kld, fmt.format_small),
        ranged=True,
    ),
    Column(
        "kld_p99",
        "p99 KLD",
        "The divergence that 99 % of the scored tokens stay below; the bad cases.",
        lambda row: _plain(row.kld_p99.value, fmt.format_small),
    ),
    Column(
        "ppl",
        "Perplexity",
        "Perplexity of the text, scored through the cache; lower is better.",
        lambda row: _ranged(row.ppl, fmt.format_ppl),
        ranged=True,
    ),
    Column(
        "top1",
        "Top-1",
        "Share of tokens whose most probable next token is the dense cache’s.",
        lambda row: _plain(row.top1.value, fmt.format_share),
    ),
    Column(
        "tokens_per_s",
        "Tokens/s",
        "Decoded tokens per second, prompt not counted.",
        lambda row: _plain(row.tokens_per_s.value, fmt.format_rate),
    ),
)
