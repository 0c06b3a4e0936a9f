"""`kvloom plan`, `kvloom convert`, `kvloom show`, `kvloom schema`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvloom.cli._budget import Bits, BytesPerToken, Memory, Tokens, budget_of, constraints_of
from kvloom.cli._numbers import amount_option
from kvloom.cli._terminal import AtOnce, Device, Seed, Texts, Window, Windows, err, meter, output_file, output_folder
from kvloom.errors import PlanError

if TYPE_CHECKING:
    from kvloom import Budget, Plan
    from kvloom.allocate import Allocator, Constraints, ExactFront


def plan(
    profile: Annotated[Path, typer.Argument(help="Made by `kvloom profile`.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("kv_plan.json"),
    bits: Bits = None,
    bytes_per_token: BytesPerToken = None,
    memory: Memory = None,
    max_kld: Annotated[float | None, amount_option("Instead: the smallest plan measured to lose no more.")] = None,
    front: Annotated[Path | None, typer.Option(help="Instead: a folder for the best plan of every size.")] = None,
    tokens: Tokens = 8192,
    batch: Annotated[int | None, typer.Option(help="Sequences that share --memory.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, ..., of tokens kept exactly; the profiled model's by default.")
    ] = None,
    method: Annotated[str, typer.Option(help="exact, greedy, joint, kvq, kvtuner; kvmix takes no budget.")] = "exact",
    prefill: Annotated[Literal["exact", "quantized"], typer.Option(help="What a prompt attends to.")] = "exact",
    equal_in: Annotated[int, typer.Option(help="Layers in a block that share their bits.")] = 1,
    pairs: Annotated[str | None, typer.Option(help="Bits a layer may have: K4V4,K4V2,...")] = None,
    max_layouts: Annotated[int | None, typer.Option(help="Different pairs of formats in the plan.")] = None,
    protect: Annotated[list[str] | None, typer.Option(help="Layers and their least bits: 0-1,29:8.")] = None,
    by_head: Annotated[bool, typer.Option("--by-head", help="Every KV head decides by itself.")] = False,
    evict: Annotated[
        str | None, typer.Option(help="Fewer tokens, too, where that loses less: auto, or a policy such as snapkv.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="What --max-kld is measured on.")] = None,
    windows: Windows = 8,
    window: Window = 2048,
    at_once: AtOnce = 1,
    text: Texts = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Spend a memory budget where it matters."""
    from kvloom import Profile
    from kvloom.allocate import ExactFront, allocate

    budget = budget_of(bits, bytes_per_token, memory, tokens, batch, dtype)
    constraints = constraints_of(equal_in, pairs, max_layouts, protect)
    _check_goal(budget, max_kld, front, model)
    one_plan = max_kld is None and front is None
    how = _joint(method, evict, constraints, by_head, one_plan) or _allocator(method, constraints, by_head, one_plan)
    measured = Profile.load(profile)
    curve = ExactFront(measured, tokens, 1, dtype, constraints, prefill=prefill, by_head=by_head)
    if front:
        output_folder(front)
        _write_front(curve, front)
        return
    output_file(output)
    if max_kld is not None and model:
        about = f"{windows} windows of {window} tokens of {', '.join(text or ['the evaluation essays'])}, {model}"
        made = _smallest(curve, max_kld, meter(measured, model, windows, window, at_once, text, seed, device), about)
    else:
        made = allocate(measured, budget, method=how, prefill=prefill)
    made.save(output)
    typer.echo(made.describe(tokens))
    typer.echo(f"wrote {output}")


def _joint(method: str, evict: str | None, constraints: Constraints, by_head: bool, one_plan: bool) -> Allocator | None:
    """The joint optimum of tokens and bits, if it is asked for; refuses what it has not."""
    from kvloom.allocate import Exact, Joint

    if method != Joint.name and evict is None:
        return None
    if method not in (Exact.name, Joint.name):
        raise PlanError(f"--evict chooses tokens and bits together, which method {method!r} does not: leave one out")
    if constraints or by_head or not one_plan:
        raise PlanError("side constraints, --by-head, --max-kld and --front do not go with --evict: leave them out")
    return Joint(evict or "auto")


def _allocator(method: str, constraints: Constraints, by_head: bool, one_plan: bool) -> Allocator:
    """The method with its options; refuses those that it has not."""
    from kvloom.allocate import Exact, Greedy, get

    if method == Exact.name:
        return Exact(constraints, by_head)
    if constraints or not one_plan:
        raise PlanError(f"side constraints, --max-kld and --front need method exact, not {method!r}")
    if method == Greedy.name:
        return Greedy(by_head)
    if by_head:
        raise PlanError(f"--by-head needs method exact or greedy, not {method!r}")
    return get(method)()


def _check_goal(budget: Budget | None, max_kld: float | None, front: Path | None, model: str | None) -> None:
    """Refuse two goals at once, and a model that nothing is measured on."""
    if sum((budget is not None, max_kld is not None, front is not None)) > 1:
        raise PlanError("give a budget, --max-kld or --front, and only one of them")
    if (max_kld is None) != (model is None):
        raise PlanError("--max-kld is measured on --model: give both")


def _write_front(curve: ExactFront, folder: Path) -> None:
    from kvloom.allocate import save_front

    names = save_front(curve.plans(), folder, curve.tokens, curve.batch, curve.dtype)
    typer.echo(f"wrote {len(names)} plans, front.json and front.png to {folder}")


def _smallest(curve: ExactFront, limit: float, measure: Callable[[Plan], dict[str, float]], about: str) -> Plan:
    """The smallest plan within the limit; what was measured is printed as it comes."""
    from kvloom.allocate import smallest_plan

    def told(plan: Plan) -> dict[str, float]:
        kld = measure(plan)
        interval = f"{kld['value']:.4g} [{kld['low']:.4g}, {kld['high']:.4g}]"
        typer.echo(f"measured {plan.true_bits(curve.tokens, curve.dtype):.3f} true bits: KLD {interval}")
        return kld

    typer.echo(f"measuring on {about}")
    return smallest_plan(curve, limit, told, about)


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
    output_file(target)
    notes = kvloom.plan.convert(
        source, target, shape, source_format=source_format, target_format=target_format, substitute=substitute
    )
    for note in notes:
        err.print(f"note: {note}")
    typer.echo(f"wrote {target}")


def show(plan: Annotated[Path, typer.Argument(help="A kv_plan.json.")], tokens: Tokens = 32768) -> None:
    """Describe a plan: what each layer stores, bytes and true bits."""
    from kvloom import Plan

    typer.echo(Plan.load(plan).describe(tokens))


def schema() -> None:
    """Print the JSON schema of plan files."""
    from kvloom.plan import plan_schema

    typer.echo(json.dumps(plan_schema(), indent=2))
