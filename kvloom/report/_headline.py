"""The sentences the page opens with; each is computed from the records or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.report._compare import Comparison, compare, front
from kvloom.report._format import (
    format_bits,
    format_bounds,
    format_interval,
    format_small,
    format_times,
)
from kvloom.report._runs import Run, describe_protocol

COMPUTE_BITS = 16


@dataclass(frozen=True)
class Rival:
    """Methods that the exact plan is set against as one: their name, and that of their best."""

    name: str
    best: str
    methods: tuple[str, ...]


RIVALS = (
    Rival("QuantizedCache", "the best QuantizedCache scored here,", ("quanto", "hqq")),
    Rival("uniform plans", "the best uniform plan scored here,", ("uniform", "uniform+sinks")),
    Rival("KVmix’s rule", "KVmix’s rule", ("kvmix",)),
)


@dataclass(frozen=True)
class Headline:
    """What one run shows: the sentence, further findings, how it was scored, the evidence."""

    lead: str
    findings: tuple[str, ...]
    protocol: str
    comparisons: tuple[Comparison, ...]


def build_headline(run: Run) -> Headline:
    """Write the headline of one run from its records alone."""
    by_rival = {rival: compare(run, *rival.methods) for rival in RIVALS}
    found = {rival: comparisons for rival, comparisons in by_rival.items() if comparisons}
    summaries = [_summary(rival, comparisons) for rival, comparisons in found.items()]
    comparisons = tuple(entry for entries in found.values() for entry in entries)
    return Headline(
        lead=_lead(next(iter(found)), comparisons[0]) if comparisons else _inventory(run),
        findings=(*map(_detail, comparisons[:1]), *summaries, *_memory(run)),
        protocol=". ".join(filter(None, [run.title, describe_protocol(run)])),
        comparisons=comparisons,
    )


def _lead(rival: Rival, first: Comparison) -> str:
    opening = f"At {format_bits(first.plan.true_bits)} true bits, the exact plan’s KLD is"
    return f"{opening} {_standing(first)} {rival.best} at {format_bits(first.rival.true_bits)}."


def _detail(first: Comparison) -> str:
    sides = [f"{row.label}: KLD {format_interval(row.kld, format_small)}" for row in (first.plan, first.rival)]
    ratio = f"{format_times(first.ratio.value)} {format_bounds(first.ratio, format_times)}".rstrip()
    return f"{sides[0]}; {sides[1]}. Their ratio is {ratio}, {first.basis}."


def _standing(entry: Comparison) -> str:
    ratio = entry.ratio.value or 1.0
    if entry.verdict == "below":
        return f"{format_times(ratio)} below that of"
    if entry.verdict == "above":
        return f"{format_times(1 / ratio)} above that of"
    return "not distinguishable from that of"


def _inventory(run: Run) -> str:
    scored = [row for row in run.rows if row.method != "dense"]
    best = front(scored)
    if not best:
        count = "1 cache was" if len(run.rows) == 1 else f"{len(run.rows)} caches were"
        return f"{count} scored; none has both true bits and a positive KLD."
    row = best[0]
    return f"{row.label} holds {format_bits(row.true_bits)} true bits at a mean KLD of {format_small(row.kld.value)}."


def _summary(rival: Rival, comparisons: Sequence[Comparison]) -> str:
    clauses = []
    below = [entry for entry in comparisons if entry.verdict == "below"]
    above = [entry for entry in comparisons if entry.verdict == "above"]
    unclear = len(comparisons) - len(below) - len(above)
    if below:
        ratios = [entry.ratio.value or 1.0 for entry in below]
        clauses.append(f"lower KLD at {_of(below, comparisons)}, {_range(ratios)}")
    if above:
        ratios = [1 / (entry.ratio.value or 1.0) for entry in above]
        clauses.append(f"higher KLD at {_of(above, comparisons)}, {_range(ratios)}")
    if unclear:
        clauses.append(f"not distinguishable at {unclear} of {len(comparisons)}")
    return f"Against {rival.name}: {'; '.join(clauses)}."


def _of(some: Sequence[Comparison], every: Sequence[Comparison]) -> str:
    return f"{len(some)} of {len(every)} comparable {'point' if len(every) == 1 else 'points'}"


def _range(ratios: list[float]) -> str:
    low, high = format_times(min(ratios)), format_times(max(ratios))
    return f"by {low}" if low == high else f"by {low} to {high}"


def _memory(run: Run) -> list[str]:
    plans = front(run.of("exact"))
    if not plans or not plans[0].true_bits:
        return []
    fewer = format_times(COMPUTE_BITS / plans[0].true_bits)
    return [f"{plans[0].label} takes {fewer} less memory than a 16-bit cache."]
