# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""Triton kernels of decode attention over packed pages: partial softmax by split, and their combination.

Matrices stand as in the page: the codes are the left operand, ``[tokens, channels]`` or ``[channels, tokens]``, and
what moves, Q or P, is the right one, a column for every query row of one KV head.

A page goes from shared memory to the registers of the matrix unit without a shuffle, because the contraction axis is
never put in natural order. With the pair, thread and half of `kvloom.pages`' fragment order, its index ``k`` has the
bits ``[pair >> 1][t: 2][pair & 1][h: 1]``, which is how Triton lays out an operand of 16-bit numbers made by joins
(two neighbouring pairs a lane). Q is loaded in that order and P put into it.

Codes are not converted for half precision. A field left where it is in the low byte of a 16-bit unit *is* the fp16
subnormal ``code * 2**place * 2**-24``; the places fold into the moving operand, 2**-24 into the result. Both halves of
a word are masked at once, which LLVM keeps so only if they are taken apart last (`_flat_fields`). Codes of a codebook
are put together and replaced by their points, one load an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# P times a scale is moved below this power of two: with the weight of a second plane it stays within fp16.
TOP = tl.constexpr(11)


@triton.jit
def _power(exponent):
    """``2.0 ** exponent`` exactly, for int32 exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(x):
    """Exponent of positive fp32 ``x``: ``2**e <= x < 2**(e+1)``; -127 for zero."""
    return (x.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _channel(k, SIDE: tl.constexpr):
    """Natural channel of contraction index ``k`` of the keys; ``head_dim`` where there is none."""
    within = k // 16 * 4 + k % 4
    channel = k // 4 % 4 * (SIDE.head_dim // 4) + within
    return tl.where(within < SIDE.head_dim // 4, channel, SIDE.head_dim)


@triton.jit
def _by_token(x, SIDE: tl.constexpr):
    """``x [tokens, n]`` by contraction index of the values."""
    x = tl.reshape(x, (SIDE.cols // 16, 2, 4, 2, x.shape[1]))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3, 4)), (SIDE.cols, x.shape[4]))


@triton.jit
def _two_fields(words, PLANE: tl.constexpr, FIRST: tl.constexpr):
    """Fields ``FIRST`` and ``FIRST + fields / 2`` of both halves of words, in place in the low byte of the half."""
    MASK: tl.constexpr = PLANE.mask * 2 ** (FIRST * PLANE.bits) * 0x00010001
    return tl.join(words & MASK, (words >> 8) & MASK)


@triton.jit
def _four_fields(words, PLANE: tl.constexpr, FIRST: tl.constexpr):
    STEP: tl.constexpr = PLANE.fields // 4
    return tl.join(_two_fields(words, PLANE, FIRST), _two_fields(words, PLANE, FIRST + STEP))


@triton.jit
def _eight_fields(words, PLANE: tl.constexpr, FIRST: tl.constexpr):
    STEP: tl.constexpr = PLANE.fields // 8
    return tl.join(_four_fields(words, PLANE, FIRST), _four_fields(words, PLANE, FIRST + STEP))


@triton.jit
def _fields(words, PLANE: tl.constexpr):
    """All fields of words in order, along new last axes of two."""
    if PLANE.fields == 2:
        out = _two_fields(words, PLANE, 0)
    elif PLANE.fields == 4:
        out = _four_fields(words, PLANE, 0)
    elif PLANE.fields == 8:
        out = _eight_fields(words, PLANE, 0)
    else:
        out = tl.join(_eight_fields(words, PLANE, 0), _eight_fields(words, PLANE, 1))
    return out


@triton.jit
def _flat_fields(page, PLANE: tl.constexpr, SIDE: tl.constexpr):
    """Fields in place, int16 ``[rows, cols]``: one load of the whole plane, then only index bits change places."""
    word = tl.arange(0, PLANE.units // 2)
    words = tl.load((page + PLANE.offset).to(tl.pointer_type(tl.int32)) + word)
    fields = _fields(words, PLANE)
    fields = tl.join(fields.to(tl.int16), (fields >> 16).to(tl.int16))
    fields = tl.reshape(fields, (PLANE.chunks, 32, PLANE.words, PLANE.fields, 2))
    fields = tl.permute(fields, (0, 2, 3, 1, 4))
    fields = tl.reshape(fields, (PLANE.chunks * PLANE.chunk_tiles * 2, PLANE.pairs // 2, 2, 8, 4, 2))
    return tl.reshape(tl.permute(fields, (0, 3, 1, 4, 2, 5)), (SIDE.rows, SIDE.cols))


@triton.jit
def _pair(k):
    """Pair of columns of contraction index ``k``."""
    return k // 16 * 2 + k // 2 % 2


@triton.jit
def unit_and_place(row, pair, t, h, PLANE: tl.constexpr):
    """Which 16-bit unit of a plane holds ``row`` and the column of a pair, thread and half, and at which bit."""
    tile = row // 16
    sequence = (tile % PLANE.chunk_tiles * 2 + row % 16 // 8) * PLANE.pairs + pair
    word = (tile // PLANE.chunk_tiles * 32 + row % 8 * 4 + t) * PLANE.words + sequence // PLANE.fields
    return word * 2 + h, sequence % PLANE.fields * PLANE.bits


@triton.jit
def _gathered_fields(page, PLANE: tl.constexpr, SIDE: tl.constexpr):
    """Fields moved to bit 0, int16 ``[rows, cols]``, one load an element."""
    row = tl.arange(0, SIDE.rows)[:, None]
    k = tl.arange(0, SIDE.cols)[None, :]
    unit, place = unit_and_place(row, _pair(k), k // 4 % 4, k % 2, PLANE)
    valid = (row < SIDE.real_rows) & (_pair(k) < PLANE.pairs)
    units = tl.load((page + PLANE.offset).to(tl.pointer_type(tl.int16)) + unit, mask=valid, other=0)
    return ((units.to(tl.int32) >> place) & PLANE.mask).to(tl.int16)


@triton.jit
def _plane_product(page, moving, SIDE: tl.constexpr, INDEX: tl.constexpr, HALF: tl.constexpr):
    PLANE: tl.constexpr = SIDE.planes[INDEX]
    k = tl.arange(0, SIDE.cols)
    if PLANE.is_flat:
        fields = _flat_fields(page, PLANE, SIDE)
        weight = _power(PLANE.shift - _pair(k) % PLANE.fields * PLANE.bits % 8)
    else:
        fields = _gathered_fields(page, PLANE, SIDE)
        weight = _power(PLANE.shift + 0 * k)
    moving = (moving if SIDE.is_key else _by_token(moving, SIDE)) * weight[:, None]
    if HALF:
        out = tl.dot(fields.to(tl.float16, bitcast=True), moving.to(tl.float16))
    else:
        out = tl.dot(fields.to(tl.float32), moving, input_precision="ieee")
    return out


@triton.jit
def _part_of_codes(page, SIDE: tl.constexpr, INDEX: tl.constexpr):
    """One plane's part of the codes, int16 ``[rows, cols]``."""
    PLANE: tl.constexpr = SIDE.planes[INDEX]
    if PLANE.is_flat:
        place = _pair(tl.arange(0, SIDE.cols)) % PLANE.fields * PLANE.bits % 8
        fields = _flat_fields(page, PLANE, SIDE) >> place.to(tl.int16)[None, :]
    else:
        fields = _gathered_fields(page, PLANE, SIDE)
    return fields << PLANE.shift


