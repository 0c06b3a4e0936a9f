"""`kvloom report`, `kvloom explore`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvloom.cli._budget import Tokens
from kvloom.cli._terminal import err, output_file, output_folder, without_bars
from kvloom.errors import DataError

if TYPE_CHECKING:
    from kvloom.evaluate import Record

Page = Annotated[Path, typer.Option("--output", "-o", help="The page to write.")]
Weights = Annotated[
    str | None, typer.Option(help="The profiled model: its weights share memory with the contexts that are told.")
]
ByHead = Annotated[bool, typer.Option("--by-head", help="Every KV head decides by itself.")]
ExploreDtype = Annotated[str, typer.Option(help="float16, bfloat16 or float32, of tokens kept exactly.")]


def report(
    runs: Annotated[Path, typer.Argument(help="A .jsonl file of results, or a folder of them.")],
    output: Page = Path("report.html"),
    title: Annotated[str, typer.Option()] = "kvloom report",
    profile: Annotated[
        Path | None, typer.Option(help="Made by `kvloom profile`: adds what `kvloom explore` shows.")
    ] = None,
    model: Weights = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Also write every chart as PNG into this folder; needs pip install 'kvloom[plot]'."),
    ] = None,
) -> None:
    """Print results as a table and write them as one self-contained page."""
    from kvloom.report import load_records, render_html, render_text, save_pictures

    if model and not profile:
        raise DataError("--model is that of --profile: give both, or neither.")
    records = load_records(runs)
    output_file(output)
    if png:
        output_folder(png)
    if profile:
        records.append(_front(profile, model, 8192, "bfloat16", by_head=False))
    pictures = save_pictures(records, png) if png else []
    typer.echo(render_text(records))
    output.write_text(render_html(records, title), encoding="utf-8")
    typer.echo(f"\nwrote {output}" + (f" and {len(pictures)} charts to {png}" if png else ""))


def explore(
    profile: Annotated[Path, typer.Argument(help="Made by `kvloom profile`.")],
    output: Page = Path("explore.html"),
    title: Annotated[str, typer.Option()] = "kvloom explore",
    model: Weights = None,
    tokens: Tokens = 8192,
    dtype: ExploreDtype = "bfloat16",
    by_head: ByHead = False,
) -> None:
    """Write a page with a memory budget to drag and the best plan of it: bits, predicted loss, contexts that fit."""
    from kvloom.report import render_html

    output_file(output)
    record = _front(profile, model, tokens, dtype, by_head=by_head)
    output.write_text(render_html([record], title), encoding="utf-8")
    typer.echo(f"wrote {output} with {len(record['plans'])} plans")


def _front(path: Path, model: str | None, tokens: int, dtype: str, *, by_head: bool) -> Record:
    """The front of a profile, with the weights of the model if it is named."""
    from kvloom import Profile
    from kvloom.allocate import ExactFront, front_record

    profile = Profile.load(path)
    about: dict[str, Any] = {}
    if model:
        about = _weights(profile, model)
    with err.status("solving for every budget"):
        front = ExactFront(profile, tokens, dtype=dtype, by_head=by_head)
        return front_record(front, model or profile.model.architecture, **about)


def _weights(profile: Any, model: str) -> dict[str, Any]:
    """Bytes of the model's weights and the tokens it reads, if it is the one that was profiled."""
    from kvloom.assets import load_config
    from kvloom.evaluate import reads_at_most, weights_of
    from kvloom.plan import Fingerprint

    without_bars()
    config = load_config(model)
    profile.model.check(Fingerprint.of(config))
    return {"weights": weights_of(config), "reads_at_most": reads_at_most(config)}
