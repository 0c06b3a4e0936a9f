"""A full set of result records, made up but shaped like a run of the demo."""

from __future__ import annotations

import math
import random
from typing import Any

Record = dict[str, Any]

LAYERS = 30
BLOCKS = 128
PROMPT = "The loom in the corner of the workshop had not been touched since spring, and"
DENSE_TEXT = (
    " the old weaver was glad of it. He had been waiting for the right yarn, he said, and the right "
    "yarn had not come. When it did, he would know what to do with every thread of it."
)
ENDINGS = (" the weaver had gone to the sea.", " nobody asked why.", " it was still waiting for him.")
RUN: Record = {
    "context": 2048,
    "scored_tokens": 16384,
    "chunk": 128,
    "model": "SmolLM2-135M-Instruct",
    "device": "cpu",
    "dtype": "float32",
    "text": {"names": ["worked.txt", "greatwork.txt", "hwh.txt"], "sha256": "ab" * 32},
    "when": "2026-11-22T06:00:00Z",
}
EXACT = {2.5: (2.5, 0.212), 3.0: (3.0, 0.061), 3.5: (3.49, 0.0204), 4.5: (4.5, 0.0052), 6.0: (6.0, 0.00071)}
UNIFORM = {2.5: (2.52, 0.431), 3.0: (3.02, 0.088), 3.5: (3.52, 0.0532), 4.5: (4.52, 0.0101), 6.0: (6.02, 0.0019)}
KVMIX = {2.5: (2.61, 0.327), 3.5: (3.61, 0.049), 4.5: (4.62, 0.0094)}
CACHES = {
    "quanto 2-bit, as it comes": ("quanto", 2.94, 4.31),
    "quanto 2-bit, keys per channel": ("quanto", 2.71, 0.655),
    "quanto 4-bit, as it comes": ("quanto", 4.94, 0.0934),
    "quanto 4-bit, keys per channel": ("quanto", 4.71, 0.0113),
    "hqq 2-bit, as it comes": ("hqq", 3.02, 1.07),
    "hqq 4-bit, as it comes": ("hqq", 5.02, 0.0152),
}


def interval(value: float, spread: float) -> Record:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def layers(target: float, method: str) -> list[Record]:
    rng = random.Random(f"{target}{method}")
    entries = []
    for layer in range(LAYERS):
        if method == "kvmix":
            key, value = (4, 4) if layer in (0, 1, 29) else (3, 2)
        else:
            tilt = 1.2 * math.cos(layer / 5) + rng.uniform(-0.7, 0.7)
            key = min((2, 3, 4, 5, 6, 8), key=lambda b: abs(b - target - 0.7 - tilt))
            value = min((1, 2, 3, 4, 5, 6, 8), key=lambda b: abs(b - target + 0.5 - tilt))
        entries.append(
            {
                "layer": layer,
                "key_bits": key,
                "value_bits": value,
                "key": f"{key}b/ch64",
                "value": f"{value}b/tok-head",
            }
        )
    return entries


def fidelity(name: str, method: str, target: float | None, bits: float, kld: float) -> Record:
    rng = random.Random(name)
    texture = random.Random("text")
    blocks = [kld * texture.lognormvariate(-0.1, 0.45) * rng.lognormvariate(0, 0.1) for _ in range(BLOCKS)]
    planned = method in ("exact", "kvmix", "uniform")
    ppl = 14.2 * math.exp(0.9 * kld)
    return {
        "kind": "fidelity",
        "name": name,
        "method": method,
        "target_bits": target,
        "true_bits": bits,
        "live_bytes": int(bits / 8 * 2048 * 30 * 2 * 3 * 64),
        "prefill": "quantized" if planned else "exact" if method == "dense" else "chunk-exact",
        "ppl": interval(ppl, 0.04),
        "ppl_ratio": interval(ppl / 14.2, 0.01),
        "kld": interval(kld, 0.07),
        "kld_p99": interval(kld * 11, 0.2),
        "top1": interval(math.exp(-1.6 * math.sqrt(kld) * 0.6), 0.005),
        "blocks": {"size": 128, "tokens": [128] * BLOCKS, "kld": blocks},
        "layers": layers(target or bits, method) if planned else None,
        **RUN,
    }


def configurations() -> list[tuple[str, str, float | None, float, float]]:
    plans = {"uniform": UNIFORM, "kvmix": KVMIX, "exact": EXACT}
    made = [
        (f"{method} {target:g}", method, target, bits, kld)
        for method, budgets in plans.items()
        for target, (bits, kld) in budgets.items()
    ]
    caches = [(name, method, None, bits, kld) for name, (method, bits, kld) in CACHES.items()]
    return [("dense", "dense", None, 16.0, 0.0), *made, *caches]


def decode(name: str, method: str, target: float | None) -> Record:
    speed = {"dense": 41.0, "quanto": 18.2, "hqq": 16.1}.get(method, 33.4)
    return {
        "kind": "decode",
        "name": name,
        "method": method,
        "target_bits": target,
        "context": 2048,
        "tokens_per_s": interval(speed, 0.03),
        "steps": 32,
        "model": RUN["model"],
        "device": "cpu",
    }