@triton.jit
def _point_product(page, points, moving, SIDE: tl.constexpr, HALF: tl.constexpr):
    codes = _part_of_codes(page, SIDE, 0)
    if SIDE.num_planes == 2:
        codes |= _part_of_codes(page, SIDE, 1)
    matrix = tl.load(points + codes.to(tl.int32))
    moving = moving if SIDE.is_key else _by_token(moving, SIDE)
    if HALF:
        out = tl.dot(matrix, moving.to(tl.float16))
    else:
        out = tl.dot(matrix.to(tl.float32), moving, input_precision="ieee")
    return out


@triton.jit
def _product(page, points, moving, SIDE: tl.constexpr, HALF: tl.constexpr):
    """Codes, or their points, times ``moving`` fp32 ``[cols, n]``: fp32 ``[rows, n]``, if ``HALF`` / ``SIDE.unit``."""
    if SIDE.has_codebook:
        out = _point_product(page, points, moving, SIDE, HALF)
    else:
        out = _plane_product(page, moving, SIDE, 0, HALF)
        if SIDE.num_planes == 2:
            out += _plane_product(page, moving, SIDE, 1, HALF)
    return out


@triton.jit
def _load(pointers, valid, MASKED: tl.constexpr):
    return tl.load(pointers, mask=valid, other=0) if MASKED else tl.load(pointers)


