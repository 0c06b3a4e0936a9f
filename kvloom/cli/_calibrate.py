"""`kvloom calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvloom.cli._terminal import Device, Dtype, Model, Seed, Texts, calibration, progress


def calibrate(
    model: Model,
    plan: Annotated[Path, typer.Option(help="A kv_plan.json whose keys or values have codec nuq.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("kv_plan.json"),
    prompts: Annotated[int, typer.Option(help="Prompts to calibrate on.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 512,
    text: Texts = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Fill in the codebooks of a plan, layer by layer."""
    from kvloom import Plan, calibrate_codebooks

    wanted = Plan.load(plan)
    loaded, windows, names = calibration(model, text, prompts, tokens, seed, device, dtype)
    with progress() as update:
        made = calibrate_codebooks(
            loaded,
            wanted,
            windows,
            texts=names,
            progress=lambda done, total, what: update(what, done, total),
        )
    made.save(output)
    typer.echo(f"wrote {output}")
