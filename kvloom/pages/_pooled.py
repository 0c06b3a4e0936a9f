"""`PooledKV`: sequences that decode one token each, whose pages and exact tokens lie in blocks that they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvloom.pages._handle import ExactKV, HeadPages, StaticKV


@dataclass(frozen=True)
class PooledKV:
    """One layer's cache of the sequences of a pass, with and without the new token of each.

    A full page lies in the block of its own column of the table. Until it is full its tokens lie, exact, in the blocks
    of the columns after that one, so that packing writes over none of them. Sinks lie in the block of the first column,
    which then holds no page.

    Attributes:
        pages: The records of all blocks, ``data [1, heads, blocks, layout.nbytes]``.
        rows: The exact tokens of all blocks, ``[blocks, block_tokens, 2, kv_heads, head_dim]``, keys before values.
        table: int32 ``[batch, columns]``, numbers of blocks. One below 0 means block 0, which holds nobody's tokens.
        num_sinks: First tokens of a sequence, exact; at most ``block_tokens``.
        num_pages: At least the full pages of the longest sequence.
        page_tokens: Tokens in a page.
        before: int32 ``[batch, 2]``: tokens before the new one, and the pages that are full with them.
        state: See `StaticKV`, of the sequences with their new tokens.
        flags: See `StaticKV`.
        filled: See `StaticKV`.
        query_turn: See `PagedKV`.
        output_turn: See `PagedKV`.
    """

    pages: tuple[HeadPages, ...]
    rows: torch.Tensor
    table: torch.Tensor
    num_sinks: int
    num_pages: int
    page_tokens: int
    before: torch.Tensor
    state: torch.Tensor
    flags: torch.Tensor
    filled: torch.Tensor
    query_turn: torch.Tensor | None = None
    output_turn: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Most tokens of a sequence."""
        return self.filled.shape[0] - 1

    @property
    def exact(self) -> ExactKV:
        """``[blocks, kv_heads, block_tokens, head_dim]`` of every block; views."""
        key, value = self.rows.permute(2, 0, 3, 1, 4)
        return ExactKV(key, value)

    @property
    def page_table(self) -> torch.Tensor:
        """int32 ``[batch, columns]``, of pages only; a view."""
        return self.table[:, self._first_page :]

    @property
    def _first_page(self) -> int:
        """The column of the first page."""
        return int(self.num_sinks > 0)

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense tensor that all sequences would be when full, ``[batch, kv_heads, tokens, head_dim]``."""
        return torch.Size((len(self.table), self.rows.shape[3], self.length, self.rows.shape[4]))

    def counters(self) -> torch.Tensor:
        """See `StaticKV.counters`."""
        return self.state[self.before.numel() :]

    def gathered(self, *, with_new: bool) -> StaticKV:
        """The same with copies of the exact tokens, of which a sequence holds the new one or not yet."""
        sink = torch.arange(self.num_sinks, device=self.table.device).expand(len(self.table), -1)
        token = torch.arange(self.page_tokens, device=self.table.device).expand(len(self.table), -1)
        column, row = self._place(token)
        held = self.rows[self._block(torch.cat([sink * 0, column], dim=1)), torch.cat([sink, row], dim=1)]
        key, value = held.permute(2, 0, 3, 1, 4)
        split = (self.num_sinks, self.page_tokens)
        (sink_key, tail_key), (sink_value, tail_value) = key.split(split, dim=2), value.split(split, dim=2)
        counters = (0, len(self.counters()))
        return StaticKV(
            self.pages,
            ExactKV(sink_key, sink_value),
            ExactKV(tail_key, tail_value),
            self.state.clone() if with_new else torch.nn.functional.pad(self.before.flatten(), counters),
            self.flags,
            self.filled,
            self.page_tokens,
            table=self.page_table[:, : self.num_pages],
            query_turn=self.query_turn,
            output_turn=self.output_turn,
        )

    def put_newest(self, kv: StaticKV) -> None:
        """Copy the new tokens back from what `gathered` gave without them and `Backend.append` then changed."""
        exact, (column, row) = self._exact, self._place(self._exact)
        is_sink, at = exact < 0, exact + self.num_sinks
        block = self._block(column.masked_fill(is_sink, 0))
        each = torch.arange(len(at), device=at.device)
        sides = ((kv.sinks.key, kv.tail.key), (kv.sinks.value, kv.tail.value))
        new = torch.stack([torch.cat(side, dim=2)[each, :, at[:, 0]] for side in sides], dim=1)
        self.rows[block[:, 0], torch.where(is_sink, at, row)[:, 0]] = new

    @property
    def _exact(self) -> torch.Tensor:
        """int64 ``[batch, 1]``: exact tokens behind full pages without the new one; below 0 where sinks are missing."""
        tokens, pages = self.before.long().split(1, dim=1)
        exact: torch.Tensor = tokens - self.num_sinks - pages * self.page_tokens
        return exact

    def _place(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns and rows of exact tokens ``[batch, tokens]``, counted behind the full pages."""
        first = self.before[:, 1:].long() + self._first_page + 1
        size = self.rows.shape[1]
        return first + token // size, token % size

    def _block(self, columns: torch.Tensor) -> torch.Tensor:
        """int64 numbers of the blocks in columns of the table; of some block where a sequence has too few."""
        return self.table.gather(1, columns.clamp(0, self.table.shape[1] - 1)).long().clamp_min(0)
