"""Charts as geometry: data in, the positions an SVG template draws out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from kvloom.report._format import format_small
from kvloom.report._style import Style


@dataclass(frozen=True)
class Datum:
    """One point in data units, its interval on y, and what its tooltip says."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points drawn alike; `line` holds those that a line joins, and others that only bend it."""

    label: str
    style: Style
    points: tuple[Datum, ...]
    line: tuple[Datum, ...]


@dataclass(frozen=True)
class Rule:
    """A level that points are set against: a line across the chart, with its name."""

    y: float
    label: str


def tick_label(value: float) -> str:
    """A tick value without trailing zeros."""
    text = format_small(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


@dataclass(frozen=True)
class Axis:
    """An axis: its label and scale.

    `whole` asks for ticks at whole numbers only, `doubling` for ticks of a log axis at powers of two; `write` labels
    them.
    """

    label: str
    log: bool = False
    whole: bool = False
    from_zero: bool = False
    doubling: bool = False
    write: Callable[[float], str] = tick_label


@dataclass(frozen=True)
class Plot:
    """A chart in data units; on log axes every value must be positive.

    Attributes:
        name: of a file for it; the part of the page it is in.
        title: what sets it apart from its neighbours.
        label: the chart in words.
        series: what is drawn, at least one point or line.
        x_axis: the horizontal axis.
        y_axis: the vertical axis.
        rules: levels to set points against; those beyond the points are not drawn.
    """

    name: str
    title: str
    label: str
    series: tuple[Series, ...]
    x_axis: Axis
    y_axis: Axis
    rules: tuple[Rule, ...] = ()

    @cached_property
    def charts(self) -> tuple[Chart, ...]:
        """Drawings of every frame size."""
        return tuple(draw(self, frame) for frame in FRAMES)


@dataclass(frozen=True)
class Frame:
    """The size of a drawing in CSS pixels, and the class that shows it at that size."""

    css: str
    width: int
    height: int
    left: int = 52
    right: int = 16
    top: int = 34
    bottom: int = 46


WIDE = Frame("wide", 920, 440)
NARROW = Frame("narrow", 350, 360, left=44, right=8)
FRAMES = (WIDE, NARROW)


@dataclass(frozen=True)
class Tick:
    """A gridline at `at` pixels; minor ones have no label."""

    at: float
    label: str


@dataclass(frozen=True)
class Level:
    """A rule in pixels, and where its label starts."""

    at: float
    label: str
    x: float
    y: float


@dataclass(frozen=True)
class Mark:
    """A drawn point: position, ends of its error bar in pixels, tooltip."""

    x: float
    y: float
    tip: str
    bar: tuple[float, float] | None


@dataclass(frozen=True)
class Drawn:
    """A series in pixels."""

    series: Series
    marks: tuple[Mark, ...]
    path: str


@dataclass(frozen=True)
class Chart:
    """Everything the SVG template needs, and `place`, which puts other points into the drawing."""

    frame: Frame
    label: str
    x_axis: Axis
    y_axis: Axis
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    levels: tuple[Level, ...]
    drawn: tuple[Drawn, ...]
    place: Callable[[float, float], tuple[float, float]] = field(repr=False)

    @property
    def has_marks(self) -> bool:
        """Whether there are points to move between."""
        return any(one.marks for one in self.drawn)


def draw(plot: Plot, frame: Frame) -> Chart:
    """Lay out a plot on two axes inside a frame, whose left margin grows with the labels there."""
    x_axis, y_axis = plot.x_axis, plot.y_axis
    points = [point for one in plot.series for point in (*one.points, *one.line)]
    x_domain = _domain(x_axis, [point.x for point in points])
    y_domain = _domain(y_axis, [value for point in points for value in _reach(point, y_axis)])
    y_scale = _scale(y_axis, y_domain, frame.height - frame.bottom, frame.top)
    y_ticks = _ticks(y_axis, y_domain, y_scale, 6)
    longest = max(len(tick.label) for tick in y_ticks) if y_ticks else 0
    frame = replace(frame, left=max(frame.left, _LABEL_GAP + _LETTER * longest))
    x_scale = _scale(x_axis, x_domain, frame.left, frame.width - frame.right)
    drawn = tuple(_drawn(one, x_scale, y_scale) for one in plot.series)
    return Chart(
        frame=frame,
        label=plot.label,
        x_axis=x_axis,
        y_axis=y_axis,
        x_ticks=_ticks(x_axis, x_domain, x_scale, (frame.width - frame.left) // 70),
        y_ticks=y_ticks,
        levels=tuple(
            _level(y_scale(it.y), it.label, frame, drawn) for it in plot.rules if y_domain[0] <= it.y <= y_domain[1]
        ),
        drawn=drawn,
        place=lambda x, y: (x_scale(x), y_scale(y)),
    )


_LETTER, _LABEL_GAP = 8, 10
"""Pixels of a letter of a tick label, and between label and axis."""

_Scale = Callable[[float], float]
_Domain = tuple[float, float]


def _reach(point: Datum, axis: Axis) -> list[float]:
    ends = [value for value in (point.low, point.high) if value is not None]
    return [point.y, *(value for value in ends if value > 0 or not axis.log)]


def _domain(axis: Axis, values: list[float]) -> _Domain:
    low, high = min(values), max(values)
    if axis.log:
        return low / 1.3, high * 1.3
    pad = 0.04 * (high - low) or 0.5
    return (0.0 if axis.from_zero else low - pad), high + pad


def _scale(axis: Axis, domain: _Domain, start: float, end: float) -> _Scale:
    place = math.log10 if axis.log else float
    low, high = place(domain[0]), place(domain[1])

    def to_pixels(value: float) -> float:
        inside = min(max(value, domain[0]), domain[1])
        return round(start + (place(inside) - low) / (high - low) * (end - start), 1)

    return to_pixels


def _drawn(series: Series, x_scale: _Scale, y_scale: _Scale) -> Drawn:
    marks = tuple(Mark(x_scale(point.x), y_scale(point.y), point.tip, _bar(point, y_scale)) for point in series.points)
    path = "L".join(f"{x_scale(point.x)},{y_scale(point.y)}" for point in series.line)
    return Drawn(series, marks, f"M{path}" if len(series.line) > 1 else "")


def _level(at: float, label: str, frame: Frame, drawn: Sequence[Drawn]) -> Level:
    """A rule whose label lies where the fewest points do: over or under it, left or right."""
    width = _LETTER * len(label)
    places = [(x, y) for y in (at - 5, at + 14) for x in (frame.left + 4.0, frame.width - frame.right - width)]
    spans = [(mark.x, *(mark.bar or (mark.y, mark.y)), mark.y) for one in drawn for mark in one.marks]

    def covered(place: tuple[float, float]) -> int:
        x, y = place
        return sum(
            x - 8 < across < x + width + 8 and min(ends) < y + 6 and max(ends) > y - 16 for across, *ends in spans
        )

    x, y = min(places, key=covered)
    return Level(at, label, x, y)


def _bar(point: Datum, y_scale: _Scale) -> tuple[float, float] | None:
    if point.low is None or point.high is None:
        return None
    return y_scale(point.low), y_scale(point.high)


def _ticks(axis: Axis, domain: _Domain, scale: _Scale, room: int) -> tuple[Tick, ...]:
    if not axis.log:
        values = _linear_ticks(axis, domain, room)
    elif axis.doubling:
        values = _doubling_ticks(axis, domain, room)
    else:
        values = _log_ticks(axis, domain)
    return tuple(Tick(scale(value), label) for value, label in values)


def _log_ticks(axis: Axis, domain: _Domain) -> list[tuple[float, str]]:
    decades = range(math.floor(math.log10(domain[0])), math.ceil(math.log10(domain[1])) + 1)
    dense = math.log10(domain[1] / domain[0]) < 2.2
    steps = [
        (step * 10.0**decade, step == 1 or (dense and step in (2, 5))) for decade in decades for step in range(1, 10)
    ]
    return [
        (value, axis.write(value) if labelled else "") for value, labelled in steps if domain[0] <= value <= domain[1]
    ]


def _doubling_ticks(axis: Axis, domain: _Domain, room: int) -> list[tuple[float, str]]:
    first, last = math.ceil(math.log2(domain[0])), math.floor(math.log2(domain[1]))
    every = math.ceil((last - first + 1) / max(room, 2))
    return [(2.0**power, axis.write(2.0**power)) for power in range(first, last + 1) if power % every == 0]


def _linear_ticks(axis: Axis, domain: _Domain, room: int) -> list[tuple[float, str]]:
    rough = (domain[1] - domain[0]) / max(room, 2)
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(m * decade for m in (1, 2, 5, 10) if m * decade >= rough * 0.999)
    if axis.whole:
        step = max(1.0, step)
    first = math.ceil(domain[0] / step - 1e-9)
    last = math.floor(domain[1] / step + 1e-9)
    return [(index * step, axis.write(index * step)) for index in range(first, last + 1)]
