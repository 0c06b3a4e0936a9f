"""Memory over context: what plans and the uncompressed cache take at any length, by arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvloom._ledger import Record, fingerprint
from kvloom.evaluate._contestants import Contestant, check_names
from kvloom.evaluate._context import reads_at_most, surroundings
from kvloom.evaluate._records import write_records
from kvloom.plan import GPUS, Fingerprint, Plan, longest_context

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CONTEXTS = tuple(2**power for power in range(10, 21))
"""1K to 1M tokens."""

_DTYPE = torch.bfloat16


def memory(
    model: PreTrainedModel,
    contestants: Sequence[Contestant],
    *,
    name: str | None = None,
    out: Path | None = None,
) -> list[Record]:
    """Bytes of one sequence's full-attention layers in a 16-bit compute dtype, from 1K to 1M tokens.

    Args:
        model: a causal language model; nothing passes through it.
        contestants: plans and the uncompressed cache; others have no arithmetic and are left out.
        name: of the model in the records; by default the last part of its path.
        out: results file; its records of the same plans are replaced.

    Returns:
        One `memory` record for each contestant: `nbytes` at `tokens`, `weight_bytes` of the model in 16 bits,
        `reads_at_most` so many tokens by its configuration (None if it does not say), and `fits`, the longest context
        in whole 1,024s beside the weights in memories of 24, 48 and 80 GB (10**9 bytes).

    Raises:
        DataError: there is no contestant, or two share a name.
    """
    check_names(contestants)
    shape, weights = Fingerprint.of(model), sixteen_bit_weights(model)
    where = surroundings(model, name)
    shared = {"weight_bytes": weights, "reads_at_most": reads_at_most(model), "tokens": list(CONTEXTS)}
    records = [
        {
            "kind": "memory",
            "id": fingerprint([contestant.identity, where["model"]]),
            **contestant.labels,
            **shared,
            "nbytes": [nbytes(tokens) for tokens in CONTEXTS],
            "fits": {gpu: longest_context(nbytes, max(0, room - weights)) for gpu, room in GPUS.items()},
            **where,
        }
        for contestant in contestants
        if (nbytes := _nbytes(contestant, shape)) is not None
    ]
    if out:
        write_records(out, records)
    return records


def sixteen_bit_weights(model: PreTrainedModel) -> int:
    """Bytes of a model's weights, each counted once, floating-point ones at 2 bytes whatever they are kept in here."""
    return sum(2 * it.numel() if it.is_floating_point() else it.nbytes for it in model.parameters())


def weights_of(config: PreTrainedConfig) -> int:
    """`sixteen_bit_weights` of the model that a configuration describes."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return sixteen_bit_weights(model)


def _nbytes(contestant: Contestant, shape: Fingerprint) -> Callable[[int], int] | None:
    """Bytes by tokens; None where no arithmetic tells."""
    if contestant.plan is not None:
        return partial(_plan_nbytes, contestant.plan)
    return partial(_dense_nbytes, shape) if contestant.method == "dense" else None


def _plan_nbytes(plan: Plan, tokens: int) -> int:
    return plan.nbytes(1, tokens, _DTYPE)


def _dense_nbytes(shape: Fingerprint, tokens: int) -> int:
    return 2 * len(shape.packed_layers) * shape.num_kv_heads * shape.head_dim * _DTYPE.itemsize * tokens
