"""How well signals rank plans, and what they cost: a table with the intervals drawn, and the best one's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.report._chart import Axis, Datum, Plot, Series
from kvloom.report._format import format_bits, format_seconds, format_small
from kvloom.report._ranking import GROUPS, rank, ranking_notes
from kvloom.report._records import Record
from kvloom.report._runs import of_kind
from kvloom.report._style import Style
from kvloom.report._values import Interval, number

SPAN = 120
"""Pixels of the axis of rank correlations, from the least one told, or 0, to 1."""

X_AXIS = Axis("Predicted loss", log=True)
Y_AXIS = Axis("Measured KLD, nats per token", log=True)
_STYLES = {"spread": Style("uniform", "circle"), "equal": Style("exact", "circle")}


@dataclass(frozen=True)
class Bar:
    """A rank correlation: as text, and in pixels where it and its interval lie on the axis."""

    text: str
    bounds: str
    at: float
    low: float
    high: float


@dataclass(frozen=True)
class Ranked:
    """A signal: its time, and its correlation in every group of plans, None where it has none."""

    name: str
    seconds: str
    bars: tuple[Bar | None, ...]
    logs: tuple[str, ...]


@dataclass(frozen=True)
class Ranking:
    """The signals compared on one set of plans, the best first."""

    title: str
    groups: tuple[str, ...]
    rows: tuple[Ranked, ...]
    zero: float
    notes: str
    best: str
    plots: tuple[Plot, ...]


def build_rankings(records: Sequence[Record]) -> list[Ranking]:
    """A ranking for each model and text that signals were compared on."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in of_kind(records, "signal_comparison"):
        found.setdefault(_where(record), []).append(record)
    plans = of_kind(records, "random_plan")
    return [_ranking(own, [it for it in plans if _where(it) == where]) for where, own in found.items()]


def _where(record: Record) -> tuple[str, ...]:
    text = record.get("text")
    digest = text.get("sha256") if isinstance(text, dict) else None
    return (*(str(record.get(key)) for key in ("model", "device", "dtype")), str(digest))


def _ranking(records: Sequence[Record], plans: Sequence[Record]) -> Ranking:
    ordered = sorted(records, key=rank, reverse=True)
    groups = [group for group in GROUPS if any(group in record for record in ordered)]
    told = [_rho(record, group) for record in ordered for group in groups]
    least = min([0.0, *(it.low if it.low is not None else it.value or 0.0 for it in told)])
    best = ordered[0]["name"]
    return Ranking(
        title=", ".join(str(records[0][key]) for key in ("model", "device", "dtype")),
        groups=tuple(GROUPS[group] for group in groups),
        rows=tuple(_ranked(record, groups, least) for record in ordered),
        zero=_place(0.0, least),
        notes=ranking_notes(records),
        best=best,
        plots=tuple(_plots(plans, best)),
    )


def _ranked(record: Record, groups: Sequence[str], least: float) -> Ranked:
    return Ranked(
        record["name"],
        format_seconds(number(record.get("seconds"))),
        tuple(_bar(_rho(record, group), least) for group in groups),
        tuple(f"{record[group]['pearson_log']['value']:.3f}" if group in record else "" for group in groups),
    )


def _rho(record: Record, group: str) -> Interval:
    return Interval.of(record[group]["spearman"]) if group in record else Interval()


def _bar(rho: Interval, least: float) -> Bar | None:
    if rho.value is None:
        return None
    low, high = rho.bounds or (rho.value, rho.value)
    places = (_place(value, least) for value in (rho.value, low, high))
    return Bar(f"{rho.value:.3f}", f"[{low:.3f}, {high:.3f}]" if rho.bounds else "", *places)


def _place(rho: float, least: float) -> float:
    return round(SPAN * (rho - least) / (1 - least), 1)


def _plots(plans: Sequence[Record], signal: str) -> list[Plot]:
    """Measured over predicted loss of every random plan, by the signal that ranks best."""
    series = tuple(
        Series(what, _STYLES[group], points, ())
        for group, what in GROUPS.items()
        if (points := _points([plan for plan in plans if plan.get("group") == group], signal))
    )
    if not series:
        return []
    label = f"Measured KLD of random plans against what {signal} predicted"
    return [Plot("ranking", signal, label, series, X_AXIS, Y_AXIS)]


def _points(plans: Sequence[Record], signal: str) -> tuple[Datum, ...]:
    return tuple(
        Datum(predicted, measured, _tip(plan, predicted, measured))
        for plan in plans
        if (predicted := number((plan.get("predicted") or {}).get(signal))) is not None
        and (measured := number(plan.get("kld"))) is not None
        and min(predicted, measured) > 0
    )


def _tip(plan: Record, predicted: float, measured: float) -> str:
    bits = format_bits(number(plan.get("true_bits")))
    return f"{plan['name']}\n{bits} true bits\npredicted {format_small(predicted)}\nKLD {format_small(measured)}"
