"""The heat map of bits per layer: two rows, K and V, for each mixed plan."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from kvloom.report._format import (
    DASH,
    format_bits,
    format_budget,
    format_small,
)
from kvloom.report._records import Record
from kvloom.report._runs import Row, Run
from kvloom.report._values import number

SHADES = (1, 2, 3, 4, 5, 6, 8, 16)


@dataclass(frozen=True)
class BitsCell:
    """One layer's keys or values: what to write, its shade, and the full spec."""

    text: str
    css: str
    title: str


@dataclass(frozen=True)
class Thread:
    """The keys or the values of a plan, one cell a layer, and their mean bits."""

    label: str
    cells: tuple[BitsCell, ...]
    mean: str


@dataclass(frozen=True)
class Strip:
    """One plan."""

    label: str
    facts: str
    threads: tuple[Thread, ...]


@dataclass(frozen=True)
class BitsMap:
    """The strips of one run over its layers, and the bit widths that occur in them."""

    title: str
    layers: tuple[int, ...]
    strips: tuple[Strip, ...]
    shades: tuple[BitsCell, ...]


def build_bits(runs: list[Run]) -> list[BitsMap]:
    """A map for each run that has mixed plans."""
    return [_bits_map(run) for run in runs if _mixed(run)]


def _mixed(run: Run) -> list[Row]:
    return [row for row in run.rows if row.layers and not row.method.startswith("uniform")]


def _bits_map(run: Run) -> BitsMap:
    rows = _mixed(run)
    layers = sorted({index for row in rows for index in _by_layer(row)})
    strips = tuple(_strip(row, layers) for row in rows)
    seen = {cell.text: cell for s in strips for thread in s.threads for cell in thread.cells}
    shades = sorted(
        (BitsCell(text, cell.css, "") for text, cell in seen.items() if text != DASH),
        key=lambda shade: float(shade.text),
    )
    return BitsMap(run.title, tuple(layers), strips, tuple(shades))


def _by_layer(row: Row) -> dict[int, Record]:
    return {entry["layer"]: entry for entry in row.layers if isinstance(entry.get("layer"), int)}


def _strip(row: Row, layers: list[int]) -> Strip:
    by_layer = _by_layer(row)
    facts = f"{format_bits(row.true_bits)} true bits, KLD {format_small(row.kld.value)}"
    threads = tuple(_thread(side, by_layer, layers) for side in ("key", "value"))
    return Strip(row.label, facts, threads)


def _thread(side: str, by_layer: dict[int, Record], layers: list[int]) -> Thread:
    bits = [number(by_layer.get(layer, {}).get(f"{side}_bits")) for layer in layers]
    known = [value for value in bits if value is not None]
    cells = tuple(_cell(side, layer, value, by_layer.get(layer, {})) for layer, value in zip(layers, bits, strict=True))
    mean = format_bits(fmean(known)) if known else DASH
    return Thread("K" if side == "key" else "V", cells, mean)


def _cell(side: str, layer: int, bits: float | None, entry: Record) -> BitsCell:
    spec = entry.get(side)
    told = spec if isinstance(spec, str) else f"{format_budget(bits)} bits"
    return shade(bits, f"Layer {layer} {side}s: {told}")


def shade(bits: float | None, title: str) -> BitsCell:
    """The cell of so many bits."""
    return BitsCell(format_budget(bits), f"b{bits:g}" if bits in SHADES else "bx", title)
