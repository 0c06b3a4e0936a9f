"""The hot operations behind one contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NotRequired, TypedDict, Unpack

import torch

from kvloom.codecs import rotated, signs
from kvloom.kernels._static import append_by_sequence, attend_by_sequence
from kvloom.kernels._turns import Rope, roped, turned, turned_back
from kvloom.pages import PagedKV, PageLayout, PooledKV, StaticKV

PRODUCT_ROWS, PRODUCT_WEIGHTS = 8, 4
"""Up to how many rows `Backend.products` gains by a kernel of its own, and how many weights one launch takes."""

SUM_NBYTES = 1 << 18
"""Up to how many bytes `Backend.sum_ranks` gains by a kernel of its own."""


@dataclass(frozen=True)
class Reach:
    """How far a layer's `kvloom.pages.PooledKV` may go.

    Attributes:
        group: Query heads of a KV head.
        sequences: Most of a pass.
        pages: Most of a sequence.
        sinks: First tokens of a sequence, exact.
        is_capped: Whether scores are, see `Backend.attend`.
    """

    group: int
    sequences: int
    pages: int
    sinks: int
    is_capped: bool


class AttendOptions(TypedDict):
    """Keyword arguments of `Backend.attend`, for backends that pass them on."""

    scaling: float
    mask: NotRequired[torch.Tensor | None]
    softcap: NotRequired[float | None]
    sink_logits: NotRequired[torch.Tensor | None]


def rows_of_a_head(query: torch.Tensor, kv: PagedKV | StaticKV | PooledKV) -> int:
    """Query rows that read one KV head: query heads of its group x queries."""
    return query.shape[1] // kv.shape[1] * query.shape[2]


@lru_cache(maxsize=1024)
def head_index(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 numbers of KV heads, on the device."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


def exact_states(kv: PagedKV | StaticKV) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the sinks and the tail."""
    if not kv.sinks.tokens:
        return kv.tail.key, kv.tail.value
    return torch.cat([kv.sinks.key, kv.tail.key], -2), torch.cat([kv.sinks.value, kv.tail.value], -2)


