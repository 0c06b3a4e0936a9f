"""The CUDA backend: kernels written for the page format, compiled at first use (see `kvloom.kernels._nvrtc`)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, Unpack

import torch

from kvloom.errors import KernelError
from kvloom.kernels import _cuda_norms, _cuda_pages, _cuda_products, _cuda_sums, _nvrtc
from kvloom.kernels._base import AttendOptions, Backend, Reach, head_index, rows_of_a_head
from kvloom.kernels._cuda_ahead import Device, pooled_builds
from kvloom.kernels._cuda_launch import (
    NO_TURNS,
    ROWS,
    SOURCE,
    Kernel,
    Turns,
    block_warps,
    exact_units,
    has_clusters,
    merges_in_cluster,
    multiprocessors,
    spread,
    turns_by_format,
)
from kvloom.kernels._cuda_pages import MAX_HEAD_DIM
from kvloom.kernels._cuda_turns import rope_arguments, ropes
from kvloom.kernels._nvrtc import is_aligned
from kvloom.kernels._points import has_codebook, point_arguments
from kvloom.kernels._torch import TORCH, TorchBackend
from kvloom.kernels._turns import Rope, roped, turned, turned_back
from kvloom.pages import ExactKV, HeadPages, PagedKV, PageLayout, PooledKV, StaticKV

# movmatrix, redux and cp.async: Ampere and later.
MIN_CAPABILITY = (8, 0)
PAGE_TOKENS = (64, 128)
LOG2E = 1.4426950408889634


_T = TypeVar("_T")


class CudaBackend(TorchBackend):
    """Attention over pages as one launch; packing and unpacking likewise. What is not served goes to the reference.

    Served: fp16 and bf16, pages of 64 or 128 tokens, boolean masks that all heads share, also where every head keeps
    other tokens. A pass with more query rows of a KV head than a page has tokens is left to dense attention over
    unpacked pages, which is then faster.

    Args:
        device: Where it is to run.
        following: Takes over, with one warning, if a kernel cannot be built.

    Raises:
        KernelError: cuda-core is missing, or the device is older than Ampere.
    """

    name = "cuda"

    def __init__(self, device: torch.device, following: Backend = TORCH) -> None:
        if torch.version.hip:
            raise KernelError("this is an AMD device")
        if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
            raise KernelError(f"{torch.cuda.get_device_name(device)} is older than Ampere")
        _nvrtc.compiler_version()
        self._shared = _nvrtc.shared_limit(torch.cuda.current_device() if device.index is None else device.index)
        self._following = following
        self._is_broken = False

    def encode(
        self, key: torch.Tensor, value: torch.Tensor, layout: PageLayout, flags: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Backend.encode`."""
        args = (key, value, layout, flags)
        if not _cuda_pages.encodes(layout, key.dtype):
            return super().encode(*args)
        return self._unless_broken(lambda: _cuda_pages.encode(*args), lambda other: other.encode(*args))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """See `Backend.rotate`."""
        if not _cuda_pages.rotates(x):
            return super().rotate(x)
        return self._unless_broken(lambda: _cuda_pages.rotate(x), lambda other: other.rotate(x))

    def decode(
        self, data: torch.Tensor, layout: PageLayout, dtype: torch.dtype, table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.decode`."""
        args = (data, layout, dtype, table)
        if not _cuda_pages.decodes(layout, dtype):
            return super().decode(*args)
        return self._unless_broken(lambda: _cuda_pages.decode(*args), lambda other: other.decode(*args))

    def attend(self, query: torch.Tensor, kv: PagedKV, **options: Unpack[AttendOptions]) -> torch.Tensor:
        """See `Backend.attend`."""
        if not _served(query, kv, options.get("mask"), self._shared):
            return super().attend(query, kv, **options)
        return self._unless_broken(
            lambda: attend_pages(query, kv, **options)[0], lambda other: other.attend(query, kv, **options)
        )

    def is_graph_safe(self, layouts: Sequence[PageLayout], dtype: torch.dtype) -> bool:
        """See `Backend.is_graph_safe`."""
        return (
            not self._is_broken
            and _is_covered(layouts, dtype, self._shared)
            and all(_cuda_pages.encodes(layout, dtype) for layout in layouts)
        )

    def prepare(self, kv: StaticKV) -> None:
        """See `Backend.prepare`."""
        for group in kv.pages:
            head_index(group.heads, kv.device)

    def append(self, key: torch.Tensor, value: torch.Tensor, kv: StaticKV, rope: Rope | None = None) -> None:
        """See `Backend.append`."""
        if rope is not None and not ropes(key, rope):
            key, rope = roped(key, rope), None
        if not self.is_graph_safe([group.layout for group in kv.pages], key.dtype):
            return super().append(key, value, kv, rope)
        return self._unless_broken(
            lambda: _cuda_pages.append(key, value, kv, rope), lambda other: other.append(key, value, kv, rope)
        )

    def attend_static(
        self, query: torch.Tensor, kv: StaticKV, rope: Rope | None = None, **options: Unpack[AttendOptions]
    ) -> torch.Tensor:
        """See `Backend.attend_static`."""
        if not _served(query, kv, options.get("mask"), self._shared):
            return super().attend_static(query, kv, rope, **options)
        return self._unless_broken(
            lambda: _attend_unturned(query, kv, rope, **options),
            lambda other: other.attend_static(query, kv, rope, **options),
        )

    def build_pooled(self, layouts: tuple[PageLayout, ...], dtype: torch.dtype, reach: Reach) -> None:
        """See `Backend.build_pooled`."""
        if self.is_graph_safe(layouts, dtype):
            self._unless_broken(
                lambda: _build_pooled(layouts, dtype, reach, torch.cuda.current_device()),
                lambda other: other.build_pooled(layouts, dtype, reach),
            )

    def append_pooled(self, key: torch.Tensor, value: torch.Tensor, kv: PooledKV) -> None:
        """See `Backend.append_pooled`."""
        if not self._pools(kv):
            return super().append_pooled(key, value, kv)
        return self._unless_broken(
            lambda: _cuda_pages.append(key, value, kv), lambda other: other.append_pooled(key, value, kv)
        )

    def attend_pooled(
        self, query: torch.Tensor, kv: PooledKV, out: torch.Tensor | None = None, **options: Unpack[AttendOptions]
    ) -> torch.Tensor:
        """See `Backend.attend_pooled`."""
        if not self._pools(kv) or rows_of_a_head(query, kv) > kv.page_tokens:
            return super().attend_pooled(query, kv, out, **options)
        return self._unless_broken(
            lambda: _attend_unturned(query, kv, out=out, **options),
            lambda other: other.attend_pooled(query, kv, out, **options),
        )

    def _pools(self, kv: PooledKV) -> bool:
        """Whether the kernels read and write such blocks in place."""
        exact = kv.exact
        is_graph_safe = self.is_graph_safe([group.layout for group in kv.pages], exact.key.dtype)
        return is_graph_safe and _aligned(exact) is exact

    def products(
        self, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """See `Backend.products`."""
        if not _cuda_products.multiplies(x, weights, biases):
            return super().products(x, weights, biases)
        return self._unless_broken(
            lambda: _cuda_products.products(x, weights, biases), lambda other: other.products(x, weights, biases)
        )

    def gated_product(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See `Backend.gated_product`."""
        if not _cuda_products.multiplies(x, [gate, up]):
            return super().gated_product(x, gate, up)
        return self._unless_broken(
            lambda: _cuda_products.gated_product(x, gate, up), lambda other: other.gated_product(x, gate, up)
        )

    def add_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        group_name: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.add_norm`."""
        is_ours = _cuda_norms.norms(x, residual, weight)
        if group_name is not None:  # of one mind with the other ranks: whatever becomes of it, no other way is tried
            able = is_ours and _cuda_norms.sums_rows(x)
            meeting = _cuda_sums.meeting_of(group_name, x.device) if able else None
            if meeting is not None:
                return _cuda_norms.add_norm(x, residual, weight, eps, meeting)
            x = self.sum_ranks(x, group_name)
        if not is_ours:
            return super().add_norm(x, residual, weight, eps)
        return self._unless_broken(
            lambda: _cuda_norms.add_norm(x, residual, weight, eps),
            lambda other: other.add_norm(x, residual, weight, eps),
        )

    def sum_ranks(self, x: torch.Tensor, group_name: str) -> torch.Tensor:
        """See `Backend.sum_ranks`."""
        meeting = _cuda_sums.meeting_of(group_name, x.device) if _cuda_sums.sums(x) else None
        return super().sum_ranks(x, group_name) if meeting is None else _cuda_sums.sum_ranks(x, meeting)

    def _unless_broken(self, ours: Callable[[], _T], otherwise: Callable[[Backend], _T]) -> _T:
        """Our result; or that of the backend that follows, from the first kernel that cannot be built or launched."""
        if not self._is_broken:
            try:
                return ours()
            except KernelError as error:
                self._is_broken = True
                name = self._following.name
                logging.getLogger("kvloom").warning("kvloom's cuda kernels give way to %s: %s.", name, error)
        return otherwise(self._following)


@cache
def _build_pooled(layouts: tuple[PageLayout, ...], dtype: torch.dtype, reach: Reach, device: int) -> None:
    facts = Device(multiprocessors(device), _nvrtc.shared_limit(device), has_clusters(device))
    turns = turns_by_format(layouts)
    builds = (pooled_builds(heads, layout, dtype, reach, facts, turns) for layout, heads in Counter(layouts).items())
    _nvrtc.build_all(set().union(*builds), device)


def _served(query: torch.Tensor, kv: PagedKV | StaticKV, mask: torch.Tensor | None, shared_limit: int) -> bool:
    return (
        (isinstance(kv, StaticKV) or kv.has_pages)
        and rows_of_a_head(query, kv) <= kv.page_tokens
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1))
        and _is_covered([group.layout for group in kv.pages], query.dtype, shared_limit)
    )


def _is_covered(layouts: Sequence[PageLayout], dtype: torch.dtype, shared_limit: int) -> bool:
    return dtype in (torch.float16, torch.bfloat16) and all(
        layout.is_readable
        and layout.head_dim <= MAX_HEAD_DIM
        and layout.page_tokens in PAGE_TOKENS
        and block_warps(layout, 1, 0, shared_limit) > 0
        for layout in layouts
    )


def _attend_unturned(
    query: torch.Tensor,
    kv: StaticKV | PooledKV,
    rope: Rope | None = None,
    out: torch.Tensor | None = None,
    **options: Unpack[AttendOptions],
) -> torch.Tensor:
    """`attend_pages` of queries yet to be turned as the keys are, to outputs turned back from the values."""
    able = turns_by_format(group.layout for group in kv.pages)
    if rope is not None and not (able.queries and ropes(query, rope)):
        query, rope = roped(query, rope), None
    if not able.queries:
        query = turned(query, kv.query_turn)
    turns = Turns(able.queries and kv.query_turn is not None, able.outputs and kv.output_turn is not None)
    made, _ = attend_pages(query, kv, rope=rope, turns=turns, out=out if able.outputs else None, **options)
    if able.outputs:
        return made
    made = turned_back(made, kv.output_turn)
    return made if out is None else out.copy_(made)


def attend_pages(
    query: torch.Tensor,
    kv: PagedKV | StaticKV | PooledKV,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    lse: bool = False,
    out: torch.Tensor | None = None,
    rope: Rope | None = None,
    turns: Turns = NO_TURNS,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over sinks, pages and tail, one launch for each layout among the heads.

    Args:
        query: fp16 or bf16 ``[batch, query_heads, queries, head_dim]``.
        kv: The layer's cache; it has pages. Of a `StaticKV` or `PooledKV` the last query's token is the newest, and
            every query reads the pages that one reads.
        scaling: Factor of the scores.
        mask: None for causal, or boolean ``[batch or 1, 1, queries, slots]``, for every slot held; by place where
            ``kv`` has ``places``.
        softcap: See `Backend.attend`.
        sink_logits: See `Backend.attend`.
        lse: Whether to return the log-sum-exp too.
        out: Contiguous, of the shape returned; None makes one.
        rope: Of the query, see `ropes`; None if it has its positions.
        turns: What is turned by the formats of the heads, queries like keys, outputs back from values.

    Returns:
        ``[batch, queries, query_heads, head_dim]`` in the query's dtype, and the natural log-sum-exp of the scores,
        fp32 ``[batch, query_heads, queries]``, or None.
    """
    query = query if is_aligned(query) else query.contiguous()
    batch, query_heads, queries, dim = query.shape
    if out is None:
        out = query.new_empty((batch, queries, query_heads, dim))
    sums = query.new_empty((batch, query_heads, queries), dtype=torch.float32) if lse else None
    if mask is not None:
        mask = _last_contiguous(mask.expand(batch, -1, -1, -1))
    logits = None if sink_logits is None else sink_logits.float()
    exact = _exact_of(kv)
    static = None if isinstance(kv, PagedKV) else kv
    with torch.cuda.device(query.device):
        for group in kv.pages:
            own = turns.of(group.layout)
            launch = _launch(
                group, query, kv, exact, mask, own, is_capped=softcap is not None, is_roped=rope is not None
            )
            sides = (group.layout.key, group.layout.value)
            data = group.data if group.kept is None else group.data.expand(batch, len(group.heads), -1, -1)
            launch.module.launch(
                "attend",
                (launch.splits, len(group.heads) * launch.row_tiles, batch),
                (32 * launch.warps, 1, 1),
                query,
                *_nvrtc.strides(query),
                query_heads // kv.shape[1],
                queries,
                query_heads,
                data,
                *_nvrtc.strides(data),
                exact.table,
                0 if exact.table is None else exact.table.stride(0),
                head_index(group.heads, query.device) if len(kv.pages) > 1 else None,
                exact.sinks.key,
                exact.sinks.value,
                *_nvrtc.strides(exact.sinks.key),
                exact.num_sinks,
                exact.tail.key,
                exact.tail.value,
                *_nvrtc.strides(exact.tail.key),
                0 if static is None else exact.tail.tokens,
                None if static is None else static.state,
                kv.num_pages,
                exact.tail.tokens,
                kv.length,
                mask,
                _nvrtc.int64(0 if mask is None else mask.stride(0)),
                _nvrtc.int64(0 if mask is None else mask.stride(2)),
                kv.visible if queries > 1 and isinstance(kv, PagedKV) else None,
                None if group.kept is None else group.kept.extents,
                scaling * LOG2E,
                0.0 if softcap is None else softcap * LOG2E,
                logits,
                *_workspace(launch, batch * len(group.heads), dim, query.device, static),
                out,
                sums,
                *(() if mask is None or isinstance(kv, PooledKV) else _places(group, kv)),
                *(number for side in sides if has_codebook(side) for number in point_arguments(side)),
                *rope_arguments(rope),
                shared=launch.shared,
                cluster=launch.cluster,
                follows=True,
            )
    return out, sums


@dataclass(frozen=True)
class _Exact:
    """Sinks and tail, how many of each there may be, and where blocks are found."""

    sinks: ExactKV
    tail: ExactKV
    num_sinks: int
    num_tail: int
    table: torch.Tensor | None


def _exact_of(kv: PagedKV | StaticKV | PooledKV) -> _Exact:
    if isinstance(kv, PooledKV):
        return _Exact(kv.exact, kv.exact, kv.num_sinks, kv.page_tokens, kv.page_table)
    return _Exact(_aligned(kv.sinks), _aligned(kv.tail), kv.sinks.tokens, kv.tail.tokens, kv.table)


@dataclass(frozen=True)
class _Launch:
    module: _nvrtc.Module
    warps: int
    splits: int
    row_tiles: int
    shared: int
    cluster: int


def _places(group: HeadPages, kv: PagedKV | StaticKV) -> tuple[Any, ...]:
    """What a mask by place is looked up by: places of the records and of the slots, if those are not places."""
    if group.kept is None or kv.places is None:
        return ()
    batch, heads = kv.shape[0], len(group.heads)
    of_pages = group.kept.places.expand(batch, heads, -1, -1)
    return of_pages, *_nvrtc.strides(of_pages)[:2], kv.places, *_nvrtc.strides(kv.places)[:2]


def _launch(
    group: HeadPages,
    query: torch.Tensor,
    kv: PagedKV | StaticKV | PooledKV,
    exact: _Exact,
    mask: torch.Tensor | None,
    turns: Turns,
    *,
    is_capped: bool,
    is_roped: bool,
) -> _Launch:
    row_tiles = -(-rows_of_a_head(query, kv) // ROWS)
    device, layout = query.device.index, group.layout
    tiles, units = query.shape[0] * len(group.heads) * row_tiles, exact_units(exact.num_sinks, exact.num_tail)
    facts = multiprocessors(device), _nvrtc.shared_limit(device)
    warps, splits = spread(layout, tiles, _pages_of_a_head(group, kv), units, *facts)
    masked = 1 if query.shape[2] > 1 else 0 if mask is None else 2
    place = 0 if mask is None or isinstance(kv, PooledKV) or kv.places is None else kv.places.itemsize
    is_bf16, is_pooled = query.dtype == torch.bfloat16, isinstance(kv, PooledKV)
    kernel = Kernel(
        layout,
        warps,
        is_bf16,
        masked,
        is_capped=is_capped,
        place=place,
        is_pooled=is_pooled,
        is_roped=is_roped,
        turns=turns,
    )
    clustered = merges_in_cluster(kernel, splits, tiles, device)
    shared = kernel.shared if clustered else max(kernel.shared, ROWS * 4 * splits)
    module = _nvrtc.module(SOURCE, kernel.defines(clustered=clustered))
    return _Launch(module, warps, splits, row_tiles, shared, splits if clustered else 0)


def _pages_of_a_head(group: HeadPages, kv: PagedKV | StaticKV | PooledKV) -> int:
    return kv.num_pages if group.kept is None else group.mean_pages(kv.shape[0])


@cache
def _turns(device: int, stream: int, capacity: int) -> torch.Tensor:
    """Counters of one stream, zero between its launches; never freed, since a captured graph may hold them."""
    del stream  # part of the key: launches side by side must not take each other's turns
    return torch.zeros(capacity, dtype=torch.int32, device=torch.device("cuda", device))


def _workspace(
    launch: _Launch, tiles: int, dim: int, device: torch.device, static: StaticKV | PooledKV | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What merging without clusters needs: partial results, their maxima and sums, and a counter for every row tile."""
    if launch.cluster:
        return None, None, None
    count = tiles * launch.row_tiles
    shape = (count, launch.splits, ROWS)
    sums = torch.empty((*shape, dim), dtype=torch.float32, device=device)
    stats = torch.empty((*shape, 2), dtype=torch.float32, device=device)
    if static is not None and static.counters().numel() >= count:  # an allocation would outlive a graph's memory
        return sums, stats, static.counters()
    stream = torch.cuda.current_stream(device).cuda_stream
    return sums, stats, _turns(sums.device.index, stream, max(4096, 1 << (count - 1).bit_length()))


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _aligned(exact: ExactKV) -> ExactKV:
    """Rows that 16-byte loads can read, keys and values with the same strides."""
    key, value = exact.key, exact.value
    fits = (
        key.stride() == value.stride() and key.stride(-1) == 1 and all(stride % 8 == 0 for stride in key.stride()[:3])
    )
    if fits and key.data_ptr() % 16 == 0 and value.data_ptr() % 16 == 0:
        return exact
    return ExactKV(key.contiguous(), value.contiguous())
