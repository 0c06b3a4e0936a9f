"""`kvloom search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvloom.cli._budget import Bits, BytesPerToken, Memory, Tokens, budget_of
from kvloom.cli._numbers import count_option
from kvloom.cli._terminal import AtOnce, Device, Model, Texts, Window, Windows, err, meter, output_file, output_folder
from kvloom.errors import PlanError


def search(
    model: Model,
    profile: Annotated[Path, typer.Argument(help="Made by `kvloom profile`.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("kv_plan.json"),
    bits: Bits = None,
    bytes_per_token: BytesPerToken = None,
    memory: Memory = None,
    tokens: Tokens = 8192,
    batch: Annotated[int | None, typer.Option(help="Sequences that share --memory.")] = None,
    trials: Annotated[int, count_option("Plans to measure, those of all processes together.")] = 200,
    sampler: Annotated[Literal["nsga2", "moead"], typer.Option(help="What proposes plans.")] = "nsga2",
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    study: Annotated[str | None, typer.Option(help="Journal file or database URL that processes share.")] = None,
    name: Annotated[str, typer.Option(help="Of the study.")] = "kvloom",
    front: Annotated[Path | None, typer.Option(help="A folder for all plans that no other beats.")] = None,
    windows: Windows = 4,
    window: Window = 2048,
    at_once: AtOnce = 1,
    text: Texts = None,
    device: Device = None,
) -> None:
    """Search plans by what they are measured to lose, as KVTuner does; processes can share the work."""
    from kvloom import Profile
    from kvloom.allocate import KVTuner, Objective, StudySettings, save_front

    budget = budget_of(bits, bytes_per_token, memory, tokens, batch, None)
    if budget is None:
        raise PlanError("budget is missing: give --bits, --bytes-per-token or --memory")
    measured = Profile.load(profile)
    output_file(output)
    if front:
        output_folder(front)
    measure = meter(measured, model, windows, window, at_once, text, 0, device)
    objective = Objective(
        f"KLD of {model} on {windows} windows of {window} tokens of {text or 'the evaluation essays'}",
        lambda plan: measure(plan)["value"],
    )
    settings = StudySettings(trials, sampler, seed, study, name)
    method = KVTuner(objective, settings, progress=lambda what, done, total: err.print(f"{what} {done} of {total}"))
    made = method.solve(measured, budget, window=measured.table.window, prefill="exact")
    made.save(output)
    typer.echo(made.describe(tokens))
    typer.echo(f"wrote {output}")
    if front:
        plans = method.front(measured, budget, window=measured.table.window)
        save_front(plans, front, tokens, batch or 1)
        typer.echo(f"wrote {len(plans)} plans to {front}")
