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