def sample(name: str, method: str, target: float | None, index: int) -> Record:
    words = DENSE_TEXT.split(" ")
    kept = len(words) if method == "dense" or index % 7 == 0 else 3 + 5 * (index % 6)
    text = " ".join(words[:kept]) + ("" if kept >= len(words) else ENDINGS[index % 3])
    return {
        "kind": "sample",
        "name": name,
        "method": method,
        "target_bits": target,
        "prompt": PROMPT,
        "text": text,
        "tokens": 64,
    }


def needle(name: str, method: str, target: float | None, missed: int) -> Record:
    grid = [(tokens, depth) for tokens in (1024, 2048, 4096) for depth in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    cases = [
        {"tokens": tokens, "depth": depth, "found": index % 18 >= missed} for index, (tokens, depth) in enumerate(grid)
    ]
    return {
        "kind": "needle",
        "name": name,
        "method": method,
        "target_bits": target,
        "cases": cases,
        "found": 18 - missed,
        "total": 18,
    }


def signal() -> Record:
    rng = random.Random(3)
    key = [0.02 + 0.1 * math.exp(-layer / 4) * rng.uniform(0.8, 1.2) for layer in range(LAYERS)]
    value = [0.05 + 0.25 * math.exp(-layer / 6) * rng.uniform(0.8, 1.2) for layer in range(LAYERS)]
    return {
        "kind": "signal",
        "model": RUN["model"],
        "layers": list(range(LAYERS)),
        "gradient": {
            "key": key,
            "value": value,
            "key_spread": [0.2 * norm for norm in key],
            "value_spread": [0.15 * norm for norm in value],
        },
    }


def full_records() -> list[Record]:
    made = configurations()
    shown = [entry[:3] for entry in made if entry[1] in ("dense", "exact") or "channel" in entry[0]]
    return [
        *(fidelity(*entry) for entry in made),
        *(decode(*entry[:3]) for entry in made),
        *(sample(*entry, index) for index, entry in enumerate(shown)),
        *(needle(*entry, missed) for entry, missed in zip(shown[:3], (1, 4, 1), strict=True)),
        signal(),
    ]


CACHES_OF_TASKS = (("dense", "dense", 16.0), ("short plan", "exact", 2.6), ("long plan", "exact", 4.1))


def task(name: str, method: str, bits: float, task_name: str, hits: list[int], length: int | None = None) -> Record:
    from kvloom.evaluate import mean_score

    score = mean_score(hits)
    return {
        "kind": "task",
        "name": name,
        "method": method,
        "prefill": "exact" if method == "dense" else "quantized",
        "task": task_name,
        **({"length": length} if length else {}),
        "total": len(hits),
        "metric": "match",
        "score": score,
        "scores": {"match": score},
        "context": length,
        "live_bytes": int(1000 * bits),
        "true_bits": bits,
        "cases": [{"name": str(n), "answer": "an answer", "scores": {"match": hit}} for n, hit in enumerate(hits)],
        **{key: RUN[key] for key in ("model", "device", "dtype", "when")},
    }


def tasks() -> list[Record]:
    right = {"dense": 16, "short plan": 6, "long plan": 15}
    return [
        task(name, method, bits, task_name, [int(n < right[name]) for n in range(20)], length)
        for task_name, length in (("ruler/vt", 4096), ("ruler/niah_single_1", 4096), ("gsm8k", None))
        for name, method, bits in CACHES_OF_TASKS
    ]


def drifts() -> list[Record]:
    return [
        {
            "kind": "drift",
            "name": name,
            "method": method,
            "prefill": "quantized",
            "true_bits": bits,
            "steps": 500,
            "windows": 2,
            "block": 128,
            "kld": 0.1,
            "slope": {"value": slope, "low": slope - 0.01, "high": slope + 0.01},
            "blocks": [] if method == "dense" else [0.1, 0.1 + slope, 0.11, 0.12],
            **{key: RUN[key] for key in ("model", "device", "dtype", "text")},
        }
        for (name, method, bits), slope in zip(CACHES_OF_TASKS, (0.0, 0.05, 0.001), strict=True)
    ]


def memories() -> list[Record]:
    tokens = [1024 * 2**n for n in range(11)]
    return [
        {
            "kind": "memory",
            "name": name,
            "method": method,
            "tokens": tokens,
            "nbytes": [int(23040 * bits / 16 * at) for at in tokens],
            "weight_bytes": 270_000_000,
            "reads_at_most": 8192,
            "fits": {"24 GB": 1029120, "48 GB": 2071552, "80 GB": 0},
            "model": RUN["model"],
        }
        for name, method, bits in CACHES_OF_TASKS
    ]


def front(heads: int = 1) -> Record:
    return {
        "kind": "front",
        "model": RUN["model"],
        "signal": "error_gradient",
        "by_head": heads > 1,
        "tokens": 8192,
        "dtype": "bfloat16",
        "weight_bytes": 270_000_000,
        "reads_at_most": 8192,
        "dense_bytes_per_token": 23040,
        "layers": list(range(LAYERS)),
        "key_specs": [{"bits": bits, "label": f"{bits}b/ch64"} for bits in (2, 3, 4)],
        "value_specs": [{"bits": bits, "label": f"{bits}b/tok-head"} for bits in (2, 4, 16)],
        "plans": [
            {
                "true_bits": 2.0 + n,
                "nbytes": 8192 * 1440 * (2 + n),
                "bytes_per_token": 1440 * (2 + n),
                "predicted_loss": [0.3, 0.03, 0.0][n],
                "fits": {"24 GB": 1024 * (9 - n), "48 GB": 1024**2, "80 GB": 0},
                "keys": [[n] * heads] * LAYERS,
                "values": [[(n + head) % 3 for head in range(heads)]] * LAYERS,
            }
            for n in range(3)
        ],
    }


def comparisons() -> list[Record]:
    about = {**{key: RUN[key] for key in ("model", "device", "dtype", "text")}, "scored_tokens": 900, "windows": 2}
    groups = {
        name: {
            "plans": 2,
            "true_bits": [2.0, 3.0],
            "kld": [0.1, 0.2],
            "spearman": {"value": rho, "low": rho - 0.2, "high": rho + 0.1},
            "pearson_log": {"value": rho, "low": rho - 0.2, "high": rho + 0.1},
        }
        for name, rho in (("spread", 0.9), ("equal", 0.5))
    }
    signals = [
        {
            "kind": "signal_comparison",
            "name": name,
            "seconds": seconds,
            "prompts": 4,
            "prompt_tokens": 512,
            "spread": groups["spread"],
            "equal": {**groups["equal"], "spearman": {"value": rho, "low": rho - 0.2, "high": rho + 0.1}},
            **about,
        }
        for name, seconds, rho in (("worst", 0.2, 0.1), ("best", 6.0, 0.7))
    ]
    plans = [
        {
            "kind": "random_plan",
            "name": f"{group} {n}",
            "group": group,
            "true_bits": 3.0,
            "kld": 0.1 * (n + 1),
            "predicted": {"best": 0.2 * (n + 1), "worst": 1.0},
            **about,
        }
        for group in ("spread", "equal")
        for n in range(2)
    ]
    return [*signals, *plans]


def kernels() -> list[Record]:
    heads = {"query_heads": 32, "kv_heads": 8, "head_dim": 128, "device": "H100", "dtype": "float16"}
    timed = {"skipped": None, "nbytes": 10**8, "bytes_per_s": 2e12, "share_of_read": 0.66, "flops": 4 * 10**8}
    at = {**heads, "batch": 8, "tokens": 32768}
    pair = {"backend": "cuda", "key_bits": 4, "value_bits": 2}
    packed = {**timed, "nbytes": 25 * 10**6, "seconds": 1e-5, "error": 0.001, "fault": None, "times_bound": 1.2}
    ceilings = {"read_bytes_per_s": 3e12, "copy_bytes_per_s": 2.4e12, "flops_per_s": 6e14}
    return [
        {"kind": "kernel_ceilings", **ceilings, **{key: heads[key] for key in ("device", "dtype")}},
        {"kind": "kernel_backend", "backend": "triton", "skipped": "is not here", "device": "H100", "dtype": "float16"},
        {"kind": "kernel_dense", "name": "sdpa", **at, **timed, "seconds": 5e-5, "error": 0.001, "fault": None},
        {"kind": "kernel_dense", "name": "flashy", **at, "skipped": "not installed"},
        {"kind": "kernel_attend", **pair, **at, **packed, "dense": "sdpa", "times_dense": 5.0},
        {"kind": "kernel_attend", **pair, **at, "value_bits": 4, "skipped": "refused"},
        {"kind": "kernel_encode", **pair, **at, **timed, "seconds": 7e-4},
        {"kind": "kernel_append", **pair, **heads, "batch": 8, "seconds": 2.36e-6, "skipped": None},
    ]


def generations() -> list[Record]:
    run = {"run": "a", **{key: RUN[key] for key in ("model", "device", "dtype")}}
    load = {"load": "B1x8K", "prompt": 8192, "batch": 1, "new_tokens": 64, "fill": "prompt", **run}
    made = {"compiled": True, "prefill_s": 1.5, "tokens_per_s": 20.0, "seconds": 0.05, "times_bound": 2.5}
    held = {"live_bytes": 2**20, "true_bits": 4.5, "peak_bytes": None, "skipped": None, "times_best_peer": 1.25}
    return [
        {"kind": "generate_ceilings", "read_bytes_per_s": 2.1e10, **run},
        {"kind": "generate_note", "skipped": "hqq is not installed", **run},
        {"kind": "generate", "name": "plan fixed", **load, **made, **held},
        {"kind": "generate", "name": "static", **load, "skipped": "out of memory"},
    ]


def every_record() -> list[Record]:
    """All kinds that the page shows."""
    others = (tasks(), drifts(), memories(), [front()], comparisons(), kernels(), generations())
    return [*full_records(), *(record for kind in others for record in kind)]
