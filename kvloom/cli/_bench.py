"""`kvloom bench kernels`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from kvloom.cli._terminal import progress

if TYPE_CHECKING:
    from kvloom.bench import Table

app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")

_PIPE_WIDTH = 120


@app.callback()
def _bench() -> None:
    """Make `kernels` a command of its own although it is the only one."""


@app.command()
def kernels(
    out: Annotated[Path, typer.Option(help="Results file; the same cases are replaced.")] = Path("runs/kernels.jsonl"),
    shapes: Annotated[str | None, typer.Option(help="Batch and packed tokens: B8x32K,B1x4K.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Bits of keys and values: 8:8,4:2.")] = None,
    heads: Annotated[str, typer.Option(help="Query heads and KV heads.")] = "32/8",
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    key_group: Annotated[int, typer.Option(help="Tokens that share a scale of a key channel.")] = 64,
    window: Annotated[int, typer.Option(help="Exact tokens after the packed ones.")] = 32,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32; on a CPU fp32, elsewhere fp16.")] = None,
    backends: Annotated[str | None, typer.Option(help="cuda,triton,torch; all there are by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, ... or cpu; the first GPU by default.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the roofline: roofline.png, .svg, .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as one JSON array.")] = False,
) -> None:
    """Time packed attention, packing and appending beside the best dense attention, and check errors."""
    from kvloom.bench import (
        bench_backends,
        bench_device,
        bench_kernels,
        check_picture,
        draw_roofline,
        make_grid,
        tables,
    )

    place = bench_device(device)
    grid = make_grid(
        place,
        shapes=shapes,
        pairs=pairs,
        heads=heads,
        head_dim=head_dim,
        key_group=key_group,
        window=window,
        dtype=dtype,
    )
    chosen = bench_backends(place, [name.strip() for name in backends.split(",")] if backends else None)
    if plot:
        check_picture(plot)
    with progress() as update:
        records = bench_kernels(grid, place, backends=chosen, out=out, progress=update)
    if plot:
        draw_roofline(records, plot)
    if as_json:
        typer.echo(json.dumps(records))
        return
    _print(tables(records))
    typer.echo("\n".join(f"wrote {path}" for path in (out, plot) if path))


def _print(made: list[Table]) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal and console.width == 80:  # what rich takes a pipe for
        console.width = _PIPE_WIDTH
    for table in made:
        drawn = Drawn(title=Text(table.title), title_justify="left", box=None, pad_edge=False)
        for index, heading in enumerate(table.headings):
            drawn.add_column(Text(heading), justify="left" if index < table.numbers_from else "right")
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn, *table.notes, "", sep="\n")
