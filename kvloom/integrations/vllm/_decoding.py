"""All sequences of a pass that decode one token each: append, pack, and read as attention reads a cache, at once."""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch

from kvloom import kernels
from kvloom.integrations.vllm._blocks import Blocks, Index
from kvloom.pages import PooledKV, state_numbers


class Decoding:
    """Numbers of the sequences of a pass that decode one token each, the same for all layers.

    All of them are computed on the device, by the same operations at every step, so that a graph can hold them.

    Args:
        tokens: The place of the token of each sequence among those of the pass, rising.
        lengths: int32 ``[sequences]``, tokens of each, the new one included; 0 or 1 and a table of null blocks where a
            row only fills up a batch.
        table: int32 ``[sequences, blocks]``, numbers of blocks.
        most: At least the longest of ``lengths``.
        capacity: At least ``most``, the same at every pass: what numbers that are kept from pass to pass reach to.
        kv_heads: Of every layer.
        sinks: First tokens of a sequence, exact.
        page_tokens: Tokens in a page.
    """

    def __init__(
        self,
        tokens: Index,
        lengths: torch.Tensor,
        table: torch.Tensor,
        *,
        most: int,
        capacity: int,
        kv_heads: int,
        sinks: int,
        page_tokens: int,
    ) -> None:
        self.tokens, self.sinks, self.page_tokens = tokens, sinks, page_tokens
        self._counters = state_numbers(len(lengths), kv_heads) - 2 * len(lengths)
        self._lengths, self._table = lengths, table
        self._pages = max(0, most - sinks) // page_tokens
        self._filled = _filled(capacity, sinks, page_tokens, table.device)

    def append(
        self,
        blocks: Blocks,
        key: torch.Tensor,
        value: torch.Tensor,
        query_turn: torch.Tensor | None = None,
        output_turn: torch.Tensor | None = None,
    ) -> PooledKV:
        """Append each sequence's token to a layer's blocks, and pack the pages that are full with it.

        Args:
            blocks: Those of the layer.
            key: ``[sequences, kv_heads, 1, head_dim]``, as `kvloom.kernels.Backend.append` takes it.
            value: The same shape.
            query_turn: See `kvloom.pages.PagedKV`.
            output_turn: Likewise.

        Returns:
            What the tokens are to attend to.
        """
        kv = PooledKV(
            blocks.pages,
            blocks.tokens,
            self._table,
            self.sinks,
            self._pages,
            self.page_tokens,
            self._before,
            self._state,
            blocks.flags,
            self._filled,
            query_turn,
            output_turn,
        )
        kernels.backend(key.device).append_pooled(key, value, kv)
        return kv

    @cached_property
    def _levels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 ``[sequences]`` each: tokens before the new one, and pages that are full with them."""
        computed = (self._lengths - 1).clamp_min(0)
        return computed, (computed - self.sinks).clamp_min(0) // self.page_tokens

    @cached_property
    def _before(self) -> torch.Tensor:
        """See `kvloom.pages.PooledKV`."""
        return torch.stack(self._levels, dim=1)

    @cached_property
    def _state(self) -> torch.Tensor:
        """See `kvloom.pages.PooledKV`."""
        computed, pages = self._levels
        return torch.nn.functional.pad(torch.stack([computed + 1, pages], dim=1).flatten(), (0, self._counters))


@lru_cache(maxsize=16)
def _filled(capacity: int, sinks: int, page_tokens: int, device: torch.device) -> torch.Tensor:
    """See `kvloom.pages.StaticKV`."""
    tokens = torch.arange(capacity + 2, dtype=torch.int32, device=device)
    return (tokens - sinks).clamp_min(0) // page_tokens
