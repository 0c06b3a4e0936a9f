"""`PagedKV`: what a packed layer hands to attention in place of key and value tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from kvloom.errors import ModelError
from kvloom.pages._layout import PageLayout


@dataclass(frozen=True)
class HeadPages:
    """Page records of the KV heads that share a layout.

    Attributes:
        heads: Indices of those heads, rising.
        layout: Their layout.
        data: uint8 ``[batch, len(heads), pages, layout.nbytes]``.
    """

    heads: tuple[int, ...]
    layout: PageLayout
    data: torch.Tensor


@dataclass(frozen=True)
class ExactKV:
    """Tokens kept in the compute dtype: ``[batch, kv_heads, tokens, head_dim]`` each."""

    key: torch.Tensor
    value: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.key.shape[-2]


@dataclass(frozen=True)
class PagedKV:
    """One layer's cache at one forward pass: sinks, pages and the exact tail, as one sequence of slots.

    Slots ``[0, sinks)`` are the sinks, pages follow in order, the tail ends at ``length``. Pages and tail may overlap
    (prefill "quantized"): query ``i`` reads pages ``[0, visible[i])`` packed and every later slot from the tail.

    Attributes:
        pages: Page records, by layout.
        sinks: First tokens.
        tail: Newest tokens, this pass's own included.
        length: Tokens seen, this pass's own included.
        page_tokens: Tokens in a page.
        num_pages: Pages held.
        visible: int64 ``[queries]``, pages each query of this pass reads.
    """

    pages: tuple[HeadPages, ...]
    sinks: ExactKV
    tail: ExactKV
    length: int
    page_tokens: int
    num_pages: int
    visible: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense tensor it stands for, ``[batch, kv_heads, tokens, head_dim]``."""
        batch, heads, _, dim = self.tail.key.shape
        return torch.Size((batch, heads, self.length, dim))

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.tail.key.dtype

    @property
    def device(self) -> torch.device:
        """Device of the cache."""
        return self.tail.key.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Refuse to be used as a tensor: some models do arithmetic on what the cache returns."""
        raise ModelError(
            f"the model applies {getattr(func, '__name__', func)} to its cached keys or values, which are packed: call "
            "kvloom.disable(model) and use the cache without enable."
        )

    def exact_slots(self) -> torch.Tensor:
        """int64 slots of the sinks, then of the tail."""
        first = torch.arange(self.sinks.tokens, device=self.device)
        return torch.cat([first, torch.arange(self.length - self.tail.tokens, self.length, device=self.device)])

    def page_slots(self) -> torch.Tensor:
        """int64 slots of the packed tokens, page after page."""
        start = self.sinks.tokens
        return torch.arange(start, start + self.num_pages * self.page_tokens, device=self.device)
