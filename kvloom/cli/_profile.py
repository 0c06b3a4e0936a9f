"""`kvloom profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvloom.cli._terminal import Device, Dtype, Model, Seed, Texts, load, progress


def profile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("profile.json"),
    prompts: Annotated[int, typer.Option(help="Prompts to measure on.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 512,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens the cache will keep exactly.")] = 4,
    recent: Annotated[int, typer.Option(min=0, help="Newest tokens the cache will keep exactly.")] = 0,
    text: Texts = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure how much each layer's keys and values matter."""
    from kvloom.assets import CALIBRATION, texts, token_windows
    from kvloom.plan import Window
    from kvloom.signals import compute_profile

    sources = texts(text or CALIBRATION)
    loaded, tokenizer = load(model, device, dtype)
    windows = token_windows(tokenizer, sources, tokens, prompts, seed)
    with progress() as update:
        made = compute_profile(
            loaded,
            windows,
            texts=[source.name for source in sources],
            window=Window(sinks=sinks, recent=recent),
            seed=seed,
            progress=lambda done, total, what: update(what, done, total),
        )
    made.save(output)
    layers = len(made.table.layers)
    typer.echo(f"{layers} layers measured in {made.seconds:.0f} s\nwrote {output}")
