"""Packing, unpacking and turning on a CUDA device: launchers of ``encode.cu``, ``decode.cu`` and ``rotate.cu``.

Packing and unpacking are one launch each for the keys and values of all sequences, heads and pages. They give exactly
the reference's bytes and numbers; codecs that search for a grid may choose another of the same error, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvloom.codecs import AFFINE, CLIPPED, LLOYD, NUQ, OUT_OF_RANGE
from kvloom.errors import CacheError, KernelError
from kvloom.kernels._base import head_index
from kvloom.kernels._cuda_turns import hadamard_defines, rope_arguments
from kvloom.kernels._nvrtc import ALIGNMENT, ELEMENTS, Defines, is_aligned, module, strides
from kvloom.kernels._points import has_codebook, point_arguments
from kvloom.kernels._turns import Rope
from kvloom.pages import ExactKV, PageLayout, PooledKV, SideLayout, StaticKV

MAX_HEAD_DIM = 256
_BLOCK_TOKENS = 64  # a warp's, in per_channel groups
_MAX_WARPS = 8
_STAGED_BYTES = 96 * 1024  # of a page that is searched for grids: what every device since Ampere has, less some
_ROTATE_WARPS = 4
_CODECS = tuple(codec.name for codec in (AFFINE, CLIPPED, LLOYD, NUQ))


def encode(
    key: torch.Tensor, value: torch.Tensor, layout: PageLayout, flags: torch.Tensor | None = None
) -> torch.Tensor:
    """Pack whole pages.

    Args:
        key: fp32, fp16 or bf16 ``[batch, heads, pages * page_tokens, head_dim]``, any strides.
        value: The same shape and dtype.
        layout: Page layout of these heads.
        flags: See `encode_into`.

    Returns:
        uint8 ``[batch, heads, pages, layout.nbytes]``.

    Raises:
        CacheError: See `encode_into`.
        KernelError: The kernels do not cover this layout or dtype.
        ValueError: The tensors do not fit each other or the layout.
    """
    pages = key.shape[-2] // layout.page_tokens
    out = torch.empty((*key.shape[:-2], pages, layout.nbytes), dtype=torch.uint8, device=key.device)
    encode_into(key, value, layout, out, flags)
    return out


def encode_into(
    key: torch.Tensor, value: torch.Tensor, layout: PageLayout, out: torch.Tensor, flags: torch.Tensor | None = None
) -> None:
    """Pack whole pages into existing storage.

    Args:
        key: fp32, fp16 or bf16 ``[batch, heads, pages * page_tokens, head_dim]``. Channels that are not adjacent and
            rows that do not start at multiples of 16 bytes are copied first.
        value: The same shape and dtype.
        layout: Page layout of these heads.
        out: uint8 ``[batch, heads, pages, layout.nbytes]``, such as a slice of a page store: records are contiguous and
            start at multiples of 16 bytes.
        flags: int32 whose first element becomes 1 if an element to be quantised is NaN, infinite or beyond fp16's
            range, and is never cleared; None checks at once, which waits for the device.

    Raises:
        CacheError: ``flags`` is None and such an element exists; ``out`` then holds meaningless codes.
        KernelError: The kernels do not cover this layout or dtype.
        ValueError: The tensors do not fit each other or the layout.
    """
    _check_states(key, value, layout)
    batch, heads, tokens, _ = key.shape
    pages = tokens // layout.page_tokens
    _check_records(out, (batch, heads, pages), layout, key.device)
    seen = torch.zeros(1, dtype=torch.int32, device=key.device) if flags is None else flags
    if out.numel():
        key, value = _aligned(key), _aligned(value)
        by = [strides(x) for x in (key, value, out)]
        defines, warps, shared = _encode_build(layout, key.dtype, append=False)
        with torch.cuda.device(key.device):
            module("encode.cu", defines).launch(
                "encode_pages",
                (2 * pages, heads, batch),
                (32 * warps, 1, 1),
                key,
                *by[0],
                value,
                *by[1],
                out,
                *by[2],
                seen,
                *point_arguments(layout.key),
                *point_arguments(layout.value),
                shared=shared,
            )
    if flags is None and seen.item():
        raise CacheError(OUT_OF_RANGE)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """`kvloom.codecs.rotated` by the Hadamard transform, in one launch.

    Args:
        x: fp32, fp16 or bf16 ``[batch, heads, tokens, head_dim]``, any strides.

    Returns:
        The same shape and dtype, contiguous.

    Raises:
        KernelError: The kernel cannot be built.
    """
    x = _aligned(x)
    batch, heads, tokens, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        defines = rotate_defines(x.dtype, dim)
        grid = (-(-tokens // (_ROTATE_WARPS * (32 // (dim // 8)))), heads, batch)
        with torch.cuda.device(x.device):
            module("rotate.cu", defines).launch(
                "rotate_states", grid, (32 * _ROTATE_WARPS, 1, 1), x, *strides(x), out, tokens, follows=True
            )
    return out


def rotates(x: torch.Tensor) -> bool:
    """Whether `rotate` takes these states."""
    return x.dtype in ELEMENTS and x.shape[-1] <= MAX_HEAD_DIM and x.shape[-1] % ALIGNMENT == 0


def append(key: torch.Tensor, value: torch.Tensor, kv: StaticKV | PooledKV, rope: Rope | None = None) -> None:
    """Append one token to every sequence, turned, and pack the page that is full with it: a launch for each layout.

    Args:
        key: fp32, fp16 or bf16 ``[batch, kv_heads, 1, head_dim]``, any strides.
        value: The same shape and dtype.
        kv: The layer's cache, changed in place; what goes wrong on the device sets its flags. Exact tokens of a
            `PooledKV` lie at multiples of 16 bytes.
        rope: Of the key, see `kvloom.kernels._cuda_turns.ropes`; None if it has its positions.

    Raises:
        KernelError: The kernels do not cover one of the layouts.
    """
    key, value = _aligned(key), _aligned(value)
    batch, target = len(key), _target(kv, key)
    with torch.cuda.device(key.device):
        for group in kv.pages:
            _check_encoded(group.layout, key.dtype)
            data = group.data if group.kept is None else group.data.expand(batch, len(group.heads), -1, -1)
            defines, warps, shared = _encode_build(
                group.layout, key.dtype, append=True, pooled=bool(target.block_tokens), roped=rope is not None
            )
            module("encode.cu", defines).launch(
                "append_token",
                (2, len(group.heads), batch),
                (32 * warps, 1, 1),
                key,
                *strides(key)[:2],
                value,
                *strides(value)[:2],
                head_index(group.heads, key.device) if len(kv.pages) > 1 else None,
                target.sinks.key,
                target.sinks.value,
                *strides(target.sinks.key),
                target.num_sinks,
                target.ring.key,
                target.ring.value,
                *strides(target.ring.key),
                target.ring.tokens,
                data,
                *strides(data),
                target.table,
                0 if target.table is None else target.table.stride(0),
                target.levels,
                kv.flags,
                kv.filled,
                kv.length,
                int(target.grows and group is kv.pages[-1]),
                None if group.kept is None else group.kept.extents,
                *point_arguments(group.layout.key),
                *point_arguments(group.layout.value),
                *target.block_tokens,
                *rope_arguments(rope),
                shared=shared,
                follows=True,
            )


@dataclass(frozen=True)
class _Target:
    """What a token is appended to.

    Attributes:
        sinks: The sinks; all exact tokens of all blocks where they lie in blocks.
        num_sinks: How many there are.
        ring: The tail; room for the page that is packed where exact tokens lie in blocks.
        table: Of pages.
        levels: Read, and grown in place if ``grows``.
        grows: See ``levels``.
        block_tokens: Exact tokens that a block has room for, where they lie in blocks.
    """

    sinks: ExactKV
    num_sinks: int
    ring: ExactKV
    table: torch.Tensor | None
    levels: torch.Tensor
    grows: bool
    block_tokens: tuple[int, ...]


def _target(kv: StaticKV | PooledKV, key: torch.Tensor) -> _Target:
    if isinstance(kv, StaticKV):
        return _Target(kv.sinks, kv.sinks.tokens, kv.tail, kv.table, kv.state, True, ())
    shape = (*key.shape[:2], kv.page_tokens, key.shape[3])
    page = ExactKV(key.new_empty(shape), key.new_empty(shape))
    return _Target(kv.exact, kv.num_sinks, page, kv.page_table, kv.before, False, (kv.rows.shape[1],))


def decode(
    data: torch.Tensor, layout: PageLayout, dtype: torch.dtype, table: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack whole pages.

    Args:
        data: uint8 ``[batch, heads, pages, layout.nbytes]``, records contiguous; with a table ``[1, heads, records,
            layout.nbytes]``.
        layout: Their layout.
        dtype: fp32, fp16 or bf16, the compute dtype (that of the elements of a passthrough side).
        table: int32 ``[batch, pages]``, which record holds a page; None if in order.

    Returns:
        Keys and values ``[batch, heads, pages * page_tokens, head_dim]`` of ``dtype``, contiguous.

    Raises:
        KernelError: The kernels do not cover this layout or dtype.
        ValueError: ``data`` does not fit the layout.
    """
    _check_supported(layout, dtype)
    data = _aligned(data)
    _check_records(data, tuple(data.shape[:-1]), layout, data.device)
    batch, heads, pages, _ = data.shape
    if table is not None:
        batch, pages = table.shape
    shape = (batch, heads, pages * layout.page_tokens, layout.head_dim)
    key, value = (torch.empty(shape, dtype=dtype, device=data.device) for _ in range(2))
    if key.numel():
        defines, warps, shared = _decode_build(layout, dtype, table is not None)
        with torch.cuda.device(data.device):
            module("decode.cu", defines).launch(
                "decode_pages",
                (2 * pages, heads, batch),
                (32 * warps, 1, 1),
                data,
                *strides(data),
                key,
                value,
                *point_arguments(layout.key),
                *point_arguments(layout.value),
                *(() if table is None else (table, table.stride(0))),
                shared=shared,
            )
    return key, value


