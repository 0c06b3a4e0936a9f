"""`kvloom profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvloom.cli._terminal import Device, Dtype, Model, Seed, Texts, calibration, progress


def profile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("profile.json"),
    prompts: Annotated[int, typer.Option(help="Prompts to measure on.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 512,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens the cache will keep exactly.")] = 4,
    recent: Annotated[int, typer.Option(min=0, help="Newest tokens the cache will keep exactly.")] = 0,
    rotated: Annotated[
        bool, typer.Option(help="Measure rotated formats with searched clip ranges too; better at 3 bits and below.")
    ] = False,
    signal: Annotated[
        str | None, typer.Option(help="What predicts losses: error_gradient, or another of docs/signals.md.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts in one forward pass; the numbers do not depend on it.")] = 1,
    text: Texts = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure how much each layer's keys and values matter; a killed run goes on where it stopped."""
    from kvloom.plan import Fingerprint, Window
    from kvloom.signals import DEFAULT_SIGNAL, compute_profile, default_specs, rotated_specs

    loaded, windows, names = calibration(model, text, prompts, tokens, seed, device, dtype)
    keys, values = default_specs(Fingerprint.of(loaded).head_dim)
    if rotated:
        keys, values = (plain + more for plain, more in zip((keys, values), rotated_specs(), strict=True))
    with progress() as update:
        made = compute_profile(
            loaded,
            windows,
            key_specs=keys,
            value_specs=values,
            texts=names,
            window=Window(sinks=sinks, recent=recent),
            seed=seed,
            signal=signal or DEFAULT_SIGNAL,
            batch=batch,
            out=output,
            progress=lambda done, total, what: update(what, done, total),
        )
    made.save(output)
    layers = len(made.table.layers)
    typer.echo(f"{layers} layers measured in {made.seconds:.0f} s\nwrote {output}")
