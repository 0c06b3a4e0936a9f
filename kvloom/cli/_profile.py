"""`kvloom profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    load,
    output_file,
    progress,
)

if TYPE_CHECKING:
    from kvloom.plan import Evict


def profile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("profile.json"),
    prompts: Annotated[int, count_option("Prompts to measure on.")] = 16,
    tokens: Annotated[int, tokens_option("Tokens in each prompt.")] = 512,
    sinks: Annotated[int, tokens_option("First tokens the cache will keep exactly.", least=0)] = 4,
    recent: Annotated[int, tokens_option("Newest tokens the cache will keep exactly.", least=0)] = 0,
    rotated: Annotated[
        bool, typer.Option(help="Measure rotated formats with searched clip ranges too; better at 3 bits and below.")
    ] = False,
    signal: Annotated[
        str | None, typer.Option(help="What predicts losses: error_gradient, or another of docs/signals.md.")
    ] = None,
    batch: Annotated[int, count_option("Prompts in one forward pass; the numbers do not depend on it.")] = 1,
    evict: Annotated[
        str | None, typer.Option(help="Measure what keeping fewer tokens costs, too: auto, or a policy such as snapkv.")
    ] = None,
    evict_prompts: Annotated[int, count_option("Prompts that --evict measures on.")] = 8,
    evict_tokens: Annotated[int, tokens_option("Tokens in each of them; 128 more follow.")] = 2048,
    text: Texts = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure how much each layer's keys and values matter; a killed run goes on where it stopped."""
    from kvloom.plan import Fingerprint, Window
    from kvloom.signals import (
        DEFAULT_SIGNAL,
        FOLLOWING,
        compute_eviction,
        compute_profile,
        default_specs,
        rotated_specs,
    )

    candidates = _candidates(evict)
    output_file(output)
    evicted = evict_tokens + FOLLOWING
    check_reading(model, **{"--tokens": tokens}, **({"--evict-tokens": evicted} if candidates else {}))
    prompts_of, names = calibration(model, text, seed)
    drawn, longer = prompts_of(prompts, tokens), prompts_of(evict_prompts, evicted) if candidates else None
    loaded, _ = load(model, device, dtype)
    keys, values = default_specs(Fingerprint.of(loaded).head_dim)
    if rotated:
        keys, values = (plain + more for plain, more in zip((keys, values), rotated_specs(), strict=True))
    window = Window(sinks=sinks, recent=recent)
    with progress() as update:

        def report(done: int, total: int, what: str) -> None:
            update(what, done, total)

        made = compute_profile(
            loaded,
            drawn,
            key_specs=keys,
            value_specs=values,
            texts=names,
            window=window,
            seed=seed,
            signal=signal or DEFAULT_SIGNAL,
            batch=batch,
            out=output,
            progress=report,
        )
        if longer is not None:
            made = made.with_eviction(
                compute_eviction(
                    loaded,
                    longer,
                    candidates=candidates,
                    window=window,
                    texts=names,
                    seed=seed,
                    out=output,
                    progress=report,
                )
            )
    made.save(output)
    layers, seconds = len(made.table.layers), made.seconds + (made.eviction.seconds if made.eviction else 0)
    typer.echo(f"{layers} layers measured in {seconds:.0f} s\nwrote {output}")


def _candidates(evict: str | None) -> list[Evict]:
    """The evictions to measure; none unless asked for."""
    from kvloom.signals import default_candidates

    if evict is None:
        return []
    return default_candidates() if evict == "auto" else default_candidates([evict])
