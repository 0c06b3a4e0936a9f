"""One rank's part of a plan: its KV heads, where tensor parallelism splits them (Shoeybi et al., arXiv 1909.08053)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvloom.errors import PlanError
from kvloom.pages import Role
from kvloom.plan._bytes import head_layouts
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._spec import LayerPlan
from kvloom.plan._tensors import PlanTensors, rotation_name

if TYPE_CHECKING:
    from torch import Tensor

_SIZE = 2  # bytes of a compute dtype: pages hold the same tokens whatever it is


def local_entry(entry: LayerPlan, model: Fingerprint, heads: range) -> LayerPlan:
    """The entry of a rank that holds these KV heads, which it counts from 0.

    Raises:
        PlanError: The rank could not choose, or pack, the tokens that all heads together would.
    """
    if entry.evict is not None and entry.evict.make_policy().is_pooled:
        raise PlanError(
            f"layers {entry.layers}: evict.policy {entry.evict.policy!r} lets all KV heads of a layer compete for one "
            "budget, and a rank sees its own alone: name a policy whose heads do not compete (snapkv), or use one "
            "process."
        )
    own = {head - heads.start: specs for head, specs in entry.heads.items() if head in heads}
    local = entry.model_copy(update={"heads": own})
    whole, part = (
        head_layouts(it, count, model.head_dim, _SIZE)[0].page_tokens
        for it, count in ((entry, model.num_kv_heads), (local, len(heads)))
    )
    if whole != part:
        raise PlanError(
            f"layers {entry.layers}: pages of KV heads {heads.start} to {heads.stop - 1} would hold {part} tokens on "
            f"their rank and hold {whole} beside the other heads: give some key of every rank a group_size of {whole}, "
            "or use one process."
        )
    return local


def local_tensors(found: Mapping[int, Mapping[Role, Tensor]], heads: range) -> PlanTensors:
    """A rank's matrices of calibrated sides, ``[kv_heads, head_dim, head_dim]`` by layer and side."""
    return PlanTensors.of(
        {
            rotation_name(layer, side): matrices[heads.start : heads.stop]
            for layer, sides in found.items()
            for side, matrices in sides.items()
        }
    )
