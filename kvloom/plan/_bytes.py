"""Exact bytes of a layer, by the same layout arithmetic that allocates its pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

from kvloom._dtypes import dtype_name
from kvloom.eviction import Room, slot_nbytes
from kvloom.pages import Format, PageLayout, Role, SideLayout, page_layout, page_tokens_of
from kvloom.plan._spec import LayerPlan, Window

_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# An element of a calibrated rotation as it is resident: F in fp16, its dual in fp32 or a wider compute dtype.
_FORWARD_BYTES, _DUAL_BYTES = 2, 4

# What a layer that evicts holds besides the slots of its tokens: int32 numbers of pages, fp64 sums of attention.
_COUNT_BYTES, _MASS_BYTES = 4, 8


def itemsize(dtype: object) -> int:
    """Bytes of a compute dtype: torch's, its name, or a word such as ``fp16``.

    Raises:
        PlanError: It is not a floating-point dtype a model computes in.
    """
    return _ITEMSIZE[dtype_name(dtype)]


@lru_cache(maxsize=4096)
def _layouts(entry_key: str, kv_heads: int, head_dim: int, size: int) -> tuple[PageLayout, ...]:
    layer = LayerPlan.model_validate_json(entry_key)
    formats = [tuple(spec.format(head_dim) for spec in layer.head(h)) for h in range(kv_heads)]
    tokens = page_tokens_of(*(fmt for pair in formats for fmt in pair))
    return tuple(page_layout(key, value, head_dim, size, tokens) for key, value in formats)


def head_layouts(layer: LayerPlan, kv_heads: int, head_dim: int, size: int) -> tuple[PageLayout, ...]:
    """Page layout of each KV head of a layer; all have the layer's one ``page_tokens``.

    Raises:
        PlanError: A spec does not fit ``head_dim``.
    """
    return _layouts(layer.model_dump_json(exclude={"window", "evict"}), kv_heads, head_dim, size)


def calibrated_formats(layouts: Iterable[PageLayout]) -> tuple[tuple[Role, Format], ...]:
    """Formats of a layer's heads whose codebooks the layer keeps, one for all heads and pages of a format."""
    sides = (side for layout in layouts for side in (layout.key, layout.value))
    return tuple(dict.fromkeys((side.role, side.fmt) for side in sides if side.fmt.is_calibrated))


def full_pages(window: Window, tokens: int, page_tokens: int) -> int:
    """Pages a sequence of ``tokens`` has filled: what sinks and the newest exact tokens leave, in whole pages."""
    sinks = min(tokens, window.sinks)
    keep = max(window.recent, math.ceil(window.recent_ratio * tokens))
    return max(0, tokens - sinks - keep) // page_tokens


def room_of(layer: LayerPlan, kv_heads: int, head_dim: int, place: tuple[int, int]) -> Room | None:
    """How many tokens a layer keeps; None for all of them.

    Args:
        layer: Its entry.
        kv_heads: KV heads.
        head_dim: Channels of a head.
        place: Number of the layer among the packed ones, and how many those are.
    """
    if layer.evict is None:
        return None
    window, page_tokens = layer.window, head_layouts(layer, kv_heads, head_dim, 2)[0].page_tokens
    return Room(
        layer.evict.make_policy(),
        layer.evict.budget,
        layer.evict.protect,
        window.sinks,
        window.recent,
        window.recent_ratio,
        page_tokens,
        *place,
    )


def layer_nbytes(
    layer: LayerPlan,
    kv_heads: int,
    head_dim: int,
    batch: int,
    tokens: int,
    size: int,
    room: Room | None = None,
    seen: int = 0,
) -> int:
    """Bytes resident for one layer: page records, exact tokens, calibrated codebooks and rotations, keys and values.

    With a ``room`` they are those of ``tokens`` kept tokens (the mean over the heads) out of ``seen`` ones, and what it
    takes to keep some and not others counts.
    """
    layouts = head_layouts(layer, kv_heads, head_dim, size)
    pages = full_pages(layer.window, tokens, layouts[0].page_tokens)
    exact = tokens - pages * layouts[0].page_tokens
    of_sequence = pages * sum(layout.nbytes for layout in layouts) + exact * 2 * kv_heads * head_dim * size
    if room:
        sums = (pages + exact - min(tokens, room.sinks)) * _MASS_BYTES if room.policy.sums_attention else 0
        of_sequence += kv_heads * (tokens * slot_nbytes(seen) + _COUNT_BYTES + sums)
    return batch * of_sequence + shared_nbytes(layouts, kv_heads, head_dim, size)


def shared_nbytes(layouts: Sequence[PageLayout], kv_heads: int, head_dim: int, size: int) -> int:
    """Bytes that a layer holds once for all sequences: calibrated codebooks and rotations."""
    codebooks = sum(fmt.codebook_nbytes for _, fmt in calibrated_formats(layouts))
    turned = sum(has_matrices([getattr(layout, side) for layout in layouts]) for side in ("key", "value"))
    return codebooks + turned * kv_heads * head_dim**2 * (_FORWARD_BYTES + max(_DUAL_BYTES, size))


def has_matrices(sides: Iterable[SideLayout]) -> bool:
    """Whether a head's keys (or values) are turned by a matrix of the plan's tensors; the layer then holds one each."""
    return any(side.fmt.rotation == "calibrated" for side in sides)
