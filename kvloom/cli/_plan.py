"""`kvloom plan`, `kvloom convert`, `kvloom show`, `kvloom schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvloom.cli._terminal import err
from kvloom.errors import PlanError

if TYPE_CHECKING:
    from kvloom import Budget

Tokens = Annotated[str, typer.Option(help="Context length: 2048, 128K, ...")]


def plan(
    profile: Annotated[Path, typer.Argument(help="Made by `kvloom profile`.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("kv_plan.json"),
    bits: Annotated[float | None, typer.Option(help="Budget in true bits a number.")] = None,
    bytes_per_token: Annotated[float | None, typer.Option(help="Budget of one sequence.")] = None,
    memory: Annotated[str | None, typer.Option(help="Total budget: 6GiB, '24 GB', ...")] = None,
    tokens: Tokens = "8K",
    batch: Annotated[int | None, typer.Option(help="Sequences that share --memory.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of tokens kept exactly; the profiled model's by default.")] = None,
    method: Annotated[str, typer.Option(help="exact, or kvmix, which takes no budget.")] = "exact",
    prefill: Annotated[Literal["exact", "quantized"], typer.Option(help="What a prompt attends to.")] = "exact",
) -> None:
    """Spend a memory budget where it matters."""
    from kvloom import Profile
    from kvloom.allocate import allocate, parse_tokens

    budget = _budget(bits, bytes_per_token, memory, tokens, batch, dtype)
    made = allocate(Profile.load(profile), budget, method=method, prefill=prefill)
    made.save(output)
    typer.echo(made.describe(parse_tokens(tokens)))
    typer.echo(f"wrote {output}")


def _budget(
    bits: float | None,
    bytes_per_token: float | None,
    memory: str | None,
    tokens: str,
    batch: int | None,
    dtype: str | None,
) -> Budget | None:
    from kvloom import Budget

    given = [amount for amount in (bits, bytes_per_token, memory) if amount is not None]
    if len(given) > 1:
        raise PlanError("give one budget: --bits, --bytes-per-token or --memory")
    if batch is not None and memory is None:
        raise PlanError("--batch goes with --memory: the other budgets are of one sequence")
    if bits is not None:
        return Budget.bits(bits, tokens, dtype)
    if bytes_per_token is not None:
        return Budget.bytes_per_token(bytes_per_token, tokens, dtype)
    if memory is not None:
        return Budget.memory(memory, batch or 1, tokens, dtype)
    return None


def convert(
    source: Annotated[Path, typer.Argument(help="A file; with --from preset, a preset's name.")],
    target: Annotated[Path, typer.Argument(help="The file to write.")],
    model: Annotated[str, typer.Option(help="smollm2-135m (packaged), a local folder, or a hub id.")],
    source_format: Annotated[
        str, typer.Option("--from", help="preset, kivi, kvmix, kvq, kvtuner-kivi, modelopt, ...")
    ] = "kvloom",
    target_format: Annotated[
        str, typer.Option("--to", help="kvloom, kvtuner, kvtuner-kivi, kvtuner-pertoken or modelopt.")
    ] = "kvloom",
    substitute: Annotated[
        bool, typer.Option("--substitute", help="Take the nearest where a side cannot say it.")
    ] = False,
) -> None:
    """Read a foreign configuration or a published preset as a plan, or write a plan in a foreign format."""
    import kvloom.plan
    from kvloom.assets import load_config

    shape = load_config(model)
    notes = kvloom.plan.convert(
        source, target, shape, source_format=source_format, target_format=target_format, substitute=substitute
    )
    for note in notes:
        err.print(f"note: {note}")
    typer.echo(f"wrote {target}")


def show(plan: Annotated[Path, typer.Argument(help="A kv_plan.json.")], tokens: Tokens = "32K") -> None:
    """Describe a plan: what each layer stores, bytes and true bits."""
    from kvloom import Plan
    from kvloom.allocate import parse_tokens

    typer.echo(Plan.load(plan).describe(parse_tokens(tokens)))


def schema() -> None:
    """Print the JSON schema of plan files."""
    from kvloom.plan import plan_schema

    typer.echo(json.dumps(plan_schema(), indent=2))
