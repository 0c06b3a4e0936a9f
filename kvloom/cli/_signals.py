"""`kvloom signals compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvloom.cli._numbers import amount_option, count_option, tokens_option
from kvloom.cli._terminal import Device, Dtype, Model, Seed, check_reading, load, output_file, progress

app = typer.Typer(no_args_is_help=True, help="Compare what predicts the loss of a plan.")

_PIPE_WIDTH = 140


@app.callback()
def _signals() -> None:
    """Make `compare` a command of its own although it is the only one."""


@app.command()
def compare(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("runs/signals.jsonl"),
    signal: Annotated[list[str] | None, typer.Option(help="A signal; give it again for more. All cheap ones.")] = None,
    measured: Annotated[bool, typer.Option(help="Measure every unit and format by itself, too: the truth.")] = False,
    plans: Annotated[int, count_option("Random plans of 2.2 to 6 true bits.", least=0)] = 200,
    equal: Annotated[int, count_option("Random plans of equal true bits.", least=0)] = 100,
    bits: Annotated[float, amount_option("True bits of those.")] = 3.0,
    windows: Annotated[int, count_option("Text windows to score plans on.")] = 8,
    window: Annotated[int, tokens_option("Tokens in each window.")] = 1031,
    chunk: Annotated[int, tokens_option("Tokens of one forward pass.")] = 512,
    prompts: Annotated[int, count_option("Prompts to measure signals on.")] = 16,
    tokens: Annotated[int, tokens_option("Tokens in each prompt.")] = 512,
    batch: Annotated[int, count_option("Windows, or prompts, in one forward pass.")] = 1,
    share: Annotated[str, typer.Option(help="2/8: measure every eighth plan only, from the second on.")] = "1/1",
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure random plans and rank every signal's predictions with them; a killed run goes on where it stopped."""
    from kvloom.assets import CALIBRATION, EVALUATION, load_tokenizer, texts, token_windows
    from kvloom.evaluate import PlanCounts, Protocol, compare_signals
    from kvloom.report import HEADINGS, ranking_notes, ranking_rows
    from kvloom.signals import get, signals

    own, counts, protocol = _share(share), PlanCounts(plans, equal, bits, seed=seed), Protocol(chunk=chunk)
    wanted = signal or [name for name in signals() if not name.startswith("measured")]
    for name in wanted:
        get(name)
    output_file(output)
    check_reading(model, **{"--window": window, "--tokens": tokens})
    tokenizer = load_tokenizer(model)
    scored = token_windows(tokenizer, texts(EVALUATION), window, windows, seed)
    drawn = token_windows(tokenizer, texts(CALIBRATION), tokens, prompts, seed)
    loaded, _ = load(model, device, dtype)
    with progress() as update:
        records = compare_signals(
            loaded,
            scored,
            drawn,
            wanted=[*wanted, "measured_kl"] if measured else wanted,
            plans=counts,
            protocol=protocol,
            texts=EVALUATION,
            calibration=CALIBRATION,
            out=output,
            share=own,
            batch=batch,
            progress=update,
        )
    if not records:
        typer.echo(f"share {share} measured; without --share the table is made of all")
        return
    console = Console(highlight=False, markup=False)
    if not console.is_terminal and console.width == 80:  # what rich takes a pipe for
        console.width = _PIPE_WIDTH
    table = Table(*HEADINGS, box=None, pad_edge=False)
    for row in ranking_rows(records):
        table.add_row(*row)
    console.print(table, "", ranking_notes(records), "", f"wrote {output}", sep="\n")


def _share(text: str) -> tuple[int, int]:
    """``2/8`` as ``(2, 8)``."""
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise typer.BadParameter(f"{text!r} is no share: give the first and the number of shares, such as 2/8.")
    return int(first), int(of)
