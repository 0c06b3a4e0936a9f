"""One sequence of a pass of several tokens: append, pack, and read as attention reads a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvloom.integrations.vllm._blocks import Blocks, rows_of
from kvloom.pages import ExactKV, PagedKV
from kvloom.plan import Prefill


@dataclass(frozen=True)
class Sequence:
    """The blocks of one sequence in one layer.

    Attributes:
        blocks: Those of all sequences.
        table: int32 ``[blocks of the sequence]``, their numbers, in order.
    """

    blocks: Blocks
    table: torch.Tensor

    def append(self, key: torch.Tensor, value: torch.Tensor, computed: int) -> ExactKV:
        """Add tokens after the ``computed`` ones that the blocks hold; pages that are full now are packed.

        Args:
            key: ``[1, kv_heads, tokens, head_dim]``, turned as they are cached.
            value: The same shape.
            computed: Tokens before these.

        Returns:
            The exact tokens after the pages that were full before: the tail that the new tokens are to read.
        """
        layout, length = self.blocks.layout, computed + key.shape[2]
        before, after = layout.full_pages(computed), layout.full_pages(length)
        missing = max(0, min(length, layout.sinks) - computed)
        self._write(0, min(computed, layout.sinks), _part(key, value, 0, missing))
        new = _part(key, value, missing, length)
        held = max(0, computed - layout.sinks) - before * layout.page_tokens
        tail = _joined(self._read(layout.exact_column(before), held), new)
        if after > before:
            packed = (after - before) * layout.page_tokens
            self._pack(_part(tail.key, tail.value, 0, packed), before, after)
            held, new = 0, _part(tail.key, tail.value, packed, length)
        self._write(layout.exact_column(after), held, new)
        return tail

    def cache(self, tail: ExactKV, computed: int, length: int, prefill: Prefill) -> PagedKV:
        """What the tokens ``[computed, length)`` are to attend to.

        Args:
            tail: What `append` returned.
            computed: Tokens before this pass.
            length: Tokens, this pass's own included.
            prefill: See `kvloom.Plan`.
        """
        layout, device = self.blocks.layout, self.table.device
        if prefill == "quantized":
            pages = layout.full_pages(length - 1)
            visible = (torch.arange(computed, length, device=device) - layout.sinks).clamp(min=0) // layout.page_tokens
        else:
            pages = layout.full_pages(computed)
            visible = torch.full((length - computed,), pages, device=device)
        return PagedKV(
            self.blocks.pages,
            self._read(0, min(length, layout.sinks)),
            tail,
            length,
            layout.page_tokens,
            pages,
            visible,
            table=self._of_pages(0, pages)[None],
        )

    def _pack(self, exact: ExactKV, first: int, stop: int) -> None:
        by_page = (x[0].unflatten(1, (stop - first, -1)).transpose(0, 1) for x in (exact.key, exact.value))
        self.blocks.pack(self._of_pages(first, stop), ExactKV(*by_page))

    def _of_pages(self, first: int, stop: int) -> torch.Tensor:
        """Numbers of the blocks of pages ``[first, stop)``."""
        at = self.blocks.layout.first_page
        return self.table[at + first : at + stop]

    def _read(self, column: int, count: int) -> ExactKV:
        """The first ``count`` of the exact tokens that start in a block of the sequence."""
        return self.blocks.exact(self.blocks.rows[self._places(column, 0, count)][None])

    def _write(self, column: int, token: int, exact: ExactKV) -> None:
        """Put exact tokens behind the ``token`` first ones of those that start in a block."""
        if exact.tokens:
            self.blocks.rows[self._places(column, token, exact.tokens)] = rows_of(exact)[0]

    def _places(self, column: int, token: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks and rows of ``count`` exact tokens behind the ``token`` first ones of those that start in a block."""
        at, size = torch.arange(token, token + count, device=self.table.device), self.blocks.layout.block_tokens
        return self.table[column + at // size], at % size


def _part(key: torch.Tensor, value: torch.Tensor, first: int, stop: int) -> ExactKV:
    return ExactKV(key[:, :, first:stop], value[:, :, first:stop])


def _joined(exact: ExactKV, new: ExactKV) -> ExactKV:
    if not exact.tokens:
        return new
    return ExactKV(torch.cat([exact.key, new.key], dim=-2), torch.cat([exact.value, new.value], dim=-2))
