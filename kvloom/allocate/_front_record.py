"""A front as a record: what a page needs to show the plan of any budget."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom._dtypes import dtype_name
from kvloom._ledger import Record, fingerprint
from kvloom.allocate._front import ExactFront, predicted_loss
from kvloom.plan import GPUS, Plan, TensorSpec, itemsize, longest_context

POINTS = 96
"""Budgets that a front is shown at."""


def front_record(
    front: ExactFront, name: str, *, points: int = POINTS, weights: int | None = None, reads_at_most: int | None = None
) -> Record:
    """The exact plans of a profile, from the smallest to the largest.

    Args:
        front: whose plans.
        name: of the model, for the reader.
        points: budgets, see `ExactFront.plans`.
        weights: bytes of the model's weights, which contexts share memory with; None if they are not known.
        reads_at_most: tokens that the model reads; None if that is not known.

    Returns:
        A `front` record. `plans` have their bytes and true bits at `tokens`, `bytes_per_token` there, their predicted
        loss, `fits`, the longest context of one sequence in whole 1,024s in memories of 24, 48 and 80 GB (10**9 bytes),
        and for every layer `[layers][heads]`, of one head if all store the same, the places of its formats among
        `key_specs` and `value_specs`.

    Raises:
        PlanError: there is no plan, see `ExactFront.plans`.
    """
    plans, table = front.plans(points), front.profile.table
    model, dtype = front.profile.model, dtype_name(front.dtype or front.profile.model.dtype)
    about = {
        "model": name,
        "signal": table.signal,
        "by_head": front.by_head,
        "tokens": front.tokens,
        "dtype": dtype,
        "weight_bytes": weights,
        "reads_at_most": reads_at_most,
        "dense_bytes_per_token": 2 * len(table.layers) * model.num_kv_heads * model.head_dim * itemsize(dtype),
        "layers": table.layers,
        "key_specs": [_spec(spec) for spec in table.key_specs],
        "value_specs": [_spec(spec) for spec in table.value_specs],
    }
    made = [_plan(plan, front, weights or 0, dtype) for plan in plans]
    return {"kind": "front", "id": fingerprint([about, made]), **about, "plans": made}


def _spec(spec: TensorSpec) -> Record:
    return {"bits": spec.bits, "label": spec.label}


def _plan(plan: Plan, front: ExactFront, weights: int, dtype: str) -> Record:
    table, size = front.profile.table, plan.nbytes(1, front.tokens, dtype)
    return {
        "true_bits": plan.true_bits(front.tokens, dtype),
        "nbytes": size,
        "bytes_per_token": size / front.tokens,
        "predicted_loss": predicted_loss(plan),
        "fits": {
            gpu: longest_context(lambda tokens: plan.nbytes(1, tokens, dtype), max(0, room - weights))
            for gpu, room in GPUS.items()
        },
        "keys": _places(plan, front, 0, table.key_specs),
        "values": _places(plan, front, 1, table.value_specs),
    }


def _places(plan: Plan, front: ExactFront, side: int, specs: Sequence[TensorSpec]) -> list[list[int]]:
    heads = range(plan.model.num_kv_heads if front.by_head else 1)
    return [[specs.index(plan.spec(layer).head(head)[side]) for head in heads] for layer in plan.model.packed_layers]
