"""The CUDA backend: kernels written for the page format, compiled at first use (see `kvloom.kernels._nvrtc`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeVar, Unpack

import torch

from kvloom.errors import KernelError
from kvloom.kernels import _cuda_pages, _cuda_products, _cuda_sums, _nvrtc
from kvloom.kernels._base import AttendOptions, Backend, head_index, rows_of_a_head
from kvloom.kernels._cuda_pages import MAX_HEAD_DIM
from kvloom.kernels._nvrtc import Defines
from kvloom.kernels._points import has_codebook, point_arguments
from kvloom.kernels._torch import TORCH, TorchBackend
from kvloom.pages import ExactKV, HeadPages, PagedKV, PageLayout, PooledKV, SideLayout, StaticKV

# movmatrix, redux and cp.async: Ampere and later.
MIN_CAPABILITY = (8, 0)
ROWS = 8  # query rows of one block, the N of the matrix instruction
STAGES = 2  # pages of a warp in shared memory, as in attend.cu
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

    def append(self, key: torch.Tensor, value: torch.Tensor, kv: StaticKV) -> None:
        """See `Backend.append`."""
        if not self.is_graph_safe([group.layout for group in kv.pages], key.dtype):
            return super().append(key, value, kv)
        return self._unless_broken(
            lambda: _cuda_pages.append(key, value, kv), lambda other: other.append(key, value, kv)
        )

    def attend_static(self, query: torch.Tensor, kv: StaticKV, **options: Unpack[AttendOptions]) -> torch.Tensor:
        """See `Backend.attend_static`."""
        if not _served(query, kv, options.get("mask"), self._shared):
            return super().attend_static(query, kv, **options)
        return self._unless_broken(
            lambda: attend_pages(query, kv, **options)[0], lambda other: other.attend_static(query, kv, **options)
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
            lambda: attend_pages(query, kv, out=out, **options)[0],
            lambda other: other.attend_pooled(query, kv, out, **options),
        )

    def _pools(self, kv: PooledKV) -> bool:
        """Whether the kernels read and write such blocks in place."""
        exact = kv.exact
        is_graph_safe = self.is_graph_safe([group.layout for group in kv.pages], exact.key.dtype)
        return is_graph_safe and _aligned(exact) is exact

    def products(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Backend.products`."""
        if not _cuda_products.multiplies(x, weights):
            return super().products(x, weights)
        return self._unless_broken(
            lambda: _cuda_products.products(x, weights), lambda other: other.products(x, weights)
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

    Returns:
        ``[batch, queries, query_heads, head_dim]`` in the query's dtype, and the natural log-sum-exp of the scores,
        fp32 ``[batch, query_heads, queries]``, or None.
    """
    query = _last_contiguous(query)
    batch, query_heads, queries, dim = query.shape
    if out is None:
        out = query.new_empty((batch, queries, query_heads, dim))
    sums = query.new_empty((batch, query_heads, queries), dtype=torch.float32) if lse else None
    if mask is not None:
        mask = _last_contiguous(mask.expand(batch, -1, -1, -1))
    logits = None if sink_logits is None else sink_logits.float()
    exact = _exact_of(kv)
    static = None if isinstance(kv, PagedKV) else kv
    for group in kv.pages:
        launch = _launch(group, query, kv, exact, mask, softcap is not None)
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
            shared=launch.shared,
            cluster=launch.cluster,
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
    capped: bool,
) -> _Launch:
    row_tiles = -(-rows_of_a_head(query, kv) // ROWS)
    device = query.device.index
    tiles, pages = query.shape[0] * len(group.heads) * row_tiles, _pages_of_a_head(group, kv)
    each = -(-tiles // _multiprocessors(device)), tiles * pages // _multiprocessors(device)
    warps = block_warps(group.layout, *each, _nvrtc.shared_limit(device))
    units = pages + -(-exact.num_sinks // 16) + -(-exact.num_tail // 16)
    splits = max(1, min(_multiprocessors(device) // tiles, -(-units // warps)))
    masked = 1 if query.shape[2] > 1 else 0 if mask is None else 2
    pooled = isinstance(kv, PooledKV)
    place = 0 if mask is None or isinstance(kv, PooledKV) or kv.places is None else kv.places.itemsize
    kernel = (group.layout, warps, query.dtype == torch.bfloat16, masked, capped, place, pooled)
    shared = _shared_bytes(group.layout, warps)
    if _merges_in_cluster(kernel, splits, tiles, shared, device):
        return _Launch(
            _nvrtc.module("attend.cu", attend_defines(*kernel, True)), warps, splits, row_tiles, shared, splits
        )
    shared = max(shared, ROWS * 4 * splits)
    return _Launch(_nvrtc.module("attend.cu", attend_defines(*kernel, False)), warps, splits, row_tiles, shared, 0)


def _pages_of_a_head(group: HeadPages, kv: PagedKV | StaticKV | PooledKV) -> int:
    return kv.num_pages if group.kept is None else group.mean_pages(kv.shape[0])


@lru_cache(maxsize=1024)
def _merges_in_cluster(
    kernel: tuple[PageLayout, int, bool, int, bool, int, bool], splits: int, tiles: int, shared: int, device: int
) -> bool:
    """Whether the splits of a row tile can be one cluster, and all clusters run at the same time.

    A cluster lies within one group of multiprocessors, whose sizes are no multiples of every cluster's: 32 clusters of
    4 blocks need not fit on 132 multiprocessors, and the last ones would double the time of all.
    """
    if torch.cuda.get_device_capability(device) < (9, 0) or splits > _MAX_CLUSTER:
        return False
    if splits == 1:
        return True
    module = _nvrtc.module("attend.cu", attend_defines(*kernel, True))
    return module.active_clusters("attend", splits, 32 * kernel[1], shared) >= tiles


_MAX_CLUSTER = 16


@lru_cache(maxsize=1024)
def block_warps(layout: PageLayout, tiles: int, pages: int, shared_limit: int) -> int:
    """Warps of a block as they are fastest on an H100 (benchmarks/LOG.md).

    A multiprocessor that reads one row tile has one block. One that reads several has as many small blocks side by side
    as make eight warps: while one of them begins or merges, the others load.

    Args:
        layout: Of the pages.
        tiles: Row tiles that a multiprocessor reads, rounded up.
        pages: That it reads for all of them.
        shared_limit: Bytes of shared memory that a block may have.

    Returns:
        12, 8, 4, 2 or 1; or 0 where not even one warp's pages fit.
    """
    most = _lone_warps(layout, pages) if tiles <= 1 else _shared_warps(tiles, pages)
    return next((n for n in (12, 8, 4, 2, 1) if n <= most and _shared_bytes(layout, n) <= shared_limit), 0)


def _lone_warps(layout: PageLayout, pages: int) -> int:
    return 12 if pages >= _BULK_PAGES and _is_small(layout) else 8 if pages >= _BUSY_PAGES else 4


_BUSY_PAGES, _BULK_PAGES = 2, 160


def _shared_warps(tiles: int, pages: int) -> int:
    if tiles > _MANY_TILES and pages >= tiles * _MANY_PAGES:
        return 2
    return 4 if tiles <= 2 else 2 if tiles <= 4 else 1


_MANY_TILES, _MANY_PAGES = 16, 16


def _is_small(layout: PageLayout) -> bool:
    """Whether a warp needs so few bytes on their way, and so few registers, that twelve are better than eight."""
    looks_up = has_codebook(layout.key) or has_codebook(layout.value)
    return layout.nbytes <= _SMALL_PAGE and layout.head_dim <= _SMALL_HEAD_DIM and not looks_up


_SMALL_PAGE, _SMALL_HEAD_DIM = 8 << 10, 128


@lru_cache(maxsize=1024)
def attend_defines(
    layout: PageLayout, warps: int, bf16: bool, masked: int, capped: bool, place: int, pooled: bool, clustered: bool
) -> Defines:
    """Macros of ``attend.cu`` for a layout; ``masked``, ``place`` and ``pooled`` as there."""
    key, value = layout.key, layout.value
    numbers = {
        "D": layout.head_dim,
        "P": layout.page_tokens,
        **dict(zip(("KB0", "KB1"), _plane_bits(key), strict=True)),
        **dict(zip(("VB0", "VB1"), _plane_bits(value), strict=True)),
        "KGROUPS": _groups(key),
        "VGROUPS": _groups(value),
        "KSYM": key.fmt.symmetric,
        "VSYM": value.fmt.symmetric,
        "KPOINTS": has_codebook(key),
        "VPOINTS": has_codebook(value),
        "KTOK": key.fmt.grouping == "per_token",
        "VCH": value.fmt.grouping == "per_channel",
        "BF16": bf16,
        "MASKED": masked,
        "PLACE": place,
        "POOLED": pooled,
        "SOFTCAP": capped,
        "WARPS": warps,
        "CLUSTER": clustered,
    }
    return tuple((name, int(number)) for name, number in numbers.items())


def _plane_bits(side: SideLayout) -> tuple[int, int]:
    if side.fmt.is_passthrough:
        return 16, 0
    low, high = (*(plane.bits for plane in side.planes), 0)[:2]
    return low, high


def _groups(side: SideLayout) -> int:
    return 1 if side.fmt.is_passthrough else side.groups


def _shared_bytes(layout: PageLayout, warps: int) -> int:
    """The rings, or what merging the warps needs in their place; then what the blocks of a cluster send each other."""
    ring = max(STAGES * layout.nbytes, (STAGES - 1) * layout.nbytes + 32 * layout.head_dim)
    merge = warps * ROWS * (layout.head_dim + 4 + 2) * 4
    landing = ROWS * layout.head_dim * 4 + _MAX_CLUSTER * (ROWS * 8 + 16)
    return max(warps * ring, merge) + landing


@lru_cache(maxsize=16)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
