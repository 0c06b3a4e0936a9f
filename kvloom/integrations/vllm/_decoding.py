"""All sequences of a pass that decode one token each: append, pack, and read as attention reads a cache, at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from kvloom import kernels
from kvloom.integrations.vllm._blocks import Blocks, Index
from kvloom.pages import StaticKV, state_numbers

_NULL_BLOCK = 0  # vLLM gives it to no sequence


@dataclass(frozen=True)
class _Places:
    """Where exact tokens lie in the blocks of layers that hold as many of them in a block.

    Attributes:
        held: Blocks and rows of the sinks, then of as many tokens as a page has, int64 ``[sequences, tokens]`` each;
            any block of the sequence where it holds fewer.
        new: Blocks and rows of the newest tokens, int64 ``[sequences]`` each; in the null block where their page is
            full with them.
    """

    held: tuple[torch.Tensor, torch.Tensor]
    new: tuple[torch.Tensor, torch.Tensor]


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
        self._first_page = 1 if sinks else 0
        pages = max(0, most - sinks) // page_tokens
        self._of_pages = table[:, self._first_page : self._first_page + pages]
        self._filled = _filled(capacity, sinks, page_tokens, table.device)
        self._places: dict[int, _Places] = {}

    def append(self, blocks: Blocks, key: torch.Tensor, value: torch.Tensor) -> StaticKV:
        """Append each sequence's token to a layer's blocks, and pack the pages that are full with it.

        Args:
            blocks: Those of the layer.
            key: ``[sequences, kv_heads, 1, head_dim]``, as `kvloom.kernels.Backend.append` takes it.
            value: The same shape.

        Returns:
            What the tokens are to attend to.
        """
        places = self._places_of(blocks.layout.block_tokens)
        held = blocks.rows[places.held]  # a copy: a page is packed over them
        sinks, tail = (blocks.exact(rows) for rows in held.split([self.sinks, self.page_tokens], dim=1))
        state = self._state.clone()  # appending changes it
        kv = StaticKV(
            blocks.pages, sinks, tail, state, blocks.flags, self._filled, self.page_tokens, table=self._of_pages
        )
        kernels.backend(key.device).append(key, value, kv)
        blocks.rows[places.new] = held[self._newest]
        return kv

    @cached_property
    def _state(self) -> torch.Tensor:
        """See `kvloom.pages.StaticKV`."""
        return torch.nn.functional.pad(self._levels.flatten(), (0, self._counters))

    @cached_property
    def _levels(self) -> torch.Tensor:
        """int32 ``[sequences, 2]``: tokens before the new one, and pages that are full with them."""
        computed = (self._lengths - 1).clamp_min(0)
        return torch.stack([computed, (computed - self.sinks).clamp_min(0) // self.page_tokens], dim=1)

    @cached_property
    def _exact(self) -> torch.Tensor:
        """int64 ``[sequences]``: exact tokens that follow the full pages; negative where sinks are missing."""
        computed, pages = self._levels.long().unbind(1)
        return computed - self.sinks - pages * self.page_tokens

    @cached_property
    def _newest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each sequence, and the place of its new token among its sinks and tail."""
        return torch.arange(len(self._table), device=self._table.device), self._exact + self.sinks

    def _places_of(self, block_tokens: int) -> _Places:
        if block_tokens not in self._places:
            self._places[block_tokens] = self._located(block_tokens)
        return self._places[block_tokens]

    def _located(self, block_tokens: int) -> _Places:
        device, exact = self._table.device, self._exact[:, None]
        first = self._levels[:, 1:].long() + self._first_page
        sink = torch.arange(self.sinks, device=device).expand(len(exact), -1)
        token = torch.arange(self.page_tokens, device=device).minimum(exact - 1).clamp_min(0)
        held = self._blocks(torch.cat([sink * 0, first + token // block_tokens], dim=1))
        rows = torch.cat([sink, token % block_tokens], dim=1)
        is_sink, fills = exact < 0, exact == self.page_tokens - 1
        at = torch.where(is_sink, exact + self.sinks, exact)
        new = self._blocks(torch.where(is_sink, 0, first + at // block_tokens)).masked_fill(fills, _NULL_BLOCK)
        return _Places((held, rows), (new[:, 0], (at % block_tokens)[:, 0]))

    def _blocks(self, columns: torch.Tensor) -> torch.Tensor:
        """Numbers of the blocks in columns of the table, int64; of some block where a sequence has too few."""
        return self._table.gather(1, columns.clamp_max(self._table.shape[1] - 1)).long().clamp_min(_NULL_BLOCK)


@lru_cache(maxsize=16)
def _filled(capacity: int, sinks: int, page_tokens: int, device: torch.device) -> torch.Tensor:
    """See `kvloom.pages.StaticKV`."""
    tokens = torch.arange(capacity + 2, dtype=torch.int32, device=device)
    return (tokens - sinks).clamp_min(0) // page_tokens