# -- what is launched -------------------------------------------------------------------------------------------------


def encode_defines(layout: PageLayout, dtype: torch.dtype, *, append: bool, pooled: bool = False) -> Defines:
    """Macros of ``encode.cu`` that packs pages, or appends a token and packs the page that is full with it."""
    return _encode_build(layout, dtype, append=append, pooled=pooled)[0]


def decode_defines(layout: PageLayout, dtype: torch.dtype, *, tabled: bool) -> Defines:
    """Macros of ``decode.cu``."""
    return _decode_build(layout, dtype, tabled)[0]


@lru_cache(maxsize=1024)
def _encode_build(
    layout: PageLayout, dtype: torch.dtype, *, append: bool, pooled: bool = False, roped: bool = False
) -> tuple[Defines, int, int]:
    """Defines, warps of a block and bytes of shared memory of ``encode.cu``."""
    sides = (layout.key, layout.value)
    tile = 32 if dtype.itemsize == 2 and layout.head_dim % 32 == 0 else 16
    tall = max(_warps_of_a_group(side) for side in sides)
    tiles = layout.head_dim // tile
    warps = tall * _fullest(tiles, range(max(1, 2 // tall), _MAX_WARPS // tall + 1))
    turned = [append and side.fmt.rotation == "hadamard" for side in sides]
    defines = (
        *_defines(layout, dtype, warps),
        ("CHANNEL_TILE", tile),
        ("APPEND", int(append)),
        ("POOLED", int(pooled)),
        ("ROPED", int(roped)),
        *((f"{name}_ROTATED", int(is_turned)) for name, is_turned in zip(("KEY", "VALUE"), turned, strict=True)),
        *((f"{name}_CODEC", side.fmt.codec.upper()) for name, side in zip(("KEY", "VALUE"), sides, strict=True)),
        *(hadamard_defines(layout.head_dim) if any(turned) else ()),
    )
    return defines, warps, max(_encode_bytes(side, dtype, warps, tile) for side in sides)


@lru_cache(maxsize=1024)
def _decode_build(layout: PageLayout, dtype: torch.dtype, tabled: bool) -> tuple[Defines, int, int]:
    """Defines, warps of a block and bytes of shared memory of ``decode.cu``."""
    vectors = layout.page_tokens // 4 * layout.head_dim * dtype.itemsize // 16
    warps = _fullest(-(-vectors // 32), range(4, _MAX_WARPS + 1))
    points = (("KEY_POINTS", has_codebook(layout.key)), ("VALUE_POINTS", has_codebook(layout.value)))
    defines = (*_defines(layout, dtype, warps), *((name, int(value)) for name, value in points), ("TABLE", int(tabled)))
    return defines, warps, max(map(_code_bytes, (layout.key, layout.value)))


@lru_cache(maxsize=64)
def rotate_defines(dtype: torch.dtype, head_dim: int) -> Defines:
    """Macros of ``rotate.cu``."""
    own = (("HEAD_DIM", head_dim), ("ELEMENT", ELEMENTS[dtype]), ("WARPS", _ROTATE_WARPS))
    return *own, *hadamard_defines(head_dim)


def _fullest(tiles: int, counts: range) -> int:
    """How many workers are least idle over ``tiles`` tasks, dealt in rounds; the most of those."""
    return max(counts, key=lambda count: (tiles / (-(-tiles // count) * count), count))


def _is_per_channel(side: SideLayout) -> bool:
    return side.fmt.grouping == "per_channel" and not side.fmt.is_passthrough


def _warps_of_a_group(side: SideLayout) -> int:
    return max(1, side.fmt.group_size // _BLOCK_TOKENS) if _is_per_channel(side) else 1


def _code_bytes(side: SideLayout) -> int:
    """A byte a code and four of padding a row (``PITCH``)."""
    return 0 if side.fmt.is_passthrough else side.planes[0].rows * (side.planes[0].cols + 4)


def _encode_bytes(side: SideLayout, dtype: torch.dtype, warps: int, tile: int) -> int:
    return _code_bytes(side) + (
        _staged_bytes(side, dtype) if _is_searched(side) else _reduction_bytes(side, warps, tile)
    )


def _is_searched(side: SideLayout) -> bool:
    return not side.fmt.is_passthrough and side.fmt.codec != AFFINE.name


def _staged_bytes(side: SideLayout, dtype: torch.dtype) -> int:
    """The page's elements, 16 bytes of padding a token."""
    return side.page_tokens * (side.head_dim * dtype.itemsize + 16)


def _reduction_bytes(side: SideLayout, warps: int, tile: int) -> int:
    """Two vectors of extremes a thread, and three floats a group of the block's tokens and channels."""
    return 1024 * warps + _BLOCK_TOKENS * tile * warps // side.fmt.group_size * 12 if _is_per_channel(side) else 0


def _defines(layout: PageLayout, dtype: torch.dtype, warps: int) -> Defines:
    return (
        ("PAGE_TOKENS", layout.page_tokens),
        ("HEAD_DIM", layout.head_dim),
        ("ELEMENT", ELEMENTS[dtype]),
        ("WARPS", warps),
        ("VALUE_OFFSET", layout.value.offset),
        *_side_defines("KEY", layout.key),
        *_side_defines("VALUE", layout.value),
    )


def _side_defines(name: str, side: SideLayout) -> Defines:
    tiles = [plane.tiles_per_chunk for plane in side.planes] + [1, 1]
    return (
        (f"{name}_BITS", side.fmt.bits),
        (f"{name}_LOW_BITS", side.planes[0].bits if side.planes else side.fmt.bits),
        (f"{name}_LOW_TILES", tiles[0]),
        (f"{name}_HIGH_TILES", tiles[1]),
        (f"{name}_PER_CHANNEL", int(side.fmt.grouping == "per_channel")),
        (f"{name}_GROUP", side.fmt.group_size),
        (f"{name}_SYMMETRIC", int(side.fmt.symmetric)),
    )


# -- what is refused --------------------------------------------------------------------------------------------------


def encodes(layout: PageLayout, dtype: torch.dtype) -> bool:
    """Whether the encoder takes this layout and dtype."""
    return _passes(_check_encoded, layout, dtype)


def decodes(layout: PageLayout, dtype: torch.dtype) -> bool:
    """Whether the decoder takes this layout and dtype."""
    return _passes(_check_supported, layout, dtype)


def _passes(check: Callable[[PageLayout, torch.dtype], None], layout: PageLayout, dtype: torch.dtype) -> bool:
    try:
        check(layout, dtype)
    except KernelError:
        return False
    return True


def _check_supported(layout: PageLayout, dtype: torch.dtype) -> None:
    if dtype not in ELEMENTS:
        raise KernelError(f"the CUDA page kernels take fp32, fp16 and bf16, not {dtype}")
    if layout.head_dim > MAX_HEAD_DIM or layout.page_tokens % _BLOCK_TOKENS:
        raise KernelError(
            f"the CUDA page kernels take head_dim up to {MAX_HEAD_DIM} and pages of whole {_BLOCK_TOKENS} tokens, not "
            f"{layout.head_dim} and {layout.page_tokens}"
        )
    for side in (layout.key, layout.value):
        _check_side(side, dtype)


def _check_side(side: SideLayout, dtype: torch.dtype) -> None:
    if side.fmt.is_passthrough:
        if side.nbytes != side.page_tokens * side.head_dim * dtype.itemsize:
            raise KernelError(f"the page layout keeps {side.role}s in another compute dtype than {dtype}")
    elif side.fmt.form == "opaque" or side.fmt.group_size % 16:
        raise KernelError(
            f"the CUDA page kernels take codecs of affine and codebook form in groups of whole 16 elements, not "
            f"{side.fmt.codec!r} in groups of {side.fmt.group_size}"
        )


def _check_encoded(layout: PageLayout, dtype: torch.dtype) -> None:
    _check_supported(layout, dtype)
    for side in (layout.key, layout.value):
        if side.fmt.is_passthrough:
            continue
        if side.fmt.codec not in _CODECS:
            raise KernelError(f"the CUDA encoder knows the codecs {', '.join(_CODECS)}, not {side.fmt.codec!r}")
        if _is_searched(side) and _code_bytes(side) + _staged_bytes(side, dtype) > _STAGED_BYTES:
            raise KernelError(
                f"the CUDA encoder searches for the grids of {_STAGED_BYTES} bytes, fewer than a page of "
                f"{side.page_tokens} tokens"
            )


def _check_states(key: torch.Tensor, value: torch.Tensor, layout: PageLayout) -> None:
    _check_encoded(layout, key.dtype)
    if key.shape != value.shape or key.dtype != value.dtype or key.device != value.device:
        raise ValueError(f"keys {_said(key)} and values {_said(value)} differ")
    if key.dim() != 4 or key.shape[3] != layout.head_dim or key.shape[2] % layout.page_tokens:
        raise ValueError(
            f"keys and values {_said(key)} are not [batch, heads, whole pages of {layout.page_tokens} tokens, "
            f"{layout.head_dim}]"
        )


def _check_records(data: torch.Tensor, lead: tuple[int, ...], layout: PageLayout, device: torch.device) -> None:
    expected = (*lead, layout.nbytes)
    if len(expected) != 4 or data.shape != expected or data.dtype != torch.uint8 or data.device != device:
        raise ValueError(f"page records {_said(data)} are not uint8 {list(expected)} on {device}")
    if not is_aligned(data):
        raise ValueError(f"page records are not contiguous at multiples of {ALIGNMENT} bytes")


def _said(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def _aligned(x: torch.Tensor) -> torch.Tensor:
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
