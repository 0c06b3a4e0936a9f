"""The Triton backend: the portable way to read packed pages on a GPU.

`attend` splits the pages of a KV head over programs that serve all its query rows at once, and combines their partial
softmaxes; sinks and tail are splits of their own. Nothing waits for the device, and the number of splits follows from
how many pages there are room for, so that CUDA graphs hold.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Unpack

import torch

from kvloom._extras import pip_command
from kvloom.codecs import AFFINE
from kvloom.errors import KernelError
from kvloom.kernels._base import AttendOptions, head_index, rows_of_a_head
from kvloom.kernels._torch import TorchBackend
from kvloom.kernels._triton_tiles import MIN_COLUMNS, SideTile, next_power, row_tile, side_tile
from kvloom.pages import (
    ExactKV,
    PagedKV,
    PageLayout,
    SideLayout,
    StaticKV,
    codebook_points,
    pack_side,
    records_of,
    unpack_raw,
)

# More rows are served by a matrix product over decoded pages.
MAX_ROWS = 64
# Products in fp32 keep their operands in shared memory, which wider heads would fill.
MAX_HEAD_DIM = {2: 256, 4: 128}
PAGE_TOKENS = (64, 128)
# What fits on a multiprocessor at about 128 registers a thread.
_PROGRAMS_PER_PROCESSOR = 4
_EXACT_TOKENS = 256
_WARPS = 4
# Records that are staged in shared memory a page ahead; more, and the smallest GPUs' shared memory does not hold them.
_STAGED_BYTES = 24 << 10
# Elements of the block that one program of an encoder or decoder holds.
_BLOCK = 2048
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class TritonBackend(TorchBackend):
    """Attention, packing and unpacking in Triton; what the kernels do not cover goes to the reference.

    Raises:
        KernelError: Triton is not installed.
    """

    name = "triton"

    def __init__(self) -> None:
        self._attend_kernels = _kernels("kvloom.kernels._triton_attend")
        self._page_kernels = _kernels("kvloom.kernels._triton_pages")

    def encode(
        self, key: torch.Tensor, value: torch.Tensor, layout: PageLayout, flags: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Backend.encode`."""
        if key.dtype not in _DTYPES or not _is_covering(layout) or key.numel() == 0:
            return super().encode(key, value, layout)
        pages = key.shape[2] // layout.page_tokens
        data = torch.empty((*key.shape[:2], pages, layout.nbytes), dtype=torch.uint8, device=key.device)
        flag = torch.zeros(1, dtype=torch.int32, device=key.device) if flags is None else flags
        with torch.cuda.device_of(key):
            for x, side in ((key, layout.key), (value, layout.value)):
                self._encode_side(x, side, data, flag)
        if flags is None and flag.item():
            return super().encode(key, value, layout)  # says what is wrong
        return data

    def _encode_side(self, x: torch.Tensor, side: SideLayout, data: torch.Tensor, flag: torch.Tensor) -> None:
        pages = data.shape[2]
        if side.fmt.is_passthrough:
            raw = pack_side(x.unflatten(-2, (pages, side.page_tokens)), (), side)
            data[..., side.offset : side.offset + side.nbytes] = raw
            return
        x = x if x.stride(-1) == 1 else x.contiguous()
        tile = side_tile(side)
        tokens, channels, blocks = _params_block(tile)
        strides = (*x.stride()[:3], *data.stride()[:3])
        self._page_kernels.encode_params[(pages * tile.real_groups * blocks, x.shape[1], x.shape[0])](
            x, data, flag, *strides, tile, tokens, channels, blocks
        )
        for index, plane in enumerate(tile.planes):
            units = _BLOCK // plane.fields
            blocks = -(-plane.units // units)
            self._page_kernels.encode_plane[(pages * blocks, x.shape[1], x.shape[0])](
                x, data, *strides, tile, index, units
            )

    def decode(
        self, data: torch.Tensor, layout: PageLayout, dtype: torch.dtype, table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.decode`."""
        if dtype not in _DTYPES or not layout.is_readable or data.numel() == 0:
            return super().decode(data, layout, dtype, table)
        with torch.cuda.device_of(data):
            key, value = (self._decode_side(data, side, dtype, table) for side in (layout.key, layout.value))
        return key, value

    def _decode_side(
        self, data: torch.Tensor, side: SideLayout, dtype: torch.dtype, table: torch.Tensor | None
    ) -> torch.Tensor:
        if side.fmt.is_passthrough:
            return unpack_raw(data if table is None else records_of(data, table), side, dtype).flatten(2, 3)
        batch, heads, pages, _ = data.shape
        if table is not None:
            batch, pages = table.shape
        tokens = pages * side.page_tokens
        channels = next_power(side.head_dim)
        out = torch.empty((batch, heads, tokens, side.head_dim), dtype=dtype, device=data.device)
        block = min(side.page_tokens, _BLOCK // channels)
        self._page_kernels.decode_side[(tokens // block, heads, batch)](
            *(out, data, _points(side, data), data if table is None else table),
            *_broadcast_strides(data)[:3],
            0 if table is None else table.stride(0),
            *(tokens, side_tile(side), heads, block, channels, table is not None),
        )
        return out

    def attend(self, query: torch.Tensor, kv: PagedKV, **options: Unpack[AttendOptions]) -> torch.Tensor:
        """See `Backend.attend`."""
        if not _serves(query, kv):
            return super().attend(query, kv, **options)
        return self._attend_pages(query, kv, **options)

    def _attend_static(self, query: torch.Tensor, kv: StaticKV, **options: Unpack[AttendOptions]) -> torch.Tensor:
        if not _serves(query, kv):
            return super()._attend_static(query, kv, **options)
        return self._attend_pages(query, kv, **options)

    def _attend_pages(
        self, query: torch.Tensor, kv: PagedKV | StaticKV, **options: Unpack[AttendOptions]
    ) -> torch.Tensor:
        query = query if query.stride(-1) == 1 else query.contiguous()
        scaling, mask, softcap = options["scaling"], options.get("mask"), options.get("softcap")
        with torch.cuda.device_of(query):
            partial, stats = self._attend_splits(query, kv, scaling, mask, softcap)
            return self._combine(query, partial, stats, options.get("sink_logits"))

    def _attend_splits(
        self,
        query: torch.Tensor,
        kv: PagedKV | StaticKV,
        scaling: float,
        mask: torch.Tensor | None,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``attend_split`` writes."""
        batch, query_heads, queries, head_dim = query.shape
        kv_heads = kv.shape[1]
        group = query_heads // kv_heads
        rows = group * queries
        padded = next_power(max(rows, MIN_COLUMNS))
        share, page_splits, splits = _splits(kv)
        partial = query.new_empty((batch, kv_heads, splits, padded, head_dim), dtype=torch.float32)
        stats = query.new_empty((batch, kv_heads, splits, 2, padded), dtype=torch.float32)
        sinks, tail = _rows(kv.sinks), _rows(kv.tail)
        is_bool = mask is not None and mask.dtype == torch.bool
        mask_strides = (0, 0, 0, 0) if mask is None else _broadcast_strides(mask)
        has_places = mask is not None and kv.places is not None
        exact_places = kv.places if kv.places is not None else query
        sizes = (kv.length, kv.sinks.tokens, kv.tail.tokens, kv.num_pages, share, page_splits, _EXACT_TOKENS, splits)
        for pages in kv.pages:
            columns = row_tile(pages.layout, rows)
            kept = pages.kept
            extents, of_pages = (query, query) if kept is None else (kept.extents, kept.places)
            self._attend_kernels.attend_split[(splits, len(pages.heads) * -(-rows // columns), batch)](
                *(partial, stats, query, pages.data),
                *(_points(side, pages.data) for side in (pages.layout.key, pages.layout.value)),
                *(head_index(pages.heads, kv.device), sinks.key, sinks.value, tail.key, tail.value),
                kv.visible if isinstance(kv, PagedKV) else query,
                query if mask is None else mask.view(torch.uint8) if is_bool else mask,
                *(extents, of_pages, exact_places),
                query if kv.table is None else kv.table,
                kv.state if isinstance(kv, StaticKV) else query,
                *query.stride()[:3],
                *_broadcast_strides(pages.data)[:3],
                *sinks.key.stride()[:3],
                *tail.key.stride()[:3],
                0 if kv.table is None else kv.table.stride(0),
                *mask_strides,
                *_broadcast_strides(of_pages)[:2],
                *exact_places.stride()[:2],
                *sizes,
                scaling,
                softcap or 0.0,
                KEY=side_tile(pages.layout.key),
                VALUE=side_tile(pages.layout.value),
                DTYPE=getattr(self._attend_kernels.tl, _DTYPES[query.dtype]),
                KV_HEADS=kv_heads,
                HEADS=group,
                QUERIES=queries,
                N=columns,
                PADDED_ROWS=padded,
                HAS_SOFTCAP=softcap is not None,
                HAS_READS=queries > 1 or mask is not None,
                HAS_MASK=mask is not None,
                IS_BOOL=is_bool,
                HAS_EXTENTS=kept is not None,
                HAS_PLACES=has_places,
                HAS_TABLE=kv.table is not None,
                HAS_STATE=isinstance(kv, StaticKV),
                STAGES=_stages(pages.layout, query.dtype),
                num_warps=_WARPS,
            )
        return partial, stats

    def _combine(
        self, query: torch.Tensor, partial: torch.Tensor, stats: torch.Tensor, sink_logits: torch.Tensor | None
    ) -> torch.Tensor:
        batch, query_heads, queries, head_dim = query.shape
        kv_heads, splits, padded = partial.shape[1:4]
        out = query.new_empty((batch, queries, query_heads, head_dim))
        self._attend_kernels.combine_splits[(query_heads // kv_heads * queries, kv_heads, batch)](
            *(out, partial, stats, query if sink_logits is None else sink_logits, splits),
            KV_HEADS=kv_heads,
            HEADS=query_heads // kv_heads,
            QUERIES=queries,
            PADDED_ROWS=padded,
            HEAD_DIM=head_dim,
            HEAD_DIM_PAD=next_power(head_dim),
            SPLITS=next_power(splits),
            HAS_SINK=sink_logits is not None,
        )
        return out


def _points(side: SideLayout, data: torch.Tensor) -> torch.Tensor:
    """The codebook of a side on the device of its pages; anything there if it has none."""
    return codebook_points(side.fmt.points, data.device) if side.fmt.form == "codebook" else data


def _params_block(tile: SideTile) -> tuple[int, int, int]:
    """Tokens and channels of a program of ``encode_params``, and how many blocks a group has."""
    if tile.per_channel:
        channels = min(next_power(tile.head_dim), _BLOCK // tile.group_size)
        return tile.group_size, channels, -(-tile.head_dim // channels)
    channels = next_power(tile.group_size)
    tokens = min(tile.tokens, _BLOCK // channels)
    return tokens, channels, tile.tokens // tokens


def _kernels(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise KernelError(f"triton is not installed: {pip_command('gpu')}") from error


def _is_covering(layout: PageLayout) -> bool:
    """Whether the encoders, which know one way to choose a grid, serve both sides."""
    formats = (layout.key.fmt, layout.value.fmt)
    return layout.is_readable and all(fmt.is_passthrough or fmt.codec == AFFINE.name for fmt in formats)


def _rows(exact: ExactKV) -> ExactKV:
    """Tokens whose channels are adjacent, keys and values with the same strides."""
    key, value = exact.key, exact.value
    if key.stride() == value.stride() and key.stride(-1) == 1:
        return exact
    return ExactKV(key.contiguous(), value.contiguous())


def _serves(query: torch.Tensor, kv: PagedKV | StaticKV) -> bool:
    """Whether the kernels cover this case."""
    return (
        (isinstance(kv, StaticKV) or kv.has_pages)
        and query.dtype == kv.dtype
        and kv.dtype in _DTYPES
        and kv.page_tokens in PAGE_TOKENS
        and rows_of_a_head(query, kv) <= MAX_ROWS
        and query.shape[3] <= MAX_HEAD_DIM[kv.dtype.itemsize]
        and all(group.layout.is_readable for group in kv.pages)
    )


def _splits(kv: PagedKV | StaticKV) -> tuple[int, int, int]:
    """Pages of a split, splits of pages, and all splits, those of the exact tokens included."""
    batch, heads = kv.shape[:2]
    wanted = _PROGRAMS_PER_PROCESSOR * _processors(kv.device) // (batch * heads)
    pages = max(kv.num_pages, 1)
    if kv.table is None:
        pages = max(pages, *(group.mean_pages(batch) for group in kv.pages))
    share = -(-pages // max(1, wanted))
    page_splits = -(-pages // share)
    return share, page_splits, page_splits + max(1, -(-kv.tail.tokens // _EXACT_TOKENS))


def _stages(layout: PageLayout, dtype: torch.dtype) -> int:
    """Depth of the software pipeline; fields gathered one by one, and fp32, take too much room to be staged."""
    planes = side_tile(layout.key).planes + side_tile(layout.value).planes
    is_small = layout.nbytes <= _STAGED_BYTES and dtype.itemsize == 2
    return 2 if is_small and all(plane.is_flat for plane in planes) else 1


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one on the CPU, where Triton interprets."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _broadcast_strides(mask: torch.Tensor) -> tuple[int, ...]:
    """Strides of a mask, zero along axes that hold one entry for all."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True))