@triton.jit
def params(page, at, SIDE: tl.constexpr):
    """Scale and zero, fp32 ``[len(at), groups]``, of channels (``per_channel``) or tokens ``at``.

    What is called zero must be multiplied by ``SIDE.zero_factor``.
    """
    group = tl.arange(0, SIDE.groups)[None, :]
    index = group * SIDE.span + at[:, None]
    valid = (group < SIDE.real_groups) & (at < SIDE.span)[:, None]
    start = page + SIDE.params_offset
    MASKED: tl.constexpr = SIDE.is_padded
    if SIDE.per_channel or SIDE.symmetric:
        halves = start.to(tl.pointer_type(tl.float16)) + index
        scale = _load(halves, valid, MASKED).to(tl.float32)
        zero = scale
        if not SIDE.symmetric:
            zero = _load(halves + SIDE.real_groups * SIDE.span, valid, MASKED).to(tl.float32)
    else:
        both = _load(start.to(tl.pointer_type(tl.int32)) + index, valid, MASKED)
        scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def _by_group(at, SIDE: tl.constexpr):
    """Whether the token or channel ``at`` belongs to each group, ``[len(at), groups, 1]``."""
    return (at[:, None] // SIDE.group_size == tl.arange(0, SIDE.groups)[None, :])[:, :, None]


@triton.jit
def _dot(a, b, DTYPE: tl.constexpr):
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision="ieee")


