"""`kvloom calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvloom.cli._numbers import count_option, tokens_option
from kvloom.cli._terminal import (
    Device,
    Dtype,
    Model,
    Seed,
    Texts,
    calibration,
    check_reading,
    config_of,
    load,
    named_plan,
    output_file,
    progress,
)


def calibrate(
    model: Model,
    plan: Annotated[Path, typer.Option(help="The plan to calibrate; codebooks are made where its codec is nuq.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The calibrated plan; matrices of rotations go beside it.")
    ] = Path("kv_plan.json"),
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Turn channels so that queries and outputs notice rounding least.")
    ] = False,
    prompts: Annotated[int, count_option("Prompts to calibrate on.")] = 4,
    tokens: Annotated[int, tokens_option("Tokens in each prompt.")] = 2048,
    text: Texts = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Fit a plan to the model, layer by layer: its codebooks, and rotations if asked for."""
    import kvloom

    _, wanted = named_plan(str(plan), config_of(model, None))
    output_file(output)
    check_reading(model, **{"--tokens": tokens})
    prompts_of, names = calibration(model, text, seed)
    drawn = prompts_of(prompts, tokens)
    loaded, _ = load(model, device, dtype)
    with progress() as update:
        made = kvloom.calibrate(
            loaded,
            wanted,
            drawn,
            rotate=rotate,
            texts=names,
            progress=lambda done, total, what: update(what, done, total),
        )
    made.save(output)
    typer.echo(f"{made.describe(tokens)}\nwrote {output}")
