"""`kvloom rotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvloom.cli._terminal import Device, Dtype, Model, Seed, Texts, calibration, progress


def rotate(
    model: Model,
    plan: Annotated[Path, typer.Option(help="The plan whose keys and values to rotate.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The rotated plan; its matrices go beside it.")],
    prompts: Annotated[int, typer.Option(help="Prompts to calibrate on.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 2048,
    text: Texts = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Calibrate a plan's rotations: channels are mixed so that queries and outputs notice rounding least."""
    from kvloom import Plan
    from kvloom.signals import calibrate_rotations

    wanted = Plan.load(plan)
    loaded, windows, names = calibration(model, text, prompts, tokens, seed, device, dtype)
    with progress() as update:
        made = calibrate_rotations(
            loaded,
            wanted,
            windows,
            texts=names,
            progress=lambda done, total, what: update(what, done, total),
        )
    made.save(output)
    typer.echo(f"{made.describe(tokens)}\nwrote {output} and the matrices beside it")
