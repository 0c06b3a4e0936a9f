"""What eviction costs a prompt and what it saves a step, on random weights of Llama 3.1 8B's shape.

    python -m benchmarks.eviction_speed --out eviction_speed.json                              # one GPU, bf16
    python -m benchmarks.eviction_speed --device cpu --layers 1 --tokens 512 --batch 1         # does it run?

Prompts: one sequence of random token ids passes through the model, with a cache that keeps everything and with one that
keeps an eighth by SnapKV (window 32), growing and of fixed size, in turn. Layers: what a prompt's end takes of one
layer alone, with nothing else for the device to do, and when the host is done with it; where both are as long, the host
launches more slowly than the device works, or waits for it. Steps: attention of one token over the caches
of all layers, filled with random states, a CUDA graph of all of them; read with no mask, and with a mask by place as
compiled steps have it. SnapKV keeps as many tokens of every head, Ada-KV more of some heads than of others. Bounds: a
prompt takes at most 5 % longer; a step is faster by at least 80 % of the ratio of the bytes held.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.figures import Verdict
from benchmarks.profile_8b import llama_8b
from kvloom import LoomCache, Plan, enable, kernels
from kvloom.bench._timing import clock
from kvloom.bench.generation._fill import fill_random
from kvloom.plan import Evict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = dict[str, Any]

SHARES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
PROMPT_SHARE = 1 / 8
POLICIES = ("snapkv", "adakv")
WINDOW = 32
NEW_TOKENS = 64
MOST_LONGER, LEAST_OF_RATIO = 0.05, 0.8


def plan_of(model: PreTrainedModel, bits: int, share: float, policy: str = "snapkv") -> Plan:
    """Keys and values of ``bits`` bits in every layer; evicting unless the share is 1."""
    plan = Plan.uniform(model, bits, bits)
    if share == 1:
        return plan
    evict = Evict(policy=policy, budget=share, parameters={"window": WINDOW})
    return Plan(model=plan.model, layers=tuple(x.model_copy(update={"evict": evict}) for x in plan.layers))


@torch.no_grad()
def prompts(model: PreTrainedModel, bits: int, tokens: int, repeats: int) -> list[Record]:
    """Seconds of a prompt's pass by cache, medians; the caches take turns, and the first turn does not count."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
    cases = [(kind, share) for kind in ("growing", "fixed") for share in (1.0, PROMPT_SHARE)]
    taken: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    for _ in range(repeats + 1):
        for kind, share in cases:
            cache = LoomCache(plan_of(model, bits, share), model, max_tokens=_room(kind, tokens))
            watch = clock(model.device).stopwatch()
            watch.mark()
            model(ids, past_key_values=cache, logits_to_keep=1)
            watch.mark()
            taken[kind, share] += watch.laps()
    return [
        {"kind": "prompt", "cache": kind, "share": share, "tokens": tokens, "seconds": median(taken[kind, share][1:])}
        for kind, share in cases
    ]


def _room(kind: str, tokens: int) -> int | None:
    return tokens + NEW_TOKENS if kind == "fixed" else None


@torch.no_grad()
def layers(model: PreTrainedModel, bits: int, tokens: int, repeats: int) -> list[Record]:
    """Seconds of a prompt's keys and values in one layer, by cache and policy: until all is done, until the host is."""
    kinds, policies = ("growing", "fixed"), (None, *POLICIES)
    return [_layer(model, bits, tokens, repeats, kind, policy) for kind in kinds for policy in policies]


def _layer(model: PreTrainedModel, bits: int, tokens: int, repeats: int, kind: str, policy: str | None) -> Record:
    plan = plan_of(model, bits, PROMPT_SHARE, policy) if policy else plan_of(model, bits, 1)
    layer = next(iter(LoomCache(plan, model, max_tokens=_room(kind, tokens)).packed_layers.values()))
    draw, dim = partial(torch.randn, dtype=model.dtype, device=model.device), model.config.head_dim
    key, value = (draw((1, model.config.num_key_value_heads, tokens, dim)) for _ in range(2))
    query = draw((1, model.config.num_attention_heads, tokens, dim))
    taken, of_host = [], []
    for _ in range(repeats + 1):
        layer.reset()
        watch = clock(model.device).stopwatch()
        watch.mark()
        start = perf_counter()
        handle, _ = layer.update(key, value)
        if policy:
            handle.observe(query, scaling=dim**-0.5, mask=None, softcap=None, sink_logits=None)
        of_host.append(perf_counter() - start)
        watch.mark()
        taken += watch.laps()
    record = {"kind": "layer", "cache": kind, "policy": policy, "tokens": tokens}
    return record | {"seconds": median(taken[1:]), "host_seconds": median(of_host[1:])}


