"""`kvloom generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvloom.cli._numbers import tokens_option
from kvloom.cli._terminal import Device, Dtype, Model, config_of, err, load, named_plan
from kvloom.errors import DataError

if TYPE_CHECKING:
    from kvloom import Plan


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to answer or continue.")],
    plan: Annotated[
        str | None,
        typer.Option(help="A kv_plan.json, or a preset such as kvloom/K4V4; the uncompressed cache without it."),
    ] = None,
    max_new_tokens: Annotated[int, tokens_option("At most so many.")] = 128,
    growing: Annotated[
        bool, typer.Option("--growing", help="A growing cache also on a GPU, where its size is fixed by default.")
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the step first: a minute or more, then a quarter less time a token."),
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Generate text through the packed cache, greedily; on a GPU every step is one replayed graph."""
    from transformers import TextStreamer

    from kvloom import decode_loop
    from kvloom.bench import StepTimes
    from kvloom.generation import serves

    wanted = named_plan(plan, config_of(model, None))[1] if plan else None
    loaded, tokenizer = load(model, device, dtype, sharded=True)
    inputs = _inputs(tokenizer, prompt, raw).to(loaded.device)
    if inputs.input_ids.shape[1] == 0:
        raise DataError("--prompt has no tokens: give a text.")
    fixed = loaded.device.type == "cuda" and not growing
    cache = _cache(wanted, loaded, inputs.input_ids.shape[1] + max_new_tokens if fixed else None)
    times = StepTimes(loaded.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    looped = {"custom_generate": decode_loop, "token_streamer": streamer}
    loaded.generate(
        **inputs,
        **(looped if serves(cache) else {"streamer": streamer}),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=[times],
        disable_compile=not compiled,
    )
    if steps := times.steps():
        err.print(f"{1 / times.timing(steps).seconds:,.1f} tokens/s (median of {len(steps)} decode steps)")
    if wanted:
        cache.check()
        tokens = int(cache.get_seq_length())
        whose = " of this process" if cache.shard.world_size > 1 else ""
        err.print(f"{tokens} tokens in {cache.nbytes():,} live bytes{whose}, {cache.true_bits():.2f} true bits")


def _cache(plan: Plan | None, model: Any, max_tokens: int | None) -> Any:
    """The plan's cache, of fixed size where `max_tokens` is given; the uncompressed one without a plan."""
    from transformers import DynamicCache

    from kvloom import LoomCache, enable

    if plan is None:
        return DynamicCache(config=model.config)
    enable(model)
    if max_tokens is not None and plan.needs_growing:
        err.print(f"note: {plan.needs_growing} need a growing cache, so that steps are not compiled")
        max_tokens = None
    return LoomCache(plan, model, max_tokens=max_tokens)


def _inputs(tokenizer: Any, prompt: str, raw: bool) -> Any:
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
