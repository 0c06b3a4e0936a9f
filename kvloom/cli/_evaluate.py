"""`kvloom eval`, `kvloom report`, `kvloom demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvloom.cli._terminal import Device, Dtype, Model, Seed, Texts, Window, Windows, load, progress, without_bars

if TYPE_CHECKING:
    from kvloom import Plan

Page = Annotated[Path, typer.Option("--output", "-o", help="The page to write.")]


def evaluate(
    model: Model,
    plan: Annotated[list[Path], typer.Option(help="A kv_plan.json; give it again for more.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("runs/eval.jsonl"),
    windows: Windows = 8,
    window: Window = 2048,
    chunk: Annotated[int, typer.Option(help="Tokens of one forward pass.")] = 128,
    text: Texts = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Score plans against the uncompressed cache; a killed run goes on where it stopped."""
    from kvloom import Plan
    from kvloom.assets import EVALUATION, texts, token_windows
    from kvloom.evaluate import Protocol, dense_contestant, fidelity, plan_contestant
    from kvloom.report import render_text

    plans = [(path.stem, Plan.load(path)) for path in plan]
    sources = texts(text or EVALUATION)
    loaded, tokenizer = load(model, device, dtype)
    contestants = [dense_contestant(loaded)] + [
        plan_contestant(it, loaded, name=name, method=_method(it), prefill="quantized") for name, it in plans
    ]
    with progress() as update:
        records = fidelity(
            loaded,
            token_windows(tokenizer, sources, window, windows, seed),
            contestants,
            protocol=Protocol(chunk=chunk),
            texts=[source.name for source in sources],
            out=output,
            progress=update,
        )
    typer.echo(render_text(records))


def _method(plan: Plan) -> str:
    return (plan.provenance and plan.provenance.solver) or "uniform"


def report(
    runs: Annotated[Path, typer.Argument(help="A .jsonl file of results, or a folder of them.")],
    output: Page = Path("report.html"),
    title: Annotated[str, typer.Option()] = "kvloom report",
) -> None:
    """Print results as a table and write them as one self-contained page."""
    from kvloom.report import load_records, render_html, render_text

    records = load_records(runs)
    typer.echo(render_text(records))
    output.write_text(render_html(records, title), encoding="utf-8")
    typer.echo(f"\nwrote {output}")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="As for the other commands.")] = "smollm2-135m",
) -> None:
    """Walk the whole path on a real model: profile, plans, scores, speed, samples, page."""
    from kvloom.demo import run_demo

    without_bars()
    with progress() as update:
        made = run_demo(output, model=model, progress=update)
    typer.echo("\n".join([made.table, "", *made.notes, "", f"wrote {made.page}"]))