@triton.jit
def _channel_scores(page, points, q, SIDE: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr):
    """K Q of a page with ``per_channel`` keys, fp32 ``[tokens, N]``, for ``q [channels, N]`` in stored order."""
    UNIT: tl.constexpr = SIDE.unit if HALF else 1.0
    OPERAND: tl.constexpr = tl.float16 if HALF else tl.float32
    scale, zero = params(page, _channel(tl.arange(0, SIDE.cols), SIDE), SIDE)
    if SIDE.groups == 1:
        out = _product(page, points, q * scale, SIDE, HALF) * UNIT
    else:
        moving = tl.reshape(q[:, None, :] * scale[:, :, None], (SIDE.cols, SIDE.groups * N))
        out = tl.reshape(_product(page, points, moving, SIDE, HALF) * UNIT, (SIDE.rows, SIDE.groups, N))
        out = tl.sum(tl.where(_by_group(tl.arange(0, SIDE.rows), SIDE), out, 0.0), 1)
    rows = tl.broadcast_to(tl.trans(zero)[:, None, :], (SIDE.groups, SIDE.rows // SIDE.groups, SIDE.cols))
    return out + SIDE.zero_factor * _dot(tl.reshape(rows, (SIDE.rows, SIDE.cols)), q, OPERAND)


@triton.jit
def _token_scores(page, points, q, SIDE: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr):
    """The same for ``per_token`` keys."""
    UNIT: tl.constexpr = SIDE.unit if HALF else 1.0
    scale, zero = params(page, tl.arange(0, SIDE.rows), SIDE)
    if SIDE.groups == 1:
        out = _product(page, points, q, SIDE, HALF) * (scale * UNIT) + zero * (SIDE.zero_factor * tl.sum(q, 0)[None, :])
    else:
        moving = tl.where(_by_group(_channel(tl.arange(0, SIDE.cols), SIDE), SIDE), q[:, None, :], 0.0)
        sums = SIDE.zero_factor * tl.sum(moving, 0)[None, :, :]
        out = _product(page, points, tl.reshape(moving, (SIDE.cols, SIDE.groups * N)), SIDE, HALF)
        out = tl.reshape(out, (SIDE.rows, SIDE.groups, N)) * (scale * UNIT)[:, :, None]
        out = tl.sum(out + zero[:, :, None] * sums, 1)
    return out


@triton.jit
def _channel_values(page, points, p, SIDE: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr):
    """V P of a page with ``per_channel`` values, fp32 ``[channels, N]``, for ``p [tokens, N]``."""
    UNIT: tl.constexpr = SIDE.unit if HALF else 1.0
    OPERAND: tl.constexpr = tl.float16 if HALF else tl.float32
    scale, zero = params(page, tl.arange(0, SIDE.rows), SIDE)
    high = p * 2.0**TOP
    if SIDE.groups == 1:
        out = _product(page, points, high, SIDE, HALF) * scale
    else:
        moving = tl.where(_by_group(tl.arange(0, SIDE.cols), SIDE), high[:, None, :], 0.0)
        out = _product(page, points, tl.reshape(moving, (SIDE.cols, SIDE.groups * N)), SIDE, HALF)
        out = tl.sum(tl.reshape(out, (SIDE.rows, SIDE.groups, N)) * scale[:, :, None], 1)
    cols = tl.broadcast_to(zero[:, :, None], (SIDE.rows, SIDE.groups, SIDE.cols // SIDE.groups))
    zeros = _dot(tl.reshape(cols, (SIDE.rows, SIDE.cols)), high, OPERAND)
    return (out * UNIT + zeros * SIDE.zero_factor) * 2.0**-TOP


@triton.jit
def _token_values(page, points, p, SIDE: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr):
    """The same for ``per_token`` values, without their zero points; and P times the zero points.

    The latter is ``[tokens, N]``, still to be summed over tokens, where there is one group, and ``[groups, N]`` else.
    """
    UNIT: tl.constexpr = SIDE.unit if HALF else 1.0
    scale, zero = params(page, tl.arange(0, SIDE.cols), SIDE)
    zero *= SIDE.zero_factor
    # The page's largest scale sets the power of two that keeps P times a scale among fp16's normal numbers.
    top = tl.maximum(_exponent(tl.max(tl.max(scale, 1), 0)), -24)
    scale *= _power(-top + (TOP - 1))
    if SIDE.groups == 1:
        out = _product(page, points, p * scale, SIDE, HALF)
        zeros = p * zero
    else:
        out = _product(
            page, points, tl.reshape(p[:, None, :] * scale[:, :, None], (SIDE.cols, SIDE.groups * N)), SIDE, HALF
        )
        out = tl.reshape(out, (SIDE.rows, SIDE.groups, N))
        out = tl.sum(tl.where(_by_group(tl.arange(0, SIDE.rows), SIDE), out, 0.0), 1)
        zeros = tl.sum(p[:, None, :] * zero[:, :, None], 0)
    return out * (UNIT * _power(top - (TOP - 1))), zeros


@triton.jit
def _raw_values(values, p, DTYPE: tl.constexpr):
    """V P, fp32 ``[channels, N]``, for plain ``values [tokens, channels]``."""
    return _dot(tl.trans(values), p * 2.0**TOP, DTYPE) * 2.0**-TOP


@triton.jit
def _raw_page(page, SIDE: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, DTYPE: tl.constexpr):
    """Elements of a passthrough side, ``[tokens, channels]``."""
    token = tl.arange(0, SIDE.tokens)[:, None]
    channel = tl.arange(0, HEAD_DIM_PAD)[None, :]
    elements = (page + SIDE.params_offset).to(tl.pointer_type(DTYPE)) + token * SIDE.head_dim + channel
    MASKED: tl.constexpr = SIDE.head_dim != HEAD_DIM_PAD
    return _load(elements, channel < SIDE.head_dim, MASKED)


@triton.jit
def _query(query, column_at, valid, channel, HEAD_DIM: tl.constexpr):
    """Q of one program's rows, fp32 ``[channels, N]``."""
    mask = (channel < HEAD_DIM)[:, None] & valid[None, :]
    return tl.load(query + column_at[None, :] + channel[:, None], mask=mask, other=0).to(tl.float32)


@triton.jit
def _base_2(scores, factor, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores for a softmax in base 2; ``factor [N]`` makes ``scores [tokens, N]`` natural ones."""
    if HAS_SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1
        scores = (tl.sigmoid(scores * (factor * (2.0 / softcap))[None, :]) - 0.5) * (2.0 * LOG2E * softcap)
    else:
        scores *= (factor * LOG2E)[None, :]
    return scores


@triton.jit
def _place(places, at, slot, reads, HAS_PLACES: tl.constexpr):
    """Places in the sequence of tokens ``at`` in ``places``, which count from the least number of their dtype."""
    if HAS_PLACES:
        stored = tl.load(places + at, mask=reads, other=0).to(tl.int64)
        slot = stored + (1 << (places.dtype.element_ty.primitive_bitwidth - 1))
    return slot


@triton.jit
def _masked(
    scores, mask, slot, query_slot, mask_at, mask_slot, reads, HAS_MASK: tl.constexpr, IS_BOOL: tl.constexpr
):  # fmt: skip
    """Base-2 scores ``[tokens, N]`` of ``slot`` under ``reads`` and the caller's mask, or causality without one.

    With a mask by place it is the place.
    """
    if HAS_MASK:
        at = mask_at[None, :] + slot.to(tl.int64)[:, None] * mask_slot
        own = tl.load(mask + at, mask=reads, other=0)
        if IS_BOOL:
            reads = reads & (own != 0)
        else:
            scores += own.to(tl.float32) * LOG2E
    else:
        reads = reads & (slot[:, None] <= query_slot[None, :])
    return tl.where(reads, scores, -float("inf"))


@triton.jit
def _softmax_step(scores, high, weight):
    """Weights of a block of scores, the new maxima and ``weight``, and what earlier results are multiplied by."""
    new = tl.maximum(high, tl.max(scores, 0))
    base = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(scores - base[None, :])
    decay = tl.exp2(high - base)
    return p, new, weight * decay[None, :] + p, decay


@triton.jit
def _exact_tile(elements, row, row_stride, reads, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr):
    """Tile ``[tokens, channels]`` of rows of one head's ``elements [tokens, channels]``."""
    channel = tl.arange(0, HEAD_DIM_PAD)[None, :]
    at = row.to(tl.int64)[:, None] * row_stride + channel
    return tl.load(elements + at, mask=reads[:, None] & (channel < HEAD_DIM), other=0)


@triton.jit
def _exact_tokens(
    out, high, weight, plain, factor, softcap, key, value, row_stride, first_row, ring, first, last, first_slot,
    boundary, valid, query_slot, mask, mask_at, mask_slot, places, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_READS: tl.constexpr, HAS_MASK: tl.constexpr,
    IS_BOOL: tl.constexpr, HAS_PLACES: tl.constexpr, IS_RING: tl.constexpr,
):  # fmt: skip
    """Take the exact tokens from ``first`` up to ``last`` into the softmax; token 0 is slot ``first_slot``.

    It is row 0, or of a ring of so many rows ``first_row``.
    """
    HEAD_DIM_PAD: tl.constexpr = plain.shape[0]
    for start in tl.range(first, last, TOKENS, num_stages=1):
        at = start + tl.arange(0, TOKENS)
        row = (first_row + at) % ring if IS_RING else at
        keys = _exact_tile(key, row, row_stride, at < last, HEAD_DIM, HEAD_DIM_PAD)
        scores = _base_2(_dot(keys, plain, DTYPE), factor, softcap, HAS_SOFTCAP)
        reads = valid[None, :] & (at < last)[:, None]
        if HAS_READS:
            slot = first_slot + at
            reads = reads & (slot[:, None] >= boundary[None, :])
            slot = _place(places, slot, slot, at < last, HAS_PLACES)
            scores = _masked(scores, mask, slot, query_slot, mask_at, mask_slot, reads, HAS_MASK, IS_BOOL)
        else:
            scores = tl.where(reads, scores, -float("inf"))
        p, high, weight, decay = _softmax_step(scores, high, weight)
        values = _exact_tile(value, row, row_stride, at < last, HEAD_DIM, HEAD_DIM_PAD)
        out = out * decay[None, :] + _raw_values(values, p, DTYPE)
    return out, high, weight


@triton.jit(
    do_not_specialize=[
        "length", "sinks", "tail", "num_pages", "share", "first_exact", "exact_share", "table_batch",
        "mask_batch", "mask_head", "mask_query", "mask_slot", "place_batch", "place_head", "exact_batch", "exact_head",
        "splits",
    ]
)  # fmt: skip
def attend_split(
    partial, stats, query, data, key_points, value_points, heads, sink_key, sink_value, tail_key, tail_value, visible,
    mask, extents, page_places, exact_places, table, state,
    query_batch, query_head, query_row, data_batch, data_head, data_page, sink_batch, sink_head, sink_token,
    tail_batch, tail_head, tail_token, table_batch, mask_batch, mask_head, mask_query, mask_slot,
    place_batch, place_head, exact_batch, exact_head,
    length, sinks, tail, num_pages, share, first_exact, exact_share, splits, scaling, softcap,
    KEY: tl.constexpr, VALUE: tl.constexpr, DTYPE: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr,
    QUERIES: tl.constexpr, N: tl.constexpr, PADDED_ROWS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_READS: tl.constexpr, HAS_MASK: tl.constexpr, IS_BOOL: tl.constexpr, HAS_EXTENTS: tl.constexpr,
    HAS_PLACES: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_STATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Unnormalised attention of the rows of one KV head over one split of its pages, or of the exact tokens.

    Grid: (splits, heads of this layout x row tiles, batch). Splits below ``first_exact`` take ``share`` pages each, the
    others ``exact_share`` tokens of the tail each, and the first of them the sinks. A row is a query of a query head,
    queries fastest. ``key_points`` and ``value_points``, fp16, are read where a side has a codebook. ``extents [batch,
    heads of this layout, 2]`` are the first record of a head and how many pages it has before those that have slots;
    splits then share out the pages there are. With places, ``mask`` is by place. ``table [batch, pages]`` names the
    records of a sequence. ``state [batch, 2]`` has (tokens, pages) of each sequence in place of the numbers, and the
    tail is then a ring, see `kvloom.pages.StaticKV`. Writes, in fp32, ``partial [batch, kv_heads, splits, PADDED_ROWS,
    head_dim]`` and, maximum in base 2 and sum, ``stats [batch, kv_heads, splits, 2, PADDED_ROWS]``.
    """
    HALF: tl.constexpr = DTYPE.primitive_bitwidth == 16
    HEAD_DIM: tl.constexpr = KEY.head_dim
    HEAD_DIM_PAD: tl.constexpr = VALUE.rows
    TOKENS: tl.constexpr = KEY.rows
    ROWS: tl.constexpr = HEADS * QUERIES
    ROW_TILES: tl.constexpr = (ROWS + N - 1) // N
    split, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    local = tl.program_id(1) // ROW_TILES
    head = tl.load(heads + local)
    row = tl.program_id(1) % ROW_TILES * N + tl.arange(0, N)
    valid = row < ROWS
    ring, tail_row = tail, 0
    if HAS_STATE:
        length, num_pages = tl.load(state + 2 * batch), tl.load(state + 2 * batch + 1)
        sinks = tl.minimum(sinks, length)
        tail = length - sinks - num_pages * TOKENS
        tail_row = num_pages * TOKENS % ring
        share = (num_pages + first_exact - 1) // first_exact
    query_index = row % QUERIES
    query_slot = length - QUERIES + query_index
    of_head = head * HEADS + row // QUERIES
    query_at = batch * query_batch + of_head * query_head + query_index * query_row
    mask_at = batch * mask_batch + of_head * mask_head + query_index.to(tl.int64) * mask_query
    boundary = query_slot
    if HAS_READS:
        if HAS_STATE:
            boundary = sinks + num_pages * TOKENS + 0 * query_index
        else:
            boundary = sinks + tl.load(visible + query_index).to(tl.int32) * TOKENS

    channel = tl.arange(0, KEY.cols)
    plain = _query(query, query_at, valid, channel, HEAD_DIM)
    # Rows are moved by a power of two to where they stay within fp16 times any scale and the weight of a plane.
    magnitude = _exponent(tl.max(tl.abs(plain), 0)) + (1 - KEY.headroom)
    plain *= _power(-magnitude)[None, :]
    factor = _power(magnitude) * scaling
    stored = plain
    if not KEY.is_raw:
        stored = _query(query, query_at, valid, _channel(channel, KEY), HEAD_DIM) * _power(-magnitude)[None, :]

    high = tl.full((N,), -float("inf"), tl.float32)
    weight = tl.full((TOKENS, N), 0.0, tl.float32)
    out = tl.full((HEAD_DIM_PAD, N), 0.0, tl.float32)
    zeros = tl.full((VALUE.cols if VALUE.groups == 1 else VALUE.groups, N), 0.0, tl.float32)
    token = tl.arange(0, TOKENS)

    earlier = 0
    if HAS_EXTENTS:
        extent = extents + (batch * (tl.num_programs(1) // ROW_TILES) + local) * 2
        record, earlier = tl.load(extent).to(tl.int64), tl.load(extent + 1)
        num_pages += earlier
        share = (num_pages + first_exact - 1) // first_exact
        data += record * data_page
        page_places += batch * place_batch + local.to(tl.int64) * place_head + record * TOKENS
    if HAS_PLACES:
        exact_places += batch * exact_batch + head.to(tl.int64) * exact_head
    first = split * share
    last = tl.where(split < first_exact, tl.minimum(first + share, num_pages), first)
    records = data + batch * data_batch + local.to(tl.int64) * data_head
    page = records + first.to(tl.int64) * data_page
    for index in tl.range(first, last, num_stages=STAGES):
        if HAS_TABLE:
            page = records + tl.load(table + batch * table_batch + index).to(tl.int64) * data_page
        if KEY.is_raw:
            scores = _dot(_raw_page(page, KEY, HEAD_DIM_PAD, DTYPE), plain, DTYPE)
        elif KEY.per_channel:
            scores = _channel_scores(page, key_points, stored, KEY, N, HALF)
        else:
            scores = _token_scores(page, key_points, stored, KEY, N, HALF)
        scores = _base_2(scores, factor, softcap, HAS_SOFTCAP)
        if HAS_READS:
            slot = sinks + (index - earlier) * TOKENS + token
            reads = valid[None, :] & (slot[:, None] < boundary[None, :])
            slot = _place(page_places, index * TOKENS + token, slot, token < TOKENS, HAS_PLACES)
            scores = _masked(scores, mask, slot, query_slot, mask_at, mask_slot, reads, HAS_MASK, IS_BOOL)
        p, high, weight, decay = _softmax_step(scores, high, weight)
        out *= decay[None, :]
        if VALUE.is_raw:
            out += _raw_values(_raw_page(page, VALUE, HEAD_DIM_PAD, DTYPE), p, DTYPE)
        elif VALUE.per_channel:
            out += _channel_values(page, value_points, p, VALUE, N, HALF)
        else:
            own, own_zeros = _token_values(page, value_points, p, VALUE, N, HALF)
            out += own
            zeros = zeros * decay[None, :] + own_zeros
        if not HAS_TABLE:
            page += data_page
    if VALUE.groups == 1:
        out += tl.sum(zeros, 0)[None, :]
    else:
        out += tl.sum(tl.where(_by_group(tl.arange(0, VALUE.rows), VALUE), zeros[None, :, :], 0.0), 1)

    of_batch = batch * KV_HEADS + head
    last = tl.where(split == first_exact, sinks, 0)
    at = batch * sink_batch + head.to(tl.int64) * sink_head
    out, high, weight = _exact_tokens(
        out, high, weight, plain, factor, softcap, sink_key + at, sink_value + at, sink_token, 0, sinks, 0, last, 0,
        query_slot * 0, valid, query_slot, mask, mask_at, mask_slot, exact_places, TOKENS, HEAD_DIM, DTYPE, HAS_SOFTCAP,
        HAS_READS, HAS_MASK, IS_BOOL, HAS_PLACES, False,
    )  # fmt: skip
    at = batch * tail_batch + head.to(tl.int64) * tail_head
    first = tl.maximum(split - first_exact, 0) * exact_share
    last = tl.where(split < first_exact, first, tl.minimum(first + exact_share, tail))
    out, high, weight = _exact_tokens(
        out, high, weight, plain, factor, softcap, tail_key + at, tail_value + at, tail_token, tail_row, ring, first,
        last, length - tail, boundary, valid, query_slot, mask, mask_at, mask_slot, exact_places, TOKENS, HEAD_DIM,
        DTYPE, HAS_SOFTCAP, HAS_READS, HAS_MASK, IS_BOOL, HAS_PLACES, HAS_STATE,
    )  # fmt: skip

    base = (of_batch * splits + split) * PADDED_ROWS
    channel = tl.arange(0, HEAD_DIM_PAD)
    tl.store(partial + (base + row)[None, :] * HEAD_DIM + channel[:, None], out, mask=(channel < HEAD_DIM)[:, None])
    tl.store(stats + base * 2 + row, high)
    tl.store(stats + base * 2 + PADDED_ROWS + row, tl.sum(weight, 0))


@triton.jit(do_not_specialize=["splits"])
def combine_splits(
    out, partial, stats, sink_logits, splits,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, PADDED_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, SPLITS: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """One softmax out of the splits of `attend_split`. Grid: (rows, kv_heads, batch).

    Writes ``out [batch, queries, query_heads, head_dim]``; a row that read nothing becomes zeros.
    """
    BLOCK: tl.constexpr = 16
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    of_head = head * HEADS + row // QUERIES
    base = (batch * KV_HEADS + head) * splits
    split = tl.arange(0, SPLITS)
    stat = stats + (base + split) * (2 * PADDED_ROWS) + row
    high = tl.load(stat, mask=split < splits, other=-float("inf"))
    weight = tl.load(stat + PADDED_ROWS, mask=split < splits, other=0.0)
    top = tl.max(high, 0)
    if HAS_SINK:
        sink = tl.load(sink_logits + of_head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(weight * tl.exp2(high - top), 0)
    if HAS_SINK:
        total += tl.exp2(sink - top)
    channel = tl.arange(0, HEAD_DIM_PAD)
    result = tl.full((HEAD_DIM_PAD,), 0.0, tl.float32)
    for start in range(0, splits, BLOCK):
        some = start + tl.arange(0, BLOCK)
        own = tl.load(stats + (base + some) * (2 * PADDED_ROWS) + row, mask=some < splits, other=-float("inf"))
        at = ((base + some) * PADDED_ROWS + row)[:, None] * HEAD_DIM + channel[None, :]
        part = tl.load(partial + at, mask=(some < splits)[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
        result += tl.sum(part * tl.exp2(own - top)[:, None], 0)
    result = result / tl.where(total == 0.0, 1.0, total)
    to = ((batch * QUERIES + row % QUERIES) * (KV_HEADS * HEADS) + of_head) * HEAD_DIM + channel
    tl.store(out + to, result.to(out.dtype.element_ty), mask=channel < HEAD_DIM)
