"""The roofline picture: rate of operations over operations a byte, under the ceilings of the same run.

S. Williams, A. Waterman, D. Patterson, *Roofline: an insightful visual performance model* (CACM 52(4), 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvloom._extras import require
from kvloom.errors import PlanError
from kvloom.evaluate import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP*X"
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")
_DENSE_COLOUR = "black"


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is measured.

    Raises:
        MissingExtraError: matplotlib is not installed.
        PlanError: The file's ending is no picture format, or its folder is not there.
    """
    require("plot", "The roofline picture")
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise PlanError(f"--plot {path}: give a file that ends in one of {', '.join(known)}.")
    if not path.absolute().parent.is_dir():
        raise PlanError(f"--plot {path}: the folder {path.absolute().parent} does not exist; make it first.")


def draw_roofline(records: Sequence[Record], path: Path) -> None:
    """Draw one run's attention, packed and dense.

    Args:
        records: As `bench_kernels` returns them.
        path: The picture; its ending says the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
        PlanError: See `check_picture`.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    (ceilings,) = (record for record in records if record["kind"] == "kernel_ceilings")
    dense, packed = _valid(records, "kernel_dense"), _valid(records, "kernel_attend")
    _draw_points(axes, dense, packed)
    _draw_roofs(axes, ceilings, [_intensity(record) for record in (*dense, *packed)])
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    axes.set_title(f"Decode attention, {ceilings['dtype']}, {ceilings['device']}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _valid(records: Sequence[Record], kind: str) -> list[Record]:
    """Records of a kind that were measured and compute attention."""
    measured = [record for record in records if record["kind"] == kind and record["skipped"] is None]
    return [record for record in measured if record["fault"] is None]


def _intensity(record: Record) -> float:
    return float(record["flops"] / record["nbytes"])


def _draw_points(axes: Axes, dense: Sequence[Record], packed: Sequence[Record]) -> None:
    shapes = list(dict.fromkeys((record["batch"], record["tokens"]) for record in (*dense, *packed)))
    names = list(dict.fromkeys(record["backend"] for record in packed))
    labels: dict[str, None] = {}
    for record in (*dense, *packed):
        shape = (record["batch"], record["tokens"])
        name = record.get("backend", "dense")
        colour = _COLOURS[names.index(name) % len(_COLOURS)] if name in names else _DENSE_COLOUR
        label = f"{name}, {shape[0]} × {shape[1]:,} tokens"
        axes.plot(
            _intensity(record),
            record["flops"] / record["seconds"],
            linestyle="none",
            marker=_MARKERS[shapes.index(shape) % len(_MARKERS)],
            color=colour,
            alpha=0.7,
            label=None if label in labels else label,
        )
        labels[label] = None
    _name_pairs(axes, packed)


def _name_pairs(axes: Axes, packed: Sequence[Record]) -> None:
    """Each pair's name over its highest point."""
    highest: dict[str, Record] = {}
    for record in packed:
        name = f"K{record['key_bits']}V{record['value_bits']}"
        known = highest.get(name)
        if known is None or record["flops"] / record["seconds"] > known["flops"] / known["seconds"]:
            highest[name] = record
    for name, record in highest.items():
        at = (_intensity(record), record["flops"] / record["seconds"])
        axes.annotate(name, at, xytext=(0, 8), textcoords="offset points", ha="center", fontsize="small")


def _draw_roofs(axes: Axes, ceilings: Record, intensities: Sequence[float]) -> None:
    read, copy, flops = (ceilings[name] for name in ("read_bytes_per_s", "copy_bytes_per_s", "flops_per_s"))
    ridge = flops / read
    start, end = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    roof = [(x, min(read * x, flops)) for x in (start, ridge, end)]
    axes.plot(
        *zip(*roof, strict=True), color="dimgray", label=f"read {read / 1e9:,.0f} GB/s, {flops / 1e12:.3g} TFLOP/s"
    )
    slope = [(x, copy * x) for x in (start, flops / copy)]
    axes.plot(*zip(*slope, strict=True), color="dimgray", linestyle=":", label=f"copy {copy / 1e9:,.0f} GB/s")
