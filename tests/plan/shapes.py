"""Model shapes and helpers that the tests of foreign formats share."""

from __future__ import annotations

from typing import Any

from kvloom.plan import Fingerprint, Plan


def shape(layers: int = 4, heads: int = 2, dim: int = 128, **other: Any) -> Fingerprint:
    fields = {
        "architecture": "LlamaForCausalLM",
        "num_layers": layers,
        "packed_layers": tuple(range(layers)),
        "num_kv_heads": heads,
        "head_dim": dim,
        "dtype": "bfloat16",
    }
    return Fingerprint.model_validate(fields | other)


def formats_of(plan: Plan) -> list[list[Any]]:
    """Resolved (key, value) formats of every head of every layer, and its window."""
    heads, dim = range(plan.model.num_kv_heads), plan.model.head_dim
    return [
        [*(tuple(spec.format(dim) for spec in plan.spec(i).head(h)) for h in heads), plan.spec(i).window]
        for i in plan.model.packed_layers
    ]


def bits_of(plan: Plan) -> list[tuple[int, int]]:
    return [(plan.spec(i).key.bits, plan.spec(i).value.bits) for i in plan.model.packed_layers]


def notes_of(plan: Plan) -> str:
    assert plan.provenance is not None
    return "\n".join(plan.provenance.notes)
