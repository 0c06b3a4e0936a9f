"""`kvloom eval`, `kvloom lm-eval`, `kvloom demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvloom.cli._numbers import count_option, tokens_option
from kvloom.cli._terminal import (
    Device,
    Dtype,
    Model,
    Seed,
    Texts,
    Window,
    check_reading,
    config_of,
    err,
    load,
    named_plans,
    output_file,
    progress,
    without_bars,
)

if TYPE_CHECKING:
    from kvloom import Plan

Plans = Annotated[
    list[str], typer.Option(help="A kv_plan.json or a preset such as kvloom/K4V4; give it again for more.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Results, in JSON lines.")]
Limit = Annotated[int | None, count_option("At most so many cases of each task.")]
Prefill = Annotated[
    Literal["quantized", "exact", "plan"],
    typer.Option(help="What prompts attend to: what the cache holds, their exact selves, or as the plan says."),
]


def evaluate(
    model: Model,
    plan: Plans,
    tasks: Annotated[str, typer.Option(help="Names with commas between: fidelity, ruler, needle, ...")] = "fidelity",
    output: Output = Path("runs/eval.jsonl"),
    limit: Limit = None,
    length: Annotated[
        list[int] | None,
        tokens_option("Tokens of prompt and answer, for tasks of any length; give it again.", least=2),
    ] = None,
    shots: Annotated[int | None, count_option("Examples in a GSM8K prompt.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of data sets: gsm8k/test.jsonl, longbench/trec.jsonl, ...")
    ] = None,
    prefill: Prefill = "quantized",
    windows: Annotated[int, count_option("Text windows of fidelity and drift; 0 takes all.", least=0)] = 8,
    window: Window = 2048,
    chunk: Annotated[int, tokens_option("Tokens of one forward pass.")] = 128,
    text: Texts = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Score plans and the uncompressed cache on tasks; a killed run goes on where it stopped."""
    from kvloom.assets import EVALUATION
    from kvloom.evaluate import Settings, choose, evaluate
    from kvloom.report import render_text

    settings = Settings(
        limit=limit,
        lengths=tuple(length) if length else None,
        shots=shots,
        windows=windows or None,
        window=window,
        chunk=chunk,
        texts=tuple(text or EVALUATION),
        data=data,
        seed=seed,
    )
    chosen = choose(_names(tasks), settings)
    plans = named_plans(plan, config_of(model, None))
    check_reading(model, **{f"task {it.name}": it.tokens for it in sorted(chosen.tasks, key=lambda it: it.tokens)})
    output_file(output)
    for note in chosen.notes:
        err.print(note)
    loaded, tokenizer = load(model, device, dtype, sharded=True)
    with progress() as update:
        records = evaluate(
            loaded, tokenizer, chosen.tasks, _contestants(plans, loaded, prefill), out=output, progress=update
        )
    typer.echo(render_text(records))


def lm_eval(
    model: Model,
    plan: Plans,
    tasks: Annotated[str, typer.Option(help="lm-eval's names of tasks, with commas between.")],
    output: Output = Path("runs/lm_eval.jsonl"),
    limit: Limit = None,
    shots: Annotated[
        int | None, count_option("Examples in a prompt; each task's own number without it.", least=0)
    ] = None,
    include: Annotated[Path | None, typer.Option(help="A folder of more tasks.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts in the chat template.")] = False,
    prefill: Prefill = "quantized",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Score plans and the uncompressed cache on lm-eval's tasks; a killed run goes on where it stopped."""
    from kvloom.integrations.lm_eval import harness
    from kvloom.report import render_text

    plans = named_plans(plan, config_of(model, None))
    output_file(output)
    loaded, tokenizer = load(model, device, dtype)
    with progress() as update:
        records = harness(
            loaded,
            tokenizer,
            _names(tasks),
            _contestants(plans, loaded, prefill),
            limit=limit,
            shots=shots,
            include=include,
            chat=chat,
            out=output,
            progress=update,
        )
    typer.echo(render_text(records))


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def _contestants(plans: dict[str, Plan], model: Any, prefill: str) -> list[Any]:
    """The uncompressed cache and every plan's."""
    from kvloom.evaluate import dense_contestant, plan_contestant, plan_method, shared_prefill

    wanted: Any = None if prefill == "plan" else prefill
    mode = shared_prefill(plans.values(), wanted)
    if mode != wanted:
        err.print(
            "A plan evicts, which chooses among tokens read exactly: all plans read prompts so (--prefill exact)."
        )
    packed = [plan_contestant(it, model, name=name, method=plan_method(it), prefill=mode) for name, it in plans.items()]
    return [dense_contestant(model), *packed]


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="As for the other commands.")] = "smollm2-135m",
) -> None:
    """Walk the whole path on a real model: profile, plans, scores, speed, samples, page."""
    from kvloom.demo import run_demo

    without_bars()
    with progress() as update:
        made = run_demo(output, model=model, progress=update)
    typer.echo("\n".join([made.table, "", *made.notes, "", f"wrote {made.page}"]))
