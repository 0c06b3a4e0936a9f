"""The explorer: a memory budget to drag, and the exact plan of it. All plans are in the page; its script looks up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvloom.report._bits import BitsCell, shade
from kvloom.report._chart import Axis, Datum, Plot, Series
from kvloom.report._format import (
    format_bits,
    format_bytes,
    format_context,
    format_count,
    format_small,
    format_times,
)
from kvloom.report._records import Record
from kvloom.report._runs import of_kind
from kvloom.report._style import Style
from kvloom.report._values import number

X_AXIS = Axis("True bits per cached value")
FACTS = ("True bits", "Bytes a token", "Cache", "Smaller by", "Predicted loss")
SIDES = {"keys": "K", "values": "V"}


@dataclass(frozen=True)
class Track:
    """Keys or values of all layers, or of one KV head in all layers: a row of cells."""

    label: str
    cells: tuple[BitsCell, ...]


@dataclass(frozen=True)
class Explorer:
    """The plans of one front, and the one that is shown at first.

    Attributes:
        anchor: tells it from other explorers of the page.
        title: the model, and what decides.
        at: place of the plan shown at first.
        last: place of the largest plan.
        said: what the slider says of the plan shown at first.
        facts: names and figures of it.
        fits: memories and the contexts that fit in them.
        layers: of the columns.
        tracks: the rows.
        shades: bit widths that occur among the candidates.
        plot: predicted loss over true bits, without a plan of no loss.
        data: everything that the script looks up.
        caption: what must be known to read it.
    """

    anchor: str
    title: str
    at: int
    last: int
    said: str
    facts: tuple[tuple[str, str], ...]
    fits: tuple[tuple[str, str], ...]
    layers: tuple[int, ...]
    tracks: tuple[Track, ...]
    shades: tuple[BitsCell, ...]
    plot: Plot
    data: dict[str, Any]
    caption: str


def build_explorers(records: Sequence[Record]) -> list[Explorer]:
    """An explorer for each front."""
    fronts = [record for record in of_kind(records, "front") if record.get("plans")]
    return [_explorer(record, f"front-{n}") for n, record in enumerate(fronts, start=1)]


def _explorer(record: Record, anchor: str) -> Explorer:
    plans = record["plans"]
    at = _first_shown(plans)
    plot = _plot(record)
    named = _named(record)
    return Explorer(
        anchor=anchor,
        title=f"{record['model']}, {'every KV head' if record.get('by_head') else 'every layer'} decides",
        at=at,
        last=len(plans) - 1,
        said=_said(plans[at]),
        facts=tuple(zip(_headings(record), _facts(plans[at], record), strict=True)),
        fits=tuple(_fits(plans[at]).items()),
        layers=tuple(record["layers"]),
        tracks=tuple(_tracks(record, plans[at], named)),
        shades=tuple({cell.text: cell for side in SIDES for cell in _by_bits(named[side])}.values()),
        plot=plot,
        data=_data(record, plot, named),
        caption=_caption(record),
    )


def _first_shown(plans: Sequence[Record]) -> int:
    """The plan nearest to three true bits."""
    return min(range(len(plans)), key=lambda n: abs(plans[n]["true_bits"] - 3.0))


def _headings(record: Record) -> tuple[str, ...]:
    at = f" at {format_context(record['tokens'])}"
    return tuple(name + at if name == "Cache" else name for name in FACTS)


def _facts(plan: Record, record: Record) -> tuple[str, ...]:
    return (
        format_bits(plan["true_bits"]),
        format_count(plan["bytes_per_token"]),
        format_bytes(plan["nbytes"]),
        format_times(record["dense_bytes_per_token"] / plan["bytes_per_token"]),
        format_small(plan["predicted_loss"]),
    )


def _fits(plan: Record) -> dict[str, str]:
    return {gpu: format_context(tokens) if tokens else "no context" for gpu, tokens in plan["fits"].items()}


def _said(plan: Record) -> str:
    size, loss = format_bytes(plan["nbytes"]), format_small(plan["predicted_loss"])
    return f"{format_bits(plan['true_bits'])} true bits, {size}, predicted loss {loss}"


def _named(record: Record) -> dict[str, list[BitsCell]]:
    """The candidates of both sides as cells: bits, shade, and the whole format."""
    found = {"keys": record["key_specs"], "values": record["value_specs"]}
    return {side: [shade(spec["bits"], spec["label"]) for spec in specs] for side, specs in found.items()}


def _by_bits(cells: Sequence[BitsCell]) -> list[BitsCell]:
    return sorted(cells, key=lambda cell: float(cell.text))


def _tracks(record: Record, plan: Record, named: dict[str, list[BitsCell]]) -> list[Track]:
    heads = len(plan["keys"][0])
    return [
        Track(
            letter if heads == 1 else f"{letter} {head}",
            tuple(
                _titled(named[side][places[head]], layer)
                for layer, places in zip(record["layers"], plan[side], strict=True)
            ),
        )
        for side, letter in SIDES.items()
        for head in range(heads)
    ]


def _titled(cell: BitsCell, layer: int) -> BitsCell:
    return BitsCell(cell.text, cell.css, f"Layer {layer}: {cell.title}")


def _plot(record: Record) -> Plot:
    """A plan of no loss has no place on the log axis."""
    points = tuple(Datum(it["true_bits"], max(it["predicted_loss"], 0.0), "") for it in record["plans"])
    shown = tuple(point for point in points if point.y > 0)
    axis = Axis(f"Predicted loss ({record['signal']})", log=bool(shown))
    series = Series("exact plans", Style("exact", "circle"), (), shown or points)
    label = f"Predicted loss of exact plans against true bits, {record['model']}"
    return Plot("explore", str(record["model"]), label, (series,), X_AXIS, axis)


def _data(record: Record, plot: Plot, named: dict[str, list[BitsCell]]) -> dict[str, Any]:
    """Texts and places of every plan; cells as numbers of formats, row by row."""
    offset = len(named["keys"])
    cells = [*named["keys"], *named["values"]]
    return {
        "formats": [[cell.text, cell.css, cell.title] for cell in cells],
        "layers": record["layers"],
        "places": [_places(chart_points) for chart_points in _drawn(record, plot)],
        "plans": [
            {
                "said": _said(plan),
                "facts": _facts(plan, record),
                "fits": list(_fits(plan).values()),
                "cells": [
                    places[head] + (offset if side == "values" else 0)
                    for side in SIDES
                    for head in range(len(plan[side][0]))
                    for places in plan[side]
                ],
            }
            for plan in record["plans"]
        ],
    }


Point = tuple[float, float]


def _drawn(record: Record, plot: Plot) -> list[list[Point]]:
    """Pixels of every plan in each drawing; one of no loss lies on the axis."""
    return [
        [chart.place(plan["true_bits"], plan["predicted_loss"]) for plan in record["plans"]] for chart in plot.charts
    ]


def _places(points: Sequence[Point]) -> list[float]:
    return [pixel for point in points for pixel in point]


def _caption(record: Record) -> str:
    weights, most = number(record.get("weight_bytes")), number(record.get("reads_at_most"))
    beside = f"beside {format_bytes(weights)} of weights" if weights else "by itself"
    told = [
        f"Each plan has the least loss that the signal {record['signal']} predicts within its bytes, which count "
        f"scales and exact tokens, at a {record['dtype']} compute dtype. A context, in tokens, fits in GB of 10⁹ bytes "
        f"if one sequence’s cache does {beside}.",
        f"The model reads at most {format_count(most)}." if most else "",
        "kvloom eval measures what a plan costs.",
    ]
    return " ".join(filter(None, told))
