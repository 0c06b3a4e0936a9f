"""Exact bytes of caches of fixed size."""

from __future__ import annotations

from math import ceil

import torch

from kvloom.cache._fixed import ring_tokens
from kvloom.errors import PlanError
from kvloom.eviction import slot_nbytes
from kvloom.pages import state_numbers
from kvloom.plan import Plan, Window, full_pages, head_layouts, itemsize, shared_nbytes

# The first record of a KV head, how many pages it keeps in the storage, and how many outside it: int32.
_EXTENT_BYTES = 12


def fixed_nbytes(plan: Plan, batch: int, max_tokens: int, dtype: object = None, *, prompt: int | None = None) -> int:
    """Bytes of the packed layers of a cache of fixed size: what `LoomCache.nbytes` counts from its first pass on.

    Args:
        plan: What each layer stores.
        batch: Sequences.
        max_tokens: Tokens of each that there is room for.
        dtype: Compute dtype (name or torch dtype) of what stays exact; None takes the model's.
        prompt: How many of them are the prompt; it matters only to eviction, whose caches have room for what is kept of
            the prompt and for the tokens that follow.

    Raises:
        PlanError: The plan evicts, and ``prompt`` is not given or larger than ``max_tokens``.
    """
    size = itemsize(dtype or plan.model.dtype)
    return sum(_layer_nbytes(plan, i, batch, max_tokens, size, prompt) for i in plan.model.packed_layers)


def new_pages(window: Window, tokens: int, kept: int, page_tokens: int) -> int:
    """Pages that a layer of fixed size has filled since a prompt's end.

    Args:
        window: What stays exact.
        tokens: How many it holds besides the pages of then.
        kept: Tokens of a KV head in those pages, the mean.
        page_tokens: Tokens in a page.
    """
    exact = max(window.recent, ceil(window.recent_ratio * (tokens + kept)))  # as `Room.exact`
    return max(0, tokens - min(tokens, window.sinks) - exact) // page_tokens


def _layer_nbytes(plan: Plan, layer: int, batch: int, max_tokens: int, size: int, prompt: int | None) -> int:
    heads, dim, entry, room = plan.model.num_kv_heads, plan.model.head_dim, plan.spec(layer), plan.room(layer)
    layouts = head_layouts(entry, heads, dim, size)
    page = layouts[0].page_tokens
    shared = state_numbers(batch, heads) * torch.int32.itemsize + shared_nbytes(layouts, heads, dim, size)
    if room is None:
        pages, most = full_pages(entry.window, max_tokens, page), max_tokens
    else:
        seen = _checked(prompt, max_tokens)
        held = min(seen, room.limit(seen))
        kept = full_pages(entry.window, held, page)
        slots = held - kept * page + max_tokens - seen
        pages, most = kept + new_pages(entry.window, slots, kept * page, page), slots + kept * page
        shared += batch * heads * ((pages * page + slots) * slot_nbytes(max_tokens) + _EXTENT_BYTES)
        shared += (slots + 2) * torch.int32.itemsize  # full pages by number of tokens, and how many tokens have left
    exact = entry.window.sinks + ring_tokens(entry.window, most, page)
    of_sequence = pages * sum(layout.nbytes for layout in layouts) + exact * 2 * heads * dim * size
    return batch * of_sequence + shared


def _checked(prompt: int | None, max_tokens: int) -> int:
    if prompt is None or not 0 < prompt <= max_tokens:
        raise PlanError(
            f"the plan evicts, so what a cache of {max_tokens} tokens takes depends on the prompt: give prompt, 1 to "
            f"{max_tokens} tokens."
        )
    return prompt
