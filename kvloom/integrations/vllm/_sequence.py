"""One sequence of a pass of several tokens: append, pack, and read as attention reads a cache."""

from __future__ import annotations

from functools import cached_property

import torch

from kvloom.integrations.vllm._blocks import Blocks, rows_of
from kvloom.integrations.vllm._layout import BlockLayout
from kvloom.pages import ExactKV, PagedKV
from kvloom.plan import Prefill

_Places = tuple[torch.Tensor, torch.Tensor]


class Sequence:
    """Numbers of a sequence of which a pass computes several tokens, the same for all layers.

    Args:
        own: The places of its tokens among those of the pass.
        computed: Its tokens before the pass.
        table: int32 ``[blocks]``, numbers of its blocks, in order.

    Attributes:
        own: See above.
        computed: See above.
        length: Its tokens, those of the pass included.
    """

    def __init__(self, own: slice, computed: int, table: torch.Tensor) -> None:
        self.own, self.computed, self.length = own, computed, computed + own.stop - own.start
        self._table = table
        self._places: dict[tuple[int, int, int, int], _Places] = {}
        self._visible: dict[Prefill, torch.Tensor] = {}

    def append(self, blocks: Blocks, key: torch.Tensor, value: torch.Tensor) -> ExactKV:
        """Add the tokens of the pass to a layer's blocks; pages that are full now are packed.

        Args:
            blocks: Those of the layer.
            key: ``[1, kv_heads, tokens, head_dim]``, turned as they are cached.
            value: The same shape.

        Returns:
            The exact tokens after the pages that were full before: the tail that the new tokens are to read.
        """
        layout = blocks.layout
        before, after = layout.full_pages(self.computed), layout.full_pages(self.length)
        missing = max(0, min(self.length, layout.sinks) - self.computed)
        self._write(blocks, 0, min(self.computed, layout.sinks), _part(key, value, 0, missing))
        new = _part(key, value, missing, self.length)
        held = max(0, self.computed - layout.sinks) - before * layout.page_tokens
        tail = _joined(self._read(blocks, layout.exact_column(before), held), new)
        if after > before:
            packed = (after - before) * layout.page_tokens
            self._pack(blocks, _part(tail.key, tail.value, 0, packed), before, after)
            held, new = 0, _part(tail.key, tail.value, packed, self.length)
        self._write(blocks, layout.exact_column(after), held, new)
        return tail

    def cache(self, blocks: Blocks, tail: ExactKV, prefill: Prefill) -> PagedKV:
        """What the tokens of the pass are to attend to in a layer.

        Args:
            blocks: Those of the layer.
            tail: What `append` returned.
            prefill: See `kvloom.Plan`.
        """
        layout = blocks.layout
        pages = layout.full_pages(self.length - 1 if prefill == "quantized" else self.computed)
        return PagedKV(
            blocks.pages,
            self._read(blocks, 0, min(self.length, layout.sinks)),
            tail,
            self.length,
            layout.page_tokens,
            pages,
            self._visible_by(prefill, layout),
            table=self._table[layout.first_page : layout.first_page + pages][None],
        )

    @property
    def device(self) -> torch.device:
        """Of its blocks."""
        return self._table.device

    @cached_property
    def _numbers(self) -> torch.Tensor:
        """The table as rows are taken by it."""
        return self._table.long()

    def _visible_by(self, prefill: Prefill, layout: BlockLayout) -> torch.Tensor:
        """See `PagedKV.visible`."""
        if prefill not in self._visible:
            tokens = torch.arange(self.computed, self.length, device=self.device)
            if prefill == "exact":
                tokens = torch.full_like(tokens, self.computed)
            self._visible[prefill] = (tokens - layout.sinks).clamp(min=0) // layout.page_tokens
        return self._visible[prefill]

    def _pack(self, blocks: Blocks, exact: ExactKV, first: int, stop: int) -> None:
        by_page = (x[0].unflatten(1, (stop - first, -1)).transpose(0, 1) for x in (exact.key, exact.value))
        at = blocks.layout.first_page
        blocks.pack(self._numbers[at + first : at + stop], ExactKV(*by_page))

    def _read(self, blocks: Blocks, column: int, count: int) -> ExactKV:
        """The first ``count`` of the exact tokens that start in a block of the sequence."""
        rows = blocks.rows
        return blocks.exact(rows[self._located(blocks, column, 0, count)][None] if count else rows[:1, :0])

    def _write(self, blocks: Blocks, column: int, token: int, exact: ExactKV) -> None:
        """Put exact tokens behind the ``token`` first ones of those that start in a block."""
        if exact.tokens:
            blocks.rows[self._located(blocks, column, token, exact.tokens)] = rows_of(exact)[0]

    def _located(self, blocks: Blocks, column: int, token: int, count: int) -> _Places:
        """Blocks and rows of ``count`` exact tokens behind the ``token`` first ones of those that start in a block."""
        size = blocks.layout.block_tokens
        wanted = size, column, token, count
        if wanted not in self._places:
            at = torch.arange(token, token + count, device=self.device)
            self._places[wanted] = self._numbers[column + at // size], at % size
        return self._places[wanted]


def _part(key: torch.Tensor, value: torch.Tensor, first: int, stop: int) -> ExactKV:
    return ExactKV(key[:, :, first:stop], value[:, :, first:stop])


def _joined(exact: ExactKV, new: ExactKV) -> ExactKV:
    if not exact.tokens:
        return new
    return ExactKV(torch.cat([exact.key, new.key], dim=-2), torch.cat([exact.value, new.value], dim=-2))
