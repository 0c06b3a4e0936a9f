"""The importance signal: gradient norms of keys and values, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.report._chart import Axis, Datum, Plot, Series
from kvloom.report._format import format_small
from kvloom.report._records import Record
from kvloom.report._runs import of_kind
from kvloom.report._style import Style
from kvloom.report._values import numbers

LOG_FROM = 30.0  # a wider range than this is drawn on a log axis
X_AXIS = Axis("Layer", whole=True)
SIDES = {"key": ("Keys", Style("key", "circle")), "value": ("Values", Style("value", "square"))}


@dataclass(frozen=True)
class Signal:
    """The chart of one signal record."""

    plot: Plot
    has_spread: bool


def build_signals(records: Sequence[Record]) -> list[Signal]:
    """A chart for each signal record that holds gradient norms."""
    found = [(record, _all_series(record)) for record in of_kind(records, "signal")]
    return [_signal(record, series) for record, series in found if series]


def _signal(record: Record, series: tuple[Series, ...]) -> Signal:
    title = str(record.get("model") or "")
    values = [point.y for one in series for point in one.points]
    log = min(values) > 0 and max(values) / min(values) > LOG_FROM
    axis = Axis("Gradient norm", log=log, from_zero=not log)
    label = f"Gradient norm of keys and values by layer, {title}"
    return Signal(
        Plot("signal", title, label, series, X_AXIS, axis),
        has_spread=any(point.low is not None for one in series for point in one.points),
    )


def _all_series(record: Record) -> tuple[Series, ...]:
    gradient = record.get("gradient")
    layers = record.get("layers")
    if not isinstance(gradient, dict) or not isinstance(layers, list):
        return ()
    series = [_series(side, layers, gradient) for side in SIDES]
    return tuple(one for one in series if one.points)


def _series(side: str, layers: list[object], gradient: Record) -> Series:
    label, style = SIDES[side]
    norms = numbers(gradient.get(side))
    spreads = numbers(gradient.get(f"{side}_spread")) or [None] * len(norms)
    points = tuple(
        _datum(f"Layer {layer}, {side}s", layer, norm, spread)
        for layer, norm, spread in zip(layers, norms, spreads, strict=False)
        if isinstance(layer, int) and norm is not None
    )
    return Series(label, style, points, points)


def _datum(name: str, layer: int, norm: float, spread: float | None) -> Datum:
    tip = f"{name}\ngradient norm {format_small(norm)}"
    if spread is None:
        return Datum(layer, norm, tip)
    tip = f"{tip}\nspread over prompts ± {format_small(spread)}"
    return Datum(layer, norm, tip, max(norm - spread, 0.0), norm + spread)
