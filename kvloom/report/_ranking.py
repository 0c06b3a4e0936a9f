"""The head-to-head of signals as a table: how well each ranks plans, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.report._records import Record
from kvloom.report._runs import of_kind

HEADINGS = (
    "signal",
    "seconds",
    "Spearman, spread [95 %]",
    "Pearson of logs, spread",
    "Spearman, equal bits [95 %]",
    "Pearson of logs, equal bits",
)

GROUPS = {"spread": "spread", "equal": "equal bits"}
"""What the report calls the groups of random plans."""


def ranking_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Cells under `HEADINGS`, the best signal among plans of equal bits first.

    Args:
        records: results of `compare_signals`; other kinds are left out.
    """
    compared = sorted(of_kind(records, "signal_comparison"), key=rank, reverse=True)
    return [(record["name"], f"{record['seconds']:.3g}", *_cells(record)) for record in compared]


def ranking_notes(records: Sequence[Record]) -> str:
    """What must be known to read the rows."""
    record = of_kind(records, "signal_comparison")[0]
    groups = [(what, record[group]) for group, what in GROUPS.items() if group in record]
    sets = "; ".join(
        f"{what}: {own['plans']} random plans of {_range(own['true_bits'], '.2f')} true bits, KLD "
        f"{_range(own['kld'], '.2g')}"
        for what, own in groups
    )
    return (
        f"{record['model']}, {record['dtype']}, device: {record['device']}; KLD from the uncompressed cache in nats a "
        f"token, on {record['scored_tokens']:,} scored tokens in {record['windows']} windows. {sets}. Signals "
        f"read {record['prompts']} prompts of {record['prompt_tokens']:,} tokens of other texts, each by itself: "
        "seconds are of that. Intervals are over draws of plans."
    )


def rank(record: Record) -> float:
    """What signals are ranked by: the rank correlation among plans of equal bits, or of what plans there are."""
    group = next(record[group] for group in reversed(GROUPS) if group in record)
    return float(group["spearman"]["value"])


def _cells(record: Record) -> list[str]:
    cells = []
    for group in GROUPS:
        own = record.get(group)
        rho = own and own["spearman"]
        cells.append(f"{rho['value']:.3f} [{rho['low']:.3f}, {rho['high']:.3f}]" if rho else "")
        cells.append(f"{own['pearson_log']['value']:.3f}" if own else "")
    return cells


def _range(ends: Sequence[float], digits: str) -> str:
    return f"{ends[0]:{digits}} to {ends[1]:{digits}}"
