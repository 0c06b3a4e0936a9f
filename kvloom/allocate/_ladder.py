"""Ladders: candidates that differ in their bits only, as the published rules know them."""

from __future__ import annotations

from collections.abc import Iterable

from kvloom.plan import GroupSize, TensorSpec

Ladder = dict[int, TensorSpec]
"""Format by bits, rising."""


def ladder(specs: Iterable[TensorSpec], group_size: GroupSize | None = None) -> Ladder:
    """The longest ladder among the candidates of a side, of at most 8 bits; of equals the first.

    Args:
        specs: the candidates.
        group_size: only formats of this group size count; None takes all.
    """
    families: dict[str, Ladder] = {}
    for spec in specs:
        if spec.bits <= 8 and group_size in (None, spec.group_size):
            families.setdefault(spec.model_dump_json(exclude={"bits", "codebook"}), {})[spec.bits] = spec
    longest = max(families.values(), key=len, default={})
    return dict(sorted(longest.items()))
