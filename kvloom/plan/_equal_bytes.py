"""More tokens at lower precision: budgets in tokens that cost the same bytes whatever the layers' formats are.

QPruningKV (arXiv 2412.12706) keeps 2, 4 or 8 times the tokens at 8, 4 or 2 bits, and its LayerQuant gives some layers
other bits and as many tokens as take the same memory. It counts codes alone; here scales, zero points, exact tokens and
slots count, so that the layers' true bytes are equal, up to the token that does not fit any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kvloom.errors import PlanError
from kvloom.eviction import Room
from kvloom.plan._bytes import head_layouts, itemsize, layer_nbytes, room_of
from kvloom.plan._plan import Plan
from kvloom.plan._spec import Evict, LayerPlan
from kvloom.plan._validate import validated


def evict_to_bytes(
    plan: Plan,
    policy: str,
    dense_tokens: int,
    *,
    parameters: Mapping[str, Any] | None = None,
    protect: Sequence[tuple[int, int]] = (),
    dtype: Any = None,
    tokens: int = 2**16,
) -> Plan:
    """Let every layer keep the most tokens whose bytes are at most those of ``dense_tokens`` uncompressed ones.

    A policy whose layers keep different numbers (PyramidKV) spreads each of them over the depth of the model as if it
    were that of every layer, and the layers together take at most the bytes. Their pages are filled differently, so
    that they may keep fewer tokens than layers that are alike.

    Args:
        plan: Formats and windows of the layers, of any bits.
        policy: Name of the policy.
        dense_tokens: Tokens in the compute dtype.
        parameters: Parameters of the policy.
        protect: Spans that are never evicted.
        dtype: Compute dtype; None takes the model's.
        tokens: Tokens of the sequences; the places of kept tokens take more bytes in longer ones, and a layer keeps no
            more than all of them.

    Returns:
        The plan with an evict entry in every layer.

    Raises:
        PlanError: The bytes are too few for a layer, or the policy is unknown or does not go with a layer's window.
    """
    size = itemsize(dtype or plan.model.dtype)
    entries = []
    for n, entry in enumerate(plan.layers):
        given = {"policy": policy, "budget": 1, "protect": protect, "parameters": parameters or {}}
        evict = validated(Evict, given, f"layers[{n}].evict")
        budget = _budget(entry.model_copy(update={"evict": evict}), plan, dense_tokens, size, tokens)
        if not budget:
            raise PlanError(
                f"layers {entry.layers}: not even one token takes the bytes of {dense_tokens} uncompressed ones beside "
                "what the layer holds in any case: give it more."
            )
        entries.append(entry.model_copy(update={"evict": evict.model_copy(update={"budget": budget})}))
    fields = {name: getattr(plan, name) for name in Plan.model_fields}
    return validated(Plan, {**fields, "layers": tuple(entries)}, "the plan")


def _budget(entry: LayerPlan, plan: Plan, dense_tokens: int, size: int, seen: int) -> int:
    """The most tokens that fit; more of them may take less, since a page takes less than exact tokens."""
    model = plan.model
    heads, dim, layers = model.num_kv_heads, model.head_dim, len(model.packed_layers)
    room = room_of(entry, heads, dim, (0, layers))
    assert room is not None
    layouts = head_layouts(entry, heads, dim, size)
    allowed = 2 * dense_tokens * heads * dim * size
    most = allowed * layouts[0].page_tokens // sum(layout.nbytes for layout in layouts)
    for tokens in range(most, 0, -1):
        kept = Counter(_of_layer(room, tokens, layer, layers, seen) for layer in range(layers))
        nbytes = sum(n * layer_nbytes(entry, heads, dim, 1, held, size, room, seen) for held, n in kept.items())
        if nbytes <= layers * allowed:
            return tokens
    return 0


def _of_layer(room: Room, budget: int, layer: int, layers: int, seen: int) -> int:
    return room.policy.layer_budget(budget, layer, layers, seen, room.sinks + room.newest(budget))
