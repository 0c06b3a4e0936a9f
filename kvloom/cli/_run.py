"""`kvloom generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvloom.cli._terminal import Device, Dtype, Model, err, load


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to answer or continue.")],
    plan: Annotated[Path | None, typer.Option(help="A kv_plan.json; the uncompressed cache without it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Generate text through the packed cache, greedily."""
    from transformers import DynamicCache, TextStreamer

    from kvloom import LoomCache, Plan, enable

    wanted = Plan.load(plan) if plan else None
    loaded, tokenizer = load(model, device, dtype)
    if wanted:
        enable(loaded)
    cache: Any = LoomCache(wanted, loaded) if wanted else DynamicCache(config=loaded.config)
    loaded.generate(
        **_inputs(tokenizer, prompt, raw).to(loaded.device),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    if wanted:
        err.print(f"{cache.get_seq_length()} tokens in {cache.nbytes():,} bytes, {cache.true_bits():.2f} true bits")


def _inputs(tokenizer: Any, prompt: str, raw: bool) -> Any:
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
