"""All sequences of a pass that decode one token each: append, pack, and read as attention reads a cache, at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvloom.integrations.vllm._blocks import Blocks, Index, index, on_device, rows_of
from kvloom.pages import ExactKV, StaticKV


@dataclass(frozen=True)
class _Places:
    """Where exact tokens lie in the blocks of layers that hold as many of them in a block.

    Attributes:
        held: Blocks and rows of the sinks, then of as many tokens as a page has, int64 ``[sequences, tokens]`` each;
            any block of the sequence where it holds fewer.
        new: Blocks and rows of the newest tokens of the sequences whose page is not full with them.
    """

    held: tuple[torch.Tensor, torch.Tensor]
    new: tuple[torch.Tensor, torch.Tensor]


class Decoding:
    """Numbers of the sequences of a pass that decode one token each, the same for all layers.

    Nothing waits for the device: what is counted on the host comes from ``computed``.

    Args:
        tokens: The place of the token of each sequence among those of the pass, rising.
        computed: Tokens of each sequence before it.
        table: int32 ``[sequences, blocks]``, numbers of blocks.
        sinks: First tokens of a sequence, exact.
        page_tokens: Tokens in a page.
    """

    def __init__(
        self, tokens: Sequence[int], computed: Sequence[int], table: torch.Tensor, sinks: int, page_tokens: int
    ) -> None:
        self.table, self.sinks, self.page_tokens = table, sinks, page_tokens
        self.tokens = index(tokens, table.device)
        self._first_page = 1 if sinks else 0
        self._computed = computed
        self._pages = [max(0, n - sinks) // page_tokens for n in computed]
        is_full = [max(0, n + 1 - sinks) // page_tokens > pages for n, pages in zip(computed, self._pages, strict=True)]
        self._full = index([row for row, is_so in enumerate(is_full) if is_so], table.device)
        self._rest = index([row for row, is_so in enumerate(is_full) if not is_so], table.device)
        self._has_full = any(is_full)
        self._places: dict[int, _Places] = {}

    def append(self, blocks: Blocks, key: torch.Tensor, value: torch.Tensor) -> StaticKV:
        """Append each sequence's token to a layer's blocks, and pack the pages that are full with it.

        Args:
            blocks: Those of the layer.
            key: ``[sequences, kv_heads, 1, head_dim]``, turned as they are cached.
            value: The same shape.

        Returns:
            What the tokens are to attend to.
        """
        places = self._places_of(blocks.layout.block_tokens)
        held, new = blocks.rows[places.held], rows_of(ExactKV(key, value))[:, 0]
        held[self._newest] = new
        blocks.rows[places.new] = new[self._rest]
        sinks, tail = (blocks.exact(rows) for rows in held.split([self.sinks, self.page_tokens], dim=1))
        if self._has_full:
            blocks.pack(self._next_blocks, ExactKV(tail.key[self._full], tail.value[self._full]))
        return StaticKV(
            blocks.pages, sinks, tail, self._state, blocks.flags, self._filled, self.page_tokens, self._of_pages
        )

    @cached_property
    def _state(self) -> torch.Tensor:
        """See `kvloom.pages.StaticKV`."""
        levels = [number for n, pages in zip(self._computed, self._pages, strict=True) for number in (n + 1, pages)]
        return on_device([*levels, 0], torch.int32, self.table.device)

    @cached_property
    def _filled(self) -> torch.Tensor:
        """See `kvloom.pages.StaticKV`."""
        tokens = torch.arange(max(self._computed) + 2, dtype=torch.int32, device=self.table.device)
        return (tokens - self.sinks).clamp_min(0) // self.page_tokens

    @cached_property
    def _of_pages(self) -> torch.Tensor:
        """Numbers of the blocks of the pages that the tokens read, int32 ``[sequences, most pages]``."""
        return self.table[:, self._first_page : self._first_page + max(self._pages)]

    @cached_property
    def _levels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int64 ``[sequences]``: tokens before the new one, pages that are full, exact tokens that follow those.

        A sequence that has not all its sinks is negative in the latter.
        """
        length, pages = self._state[:-1].view(-1, 2).long().unbind(1)
        return length - 1, pages, length - 1 - self.sinks - pages * self.page_tokens

    @cached_property
    def _newest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each sequence, and the place of its new token among its sinks and tail."""
        return torch.arange(len(self.table), device=self.table.device), self._levels[2] + self.sinks

    @cached_property
    def _next_blocks(self) -> torch.Tensor:
        """The block of each page that is full now."""
        return self._numbers(self._levels[1][self._full][:, None] + self._first_page, self._full)[:, 0]

    def _places_of(self, block_tokens: int) -> _Places:
        if block_tokens not in self._places:
            self._places[block_tokens] = self._located(block_tokens)
        return self._places[block_tokens]

    def _located(self, block_tokens: int) -> _Places:
        device = self.table.device
        computed, pages, exact = self._levels
        sink = torch.arange(self.sinks, device=device).expand(len(self.table), -1)
        token = torch.arange(self.page_tokens, device=device).minimum(exact[:, None] - 1).clamp_min(0)
        first = pages[:, None] + self._first_page
        columns = torch.cat([sink * 0, first + token // block_tokens], dim=1)
        is_sink = exact < 0
        at = torch.where(is_sink, computed, exact)
        column = torch.where(is_sink, 0, first[:, 0] + at // block_tokens)
        new = self._numbers(column[self._rest][:, None], self._rest)[:, 0]
        held = self._numbers(columns, slice(None)), torch.cat([sink, token % block_tokens], dim=1)
        return _Places(held, (new, (at % block_tokens)[self._rest]))

    def _numbers(self, columns: torch.Tensor, rows: Index) -> torch.Tensor:
        """Numbers of the blocks in columns of the table, int64; of some block where a sequence has too few."""
        return self.table[rows].gather(1, columns.clamp_max(self.table.shape[1] - 1)).long()
