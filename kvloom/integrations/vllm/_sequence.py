"""One sequence's tokens in the blocks of one layer: append, pack, and read as attention reads a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvloom import kernels
from kvloom.integrations.vllm._layout import BlockLayout
from kvloom.pages import ExactKV, HeadPages, PagedKV
from kvloom.plan import Prefill


@dataclass(frozen=True)
class Sequence:
    """The blocks of one sequence in one layer.

    Attributes:
        layout: What lies where.
        storage: uint8 ``[blocks, layout.nbytes]``, those of all sequences.
        table: int64 ``[blocks of the sequence]``, their numbers, in order.
        dtype: Compute dtype.
    """

    layout: BlockLayout
    storage: torch.Tensor
    table: torch.Tensor
    dtype: torch.dtype

    def append(self, key: torch.Tensor, value: torch.Tensor, computed: int) -> ExactKV:
        """Add tokens after the ``computed`` ones that the blocks hold; pages that are full now are packed.

        Args:
            key: ``[1, kv_heads, tokens, head_dim]``, turned as they are cached.
            value: The same shape.
            computed: Tokens before these.

        Returns:
            The exact tokens after the pages that were full before: the tail that the new tokens are to read.
        """
        layout, length = self.layout, computed + key.shape[2]
        before, after = layout.full_pages(computed), layout.full_pages(length)
        missing = max(0, min(length, layout.sinks) - computed)
        self._write(0, min(computed, layout.sinks), _rows(key[:, :, :missing], value[:, :, :missing]))
        new = ExactKV(key[:, :, missing:], value[:, :, missing:])
        held = max(0, computed - layout.sinks) - before * layout.page_tokens
        tail = _joined(self._read(layout.first_page + before, held), new)
        if after > before:
            packed = (after - before) * layout.page_tokens
            self._pack(tail.key[:, :, :packed], tail.value[:, :, :packed], before, after)
            held, new = 0, ExactKV(tail.key[:, :, packed:], tail.value[:, :, packed:])
        self._write(layout.first_page + after, held, _rows(new.key, new.value))
        return tail

    def cache(self, tail: ExactKV, computed: int, length: int, prefill: Prefill) -> PagedKV:
        """What the tokens ``[computed, length)`` are to attend to.

        Args:
            tail: What `append` returned.
            computed: Tokens before this pass.
            length: Tokens, this pass's own included.
            prefill: See `kvloom.Plan`.
        """
        visible = torch.full((length - computed,), self.layout.full_pages(computed))
        if prefill == "quantized":
            visible = (torch.arange(computed, length) - self.layout.sinks).clamp(min=0) // self.layout.page_tokens
        pages = int(visible[-1])
        return PagedKV(
            tuple(self._records(pages)),
            self._read(0, min(length, self.layout.sinks)),
            tail,
            length,
            self.layout.page_tokens,
            pages,
            visible.to(self.storage.device),
        )

    def _pack(self, key: torch.Tensor, value: torch.Tensor, first: int, stop: int) -> None:
        blocks = self._blocks(first, stop)
        for heads, layout, start in self.layout.groups:
            own = list(heads)
            records = kernels.backend(key.device).encode(key[:, own], value[:, own], layout)
            end = start + len(heads) * layout.nbytes
            self.storage[blocks, start:end] = records[0].transpose(0, 1).flatten(1)

    def _records(self, count: int) -> list[HeadPages]:
        blocks = self._blocks(0, count)
        found = []
        for heads, layout, start in self.layout.groups:
            data = self.storage[blocks, start : start + len(heads) * layout.nbytes]
            found.append(HeadPages(heads, layout, data.view(count, len(heads), layout.nbytes).transpose(0, 1)[None]))
        return found

    def _blocks(self, first: int, stop: int) -> torch.Tensor:
        """Numbers of the blocks of pages ``[first, stop)``."""
        return self.table[self.layout.first_page + first : self.layout.first_page + stop]

    def _read(self, block: int, count: int) -> ExactKV:
        """The first ``count`` of the exact tokens that start in a block of the sequence."""
        layout, nbytes = self.layout, count * self.layout.token_nbytes
        blocks = self.table[block : block - (-nbytes // layout.nbytes)]
        data = self.storage[blocks].flatten()[:nbytes].view(self.dtype)
        key, value = data.view(count, 2, layout.kv_heads, layout.head_dim).transpose(0, 2)[None].unbind(2)
        return ExactKV(key, value)

    def _write(self, block: int, token: int, rows: torch.Tensor) -> None:
        """Put the bytes of exact tokens behind the ``token`` first ones of those that start in a block."""
        at = token * self.layout.token_nbytes
        while len(rows):
            skipped, start = divmod(at, self.layout.nbytes)
            count = min(len(rows), self.layout.nbytes - start)
            self.storage[self.table[block + skipped], start : start + count] = rows[:count]
            rows, at = rows[count:], at + count


def _rows(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Exact tokens ``[1, kv_heads, tokens, head_dim]`` as bytes, token after token."""
    return torch.stack([key[0], value[0]]).permute(2, 0, 1, 3).contiguous().flatten().view(torch.uint8)


def _joined(exact: ExactKV, new: ExactKV) -> ExactKV:
    if not exact.tokens:
        return new
    return ExactKV(torch.cat([exact.key, new.key], dim=-2), torch.cat([exact.value, new.value], dim=-2))
