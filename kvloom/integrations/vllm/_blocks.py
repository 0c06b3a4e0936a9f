"""One layer's blocks: exact tokens as rows, full pages as records, both in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvloom import kernels
from kvloom.integrations.vllm._layout import BlockLayout
from kvloom.pages import ExactKV, HeadPages

_WORD = torch.int64  # in which rows and records are moved
Index = slice | torch.Tensor


@dataclass(frozen=True)
class Blocks:
    """The blocks of all sequences in one layer.

    Attributes:
        layout: What lies where.
        storage: uint8 ``[blocks, layout.nbytes]``.
        dtype: Compute dtype.
        flags: See `kvloom.kernels.Backend.encode`.
    """

    layout: BlockLayout
    storage: torch.Tensor
    dtype: torch.dtype
    flags: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        """Exact tokens, int64 ``[blocks, layout.block_tokens, words of a token]``; a view."""
        layout = self.layout
        words = self.storage.view(_WORD)[:, : layout.block_tokens * layout.token_nbytes // _WORD.itemsize]
        rows: torch.Tensor = words.unflatten(1, (layout.block_tokens, -1))
        return rows

    @property
    def tokens(self) -> torch.Tensor:
        """Exact tokens, ``[blocks, layout.block_tokens, 2, kv_heads, head_dim]``; a view."""
        return self._states(self.rows)

    @property
    def pages(self) -> tuple[HeadPages, ...]:
        """The records of all blocks, ``data [1, heads, blocks, layout.nbytes]`` to be read by a table; views."""
        return tuple(
            HeadPages(
                heads, own, self.storage[:, start:stop].unflatten(1, (len(heads), own.nbytes)).transpose(0, 1)[None]
            )
            for heads, own, start, stop in self.layout.groups
        )

    def pack(self, numbers: torch.Tensor, exact: ExactKV) -> None:
        """Pack tokens over whole blocks, in one call for each page layout.

        Args:
            numbers: int64 ``[pages]``, of the blocks.
            exact: ``[pages, kv_heads, page_tokens, head_dim]``.
        """
        device = self.storage.device
        for heads, own, start, stop in self.layout.groups:
            theirs = _of_heads(heads, device)
            records = kernels.backend(device).encode(exact.key[:, theirs], exact.value[:, theirs], own, self.flags)
            words = slice(start // _WORD.itemsize, stop // _WORD.itemsize)
            self.storage.view(_WORD)[numbers, words] = records.flatten(1).view(_WORD)

    def exact(self, rows: torch.Tensor) -> ExactKV:
        """Tokens ``[batch, kv_heads, tokens, head_dim]`` of ``rows [batch, tokens, words]``; views."""
        key, value = self._states(rows).permute(2, 0, 3, 1, 4)
        return ExactKV(key, value)

    def _states(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., 2, kv_heads, head_dim]`` of ``rows [..., words]``; a view."""
        states: torch.Tensor = rows.view(self.dtype).unflatten(-1, (2, self.layout.kv_heads, self.layout.head_dim))
        return states


def rows_of(exact: ExactKV) -> torch.Tensor:
    """Tokens ``[batch, kv_heads, tokens, head_dim]`` as rows, int64 ``[batch, tokens, words]``."""
    return torch.stack([x.transpose(1, 2) for x in (exact.key, exact.value)], dim=2).flatten(2).view(_WORD)


def on_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Few numbers as a tensor, without waiting for the device."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def index(numbers: Sequence[int], device: torch.device) -> Index:
    """What takes rows by their numbers, rising: a slice if they follow each other."""
    if numbers and numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(numbers[0], numbers[-1] + 1)
    return on_device(numbers, torch.int64, device)


@lru_cache(maxsize=1024)
def _of_heads(heads: tuple[int, ...], device: torch.device) -> Index:
    return index(heads, device)