class Backend(ABC):
    """Encode, decode and attend over pages.

    Every backend gives the reference's codes bit for bit; of codecs that search for a grid, those of a grid whose error
    is the reference's but for rounding.
    """

    name: str

    @abstractmethod
    def encode(
        self, key: torch.Tensor, value: torch.Tensor, layout: PageLayout, flags: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pack whole pages.

        Args:
            key: ``[batch, heads, pages * page_tokens, head_dim]``, compute dtype.
            value: The same shape.
            layout: Page layout of these heads.
            flags: int32 whose first element may become 1 in place of an error, so that nobody waits for the device.

        Returns:
            uint8 ``[batch, heads, pages, layout.nbytes]``.

        Raises:
            CacheError: An element to be quantised is NaN, infinite or beyond fp16's range.
        """

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """States ``[batch, heads, tokens, head_dim]`` turned by the Hadamard transform, see `kvloom.codecs.rotated`."""
        return rotated(x, signs("hadamard", x.shape[-1], x.device))

    @abstractmethod
    def decode(
        self, data: torch.Tensor, layout: PageLayout, dtype: torch.dtype, table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unpack pages.

        Args:
            data: uint8 ``[batch, heads, pages, layout.nbytes]``; with a table ``[1, heads, records, layout.nbytes]``.
            layout: Their layout.
            dtype: Compute dtype (that of the elements of a passthrough side).
            table: int32 ``[batch, pages]``, which record holds a page; None if in order.

        Returns:
            Keys and values ``[batch, heads, pages * page_tokens, head_dim]`` of ``dtype``.
        """

    def all_states(self, kv: PagedKV, *, in_order: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sinks, pages and tail, the pages unpacked.

        Args:
            kv: The layer's cache.
            in_order: Whether as slots follow each other, for pages and a tail that do not overlap; else by column
                [sinks, tail, pages].

        Returns:
            ``[batch, kv_heads, tokens, head_dim]`` each, in the compute dtype.
        """
        if kv.num_pages == 0:
            return exact_states(kv)
        key, value = self._decoded(kv)
        if in_order:
            return (
                torch.cat([kv.sinks.key, key, kv.tail.key], -2),
                torch.cat([kv.sinks.value, value, kv.tail.value], -2),
            )
        exact_key, exact_value = exact_states(kv)
        return torch.cat([exact_key, key], -2), torch.cat([exact_value, value], -2)

    def _decoded(self, kv: PagedKV) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the pages, ``[batch, kv_heads, num_pages * page_tokens, head_dim]``."""
        shape = (*kv.shape[:2], kv.num_pages * kv.page_tokens, kv.shape[-1])
        if len(kv.pages) == 1:
            key, value = self.decode(kv.pages[0].data, kv.pages[0].layout, kv.dtype, kv.table)
            return key.expand(shape), value.expand(shape)
        key, value = (torch.empty(shape, dtype=kv.dtype, device=kv.device) for _ in range(2))
        for group in kv.pages:
            heads = head_index(group.heads, kv.device)
            key[:, heads], value[:, heads] = self.decode(group.data, group.layout, kv.dtype, kv.table)
        return key, value

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        kv: PagedKV,
        *,
        scaling: float,
        mask: torch.Tensor | None = None,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over sinks, pages and tail in one softmax.

        Args:
            query: ``[batch, query_heads, queries, head_dim]``; the queries are the newest tokens of ``kv``.
            kv: The layer's cache, this pass's tokens included.
            scaling: Factor of the scores.
            mask: None for causal, or ``[batch or 1, heads or 1, queries, kv.length]`` by slot, or by place where ``kv``
                has ``places``: boolean (True = attend) or additive.
            softcap: Scores become ``softcap * tanh(scores / softcap)``.
            sink_logits: ``[query_heads]`` extra logits that take part in the softmax only (gpt-oss).

        Returns:
            ``[batch, queries, query_heads, head_dim]`` in the query's dtype.
        """

    def is_graph_safe(self, layouts: Sequence[PageLayout], dtype: torch.dtype) -> bool:
        """Whether `append` and `attend_static` of such a cache launch the same at every step and never wait."""
        return False

    def is_graph_safe_between_pages(self, layouts: Sequence[PageLayout], dtype: torch.dtype) -> bool:
        """Whether they do so at least at steps within `kvloom.kernels.between_pages`."""
        return self.is_graph_safe(layouts, dtype)

    def prepare(self, kv: StaticKV) -> None:  # noqa: B027 (most backends need nothing)
        """Make what steps with ``kv`` keep on the device: what a step made first would lie in its graph's memory."""

    def append(self, key: torch.Tensor, value: torch.Tensor, kv: StaticKV, rope: Rope | None = None) -> None:
        """Append one token to every sequence, and pack the page that is full with it.

        Sides whose layouts say ``hadamard`` are turned first; whoever calls has turned those that are ``calibrated``.
        What is found on the device cannot be raised: ``kv.flags`` are set.

        Args:
            key: ``[batch, kv_heads, 1, head_dim]``, compute dtype.
            value: The same shape.
            kv: The layer's cache, changed in place.
            rope: Positions that the key is yet to be turned by; None if it was.
        """
        self._append(roped(key, rope), value, kv)

    def _append(self, key: torch.Tensor, value: torch.Tensor, kv: StaticKV) -> None:
        """`append` of keys that have their positions."""
        append_by_sequence(self, key, value, kv)

    def attend_static(
        self, query: torch.Tensor, kv: StaticKV, rope: Rope | None = None, **options: Unpack[AttendOptions]
    ) -> torch.Tensor:
        """`attend` with a cache of fixed size. Queries are turned to match its keys, and outputs back from its values.

        Args:
            query: ``[batch, query_heads, 1, head_dim]``, of the token appended last.
            kv: The layer's cache.
            rope: Positions that the query is yet to be turned by; None if it was.
            **options: See `attend`; the mask covers at least the slots held.

        Returns:
            ``[batch, 1, query_heads, head_dim]`` in the query's dtype.
        """
        out = self._attend_static(turned(roped(query, rope), kv.query_turn), kv, **options)
        return turned_back(out, kv.output_turn)

    def _attend_static(self, query: torch.Tensor, kv: StaticKV, **options: Unpack[AttendOptions]) -> torch.Tensor:
        """`attend_static` of what is turned, to what is yet to be turned back."""
        return attend_by_sequence(self, query, kv, options)

    def build_pooled(  # noqa: B027 (for backends without a compiler there is nothing to do)
        self, layouts: tuple[PageLayout, ...], dtype: torch.dtype, reach: Reach
    ) -> None:
        """Build what serving such a cache needs, so that no request waits for a compiler.

        Args:
            layouts: Of each KV head.
            dtype: Compute dtype.
            reach: How far the cache goes.
        """

    def append_pooled(self, key: torch.Tensor, value: torch.Tensor, kv: PooledKV) -> None:
        """`append` where sequences share blocks; what ``kv`` says of levels stays true."""
        held = kv.gathered(with_new=False)
        self.append(key, value, held)
        kv.put_newest(held)

    def attend_pooled(
        self, query: torch.Tensor, kv: PooledKV, out: torch.Tensor | None = None, **options: Unpack[AttendOptions]
    ) -> torch.Tensor:
        """`attend_static` where sequences share blocks.

        Args:
            query: ``[batch, query_heads, 1, head_dim]``, of the tokens that `append_pooled` took.
            kv: The layer's cache.
            out: Contiguous, what is returned; None makes one.
            **options: See `attend`; no mask.

        Returns:
            ``[batch, 1, query_heads, head_dim]`` in the query's dtype.
        """
        made = self.attend_static(query, kv.gathered(with_new=True), **options)
        return made if out is None else out.copy_(made)

    def products(
        self, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """``x @ weight.T + bias`` of weights that share their rows: what a decode step spends most of its time on.

        Args:
            x: ``[rows, channels]``.
            weights: ``[features, channels]`` each.
            biases: ``[features]`` of each, or None.

        Returns:
            ``[rows, features]`` of each.
        """
        return [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def gated_product(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """``silu(x @ gate.T) * (x @ up.T)``: the first half of a gated feed-forward layer.

        Args:
            x: ``[rows, channels]``.
            gate: ``[features, channels]``.
            up: Of the same shape.

        Returns:
            ``[rows, features]``.
        """
        gated, raised = self.products(x, [gate, up], [None, None])
        return torch.nn.functional.silu(gated) * raised

    def add_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        group_name: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``h = residual + x`` and ``h / sqrt(mean(h ** 2) + eps) * weight`` (RMSNorm, arXiv:1910.07467).

        Args:
            x: ``[rows, channels]``.
            residual: Of the same shape.
            weight: ``[channels]``.
            eps: Added to the mean of squares.
            group_name: Of a process group over whose ranks ``x`` is summed first, see `sum_ranks`.

        Returns:
            Both, shaped like ``x``.
        """
        x = x if group_name is None else self.sum_ranks(x, group_name)
        h = residual + x
        exact = h.float()
        unit = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
        return h, weight * unit.to(h.dtype)

    def sum_ranks(self, x: torch.Tensor, group_name: str) -> torch.Tensor:
        """Sum over the ranks of a process group, which all call this.

        Args:
            x: This rank's addend, of one shape and dtype on all.
            group_name: As torch's functional collectives take it.

        Returns:
            The sum, shaped like ``x``.
        """
        collectives = torch.ops._c10d_functional
        out: torch.Tensor = collectives.wait_tensor(collectives.all_reduce(x, "sum", group_name))
        return out
