"""The charts of a report as PNG files, drawn by matplotlib."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvloom._extras import require
from kvloom.report._bits import BitsMap, build_bits
from kvloom.report._chart import Plot, Rule, Series
from kvloom.report._drift import build_drifts
from kvloom.report._explore import build_explorers
from kvloom.report._kernels import build_kernels
from kvloom.report._memory import build_memory
from kvloom.report._pareto import build_pareto
from kvloom.report._rankings import build_rankings
from kvloom.report._records import Record
from kvloom.report._runs import group_runs
from kvloom.report._signal import build_signals
from kvloom.report._style import COLOURS
from kvloom.report._task_scores import build_tasks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "up": "^", "down": "v", "cross": "P"}
_MOST_BITS = 8
_CELL = 0.28
"""Inches of a cell of a heat map."""


def save_pictures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write every chart of the page, and the bits of mixed plans, as PNG files.

    Args:
        records: as `render_html` takes them.
        folder: made if it is not there; files of the same names are replaced.

    Returns:
        The files: `pareto-1.png`, `memory-1.png`, ..., named after the parts of the page.

    Raises:
        MissingExtraError: matplotlib is not installed; nothing is written.
    """
    require("plot", "Drawing charts as PNG")
    folder.mkdir(parents=True, exist_ok=True)
    numbers: Counter[str] = Counter()
    files = []
    for name, figure in _figures(records):
        numbers[name] += 1
        files.append(folder / f"{name}-{numbers[name]}.png")
        figure.savefig(files[-1], dpi=150)
    return files


def _figures(records: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    runs = group_runs(records)
    for plot in _plots(records):
        yield plot.name, _figure(plot)
    for shown in build_bits(runs):
        yield "bits", _heat_map(shown)


def _plots(records: Sequence[Record]) -> Iterator[Plot]:
    """In the order of the page."""
    yield from (part.plot for part in build_pareto(group_runs(records)))
    yield from (plot for part in build_tasks(records) for plot in part.plots)
    yield from (plot for part in build_drifts(records) for plot in part.plots)
    yield from (part.plot for part in build_explorers(records))
    yield from (plot for part in build_memory(records) for plot in part.plots)
    yield from (part.plot for part in build_signals(records))
    yield from (plot for part in build_rankings(records) for plot in part.plots)
    yield from (plot for part in build_kernels(records) for plot in part.plots)


def _figure(plot: Plot) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for one in plot.series:
        _draw(axes, one)
    for side, axis in (("x", plot.x_axis), ("y", plot.y_axis)):
        getattr(axes, f"set_{side}label")(axis.label)
        if axis.log:
            getattr(axes, f"set_{side}scale")("log", base=2 if axis.doubling else 10)
        if axis.doubling:
            getattr(axes, f"{side}axis").set_major_formatter(lambda value, _, write=axis.write: write(value))
    _draw_rules(axes, plot.rules)
    axes.set_title(plot.label, fontsize="medium", loc="left")
    axes.grid(which="major", color="#d9dde0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(plot.series) > 1:
        axes.legend(fontsize="small", frameon=False)
    return figure


def _draw(axes: Axes, series: Series) -> None:
    colour = COLOURS[series.style.colour][0]
    name: str | None = series.label
    if series.points:
        down, up = ([end for end, _ in _bars(series)], [end for _, end in _bars(series)])
        axes.errorbar(
            [point.x for point in series.points],
            [point.y for point in series.points],
            yerr=[down, up] if any((*down, *up)) else None,
            fmt=_MARKERS[series.style.shape],
            color=colour,
            markersize=6,
            elinewidth=1,
            capsize=2,
            label=name,
        )
        name = None
    axes.plot([point.x for point in series.line], [point.y for point in series.line], color=colour, label=name)


def _draw_rules(axes: Axes, rules: Sequence[Rule]) -> None:
    low, high = axes.get_ylim()
    for rule in rules:
        if low <= rule.y <= high:
            axes.axhline(rule.y, color=COLOURS["dense"][0], linewidth=1, linestyle="--")
            at = axes.get_yaxis_transform()
            axes.text(0.01, rule.y, rule.label, transform=at, va="bottom", fontsize="small", color=COLOURS["dense"][0])


def _bars(series: Series) -> list[tuple[float, float]]:
    """How far each point's interval reaches down and up."""
    return [
        (0.0, 0.0) if it.low is None or it.high is None else (max(0.0, it.y - it.low), max(0.0, it.high - it.y))
        for it in series.points
    ]


def _heat_map(shown: BitsMap) -> Figure:
    """Keys and values of every plan as rows, layers as columns, their bits as shades."""
    from matplotlib.figure import Figure

    rows = [(f"{strip.label}, {thread.label}", thread.cells) for strip in shown.strips for thread in strip.threads]
    width, height = 4 + _CELL * len(shown.layers), 1 + _CELL * len(rows)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    bits = [[_bits(cell.text) for cell in cells] for _, cells in rows]
    axes.imshow(bits, cmap="YlGnBu", vmin=0, vmax=_MOST_BITS, aspect="auto")
    for y, (_, cells) in enumerate(rows):
        for x, cell in enumerate(cells):
            colour = "white" if bits[y][x] > _MOST_BITS / 2 else "black"
            axes.text(x, y, cell.text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.set_xticks(range(len(shown.layers)), list(map(str, shown.layers)), fontsize=7)
    axes.set_xlabel("Layer")
    axes.set_title(f"Bits per layer, {shown.title}", fontsize="medium", loc="left")
    return figure


def _bits(text: str) -> float:
    """The number of a cell; 0 where there is none."""
    return float(text) if text.replace(".", "").isdigit() else 0.0