@torch.no_grad()
def steps(
    model: PreTrainedModel, bits: int, tokens: int, batch: int, policy: str, shares: Sequence[float] = SHARES
) -> list[Record]:
    """Seconds of one layer's attention in a step, and live bytes, by the share of a prompt that is kept."""
    return [_step(model, bits, tokens, batch, policy, share) for share in shares]


def _step(model: PreTrainedModel, bits: int, tokens: int, batch: int, policy: str, share: float) -> Record:
    cache = LoomCache(plan_of(model, bits, share, policy), model, max_tokens=tokens + NEW_TOKENS)
    fill_random(cache, model, batch, tokens)
    layers: Any = list(cache.packed_layers.values())
    heads, dim = model.config.num_attention_heads, model.config.head_dim
    query = torch.randn(batch, heads, 1, dim, dtype=model.dtype, device=model.device)
    mask = (torch.arange(tokens + NEW_TOKENS, device=model.device) < tokens).expand(batch, 1, 1, -1)
    read = partial(kernels.attend_static, query, scaling=dim**-0.5)
    unmasked, masked = (
        clock(model.device).time([partial(read, layer.store, mask=given) for layer in layers]) for given in (None, mask)
    )
    return {
        "kind": "step",
        "policy": policy,
        "bits": bits,
        "batch": batch,
        "tokens": tokens,
        "share": share,
        "layer_bytes": cache.nbytes() // len(layers),
        "seconds": unmasked.seconds,
        "masked_seconds": masked.seconds,
        "method": unmasked.method,
    }


def compared(records: list[Record]) -> list[Record]:
    """Records with what each is beside the first of its run: time, and of steps bytes."""
    first = records[0]
    made = []
    for record in records:
        more = {"times_first": record["seconds"] / first["seconds"]}
        if record["kind"] == "step":
            ratio = first["layer_bytes"] / record["layer_bytes"]
            for name in ("seconds", "masked_seconds"):
                more |= {f"of_ratio_{name}": first[name] / record[name] / ratio}
            more |= {"byte_ratio": ratio}
        made.append(record | more)
    return made


def table(records: Sequence[Record]) -> list[str]:
    """Steps as lines of Markdown."""
    lines = ["| policy | kept | MB a layer | x fewer bytes | us | of the ratio | us, masked | of the ratio |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for x in records:
        cells = [x["policy"], f"{x['share']:g}", f"{x['layer_bytes'] / 1e6:.1f}", f"{x['byte_ratio']:.2f}"]
        for name in ("seconds", "masked_seconds"):
            cells += [f"{x[name] * 1e6:.1f}", f"{x[f'of_ratio_{name}']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Every bound."""
    found = []
    for record in records:
        if record["kind"] == "layer" or record["share"] == 1:
            continue
        if record["kind"] == "prompt":
            longer = record["times_first"] - 1
            text = f"{record['cache']} cache: a prompt of {record['tokens']} takes {longer:+.1%}, at most +5 %"
            found.append(Verdict(longer <= MOST_LONGER, text))
        else:
            share = record["of_ratio_masked_seconds"]
            text = f"{record['policy']}, {record['share']:g} kept: {share:.0%} of the byte ratio, at least 80 %"
            found.append(Verdict(share >= LEAST_OF_RATIO, text))
    return found


def run(model: PreTrainedModel, bits: int, tokens: int, batch: int, repeats: int) -> list[Record]:
    """All parts."""
    enable(model)
    taken = prompts(model, bits, tokens, repeats)
    made = [*compared(taken[:2]), *compared(taken[2:]), *layers(model, bits, tokens, repeats)]
    for policy in POLICIES:
        made += compared(steps(model, bits, tokens, batch, policy))
    return made


def main() -> None:
    """Measure, and print the table and the verdicts."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)
    records = run(llama_8b(asked.layers, asked.device), asked.bits, asked.tokens, asked.batch, asked.repeats)
    if asked.out:
        asked.out.write_text(json.dumps(records, indent=1) + "\n")
    for record in records:
        if record["kind"] == "prompt":
            print(f"{record['cache']}, {record['share']:g} kept: prompt {record['seconds']:.3f} s")
        if record["kind"] == "layer":
            done, of_host = (f"{record[name] * 1e3:.2f} ms" for name in ("seconds", "host_seconds"))
            print(f"{record['cache']}, {record['policy'] or 'all kept'}: a layer {done}, its host {of_host}")
    print("\n".join(table([record for record in records if record["kind"] == "step"])))
    print(*verdicts(records), sep="\n")


if __name__ == "__main__":
    main()
