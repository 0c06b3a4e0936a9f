# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""Triton kernels that write and read pages: parameters, codes, and back to dense.

Every operation is the reference's (that of `kvloom.codecs`' affine format where pages are written), in fp32 and in the
same order, so the bytes are its bytes. No product is added to anything inexactly: codes and levels have 8 bits, points
and scales 11, so a fused multiply-add rounds as the two operations do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels._triton_attend import unit_and_place

FP16_MAX = tl.constexpr(65504.0)
# Adding and taking away 1.5 * 2**23 rounds |x| < 2**22 to the nearest integer, ties to even.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _fp16_up(x):
    """Bits of the smallest fp16 number not below ``x >= 0``, at most 65504."""
    near = tl.minimum(x, FP16_MAX).to(tl.float16)
    bits = near.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(near.to(tl.float32) < x, tl.minimum(bits + 1, 0x7BFF), bits)


@triton.jit
def _fp16_down(x):
    """Bits of the largest fp16 number not above ``x`` of at least -65504."""
    near = x.to(tl.float16)
    bits = near.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    # Towards minus infinity: away from zero among negative numbers (and -0.0), else down, from 0.0 to the first below.
    below = tl.where(bits >= 0x8000, bits + 1, tl.where(bits == 0, 0x8001, bits - 1))
    return tl.where(near.to(tl.float32) > x, below, bits)


@triton.jit
def _half(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def encode_params(
    x, data, flag, x_batch, x_head, x_token, data_batch, data_head, data_page,
    SIDE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scales and zero points of one side, fp16, written to their place in the records.

    Grid: (pages x groups x BLOCKS, heads, batch); a program has ``TOKENS`` tokens by ``CHANNELS`` channels, both powers
    of two: a whole group (and padding) along the grouped axis and one of ``BLOCKS`` blocks along the other. ``flag``,
    int32, becomes 1 if an element is not a number of at most 65504.
    """
    block = tl.program_id(0) % BLOCKS
    group = tl.program_id(0) // BLOCKS % SIDE.real_groups
    page = (tl.program_id(0) // BLOCKS // SIDE.real_groups).to(tl.int64)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token, channel = tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    if SIDE.per_channel:
        token += group * SIDE.group_size
        channel += block * CHANNELS
        index, real = group * SIDE.span + channel, channel < SIDE.span
        valid = (token >= 0)[:, None] & real[None, :]
    else:
        valid = (token >= 0)[:, None] & (channel < SIDE.group_size)[None, :]
        token += block * TOKENS
        channel += group * SIDE.group_size
        index, real = group * SIDE.span + token, token < SIDE.span
    at = batch * x_batch + head * x_head + (page * SIDE.tokens + token)[:, None] * x_token + channel[None, :]
    values = tl.load(x + at, mask=valid, other=0).to(tl.float32)
    is_fine = (tl.abs(values) <= FP16_MAX) | (valid == 0)
    if tl.min(tl.min(is_fine.to(tl.int32), 1), 0) == 0:
        tl.store(flag, 1)
    AXIS: tl.constexpr = 0 if SIDE.per_channel else 1
    low = tl.min(tl.where(valid, values, float("inf")), AXIS)
    high = tl.max(tl.where(valid, values, -float("inf")), AXIS)
    low, high = tl.where(real, low, 0.0), tl.where(real, high, 0.0)
    record = data + batch * data_batch + head * data_head + page * data_page + SIDE.params_offset
    halves = record.to(tl.pointer_type(tl.float16))
    if SIDE.symmetric:
        FACTOR: tl.constexpr = 2.0 / SIDE.levels
        tl.store(halves + index, _half(_fp16_up(tl.maximum(tl.abs(low), tl.abs(high)) * FACTOR)), mask=real)
    else:
        zero = _half(_fp16_down(low))
        scale = _half(
            _fp16_up(tl.math.div_rn(high - zero.to(tl.float32), tl.full(high.shape, SIDE.levels, tl.float32)))
        )
        if SIDE.per_channel:
            tl.store(halves + index, scale, mask=real)
            tl.store(halves + SIDE.real_groups * SIDE.span + index, zero, mask=real)
        else:
            tl.store(halves + index * 2, scale, mask=real)
            tl.store(halves + index * 2 + 1, zero, mask=real)


@triton.jit
def _scale_and_zero(record, token, channel, valid, SIDE: tl.constexpr):
    """Parameters of single elements, fp32, gathered from a record."""
    halves = (record + SIDE.params_offset).to(tl.pointer_type(tl.float16))
    if SIDE.per_channel:
        index = token // SIDE.group_size * SIDE.span + channel
        scale = tl.load(halves + index, mask=valid, other=0).to(tl.float32)
        if not SIDE.symmetric:
            zero = tl.load(halves + SIDE.real_groups * SIDE.span + index, mask=valid, other=0).to(tl.float32)
    else:
        index = channel // SIDE.group_size * SIDE.span + token
        STEP: tl.constexpr = 1 if SIDE.symmetric else 2
        scale = tl.load(halves + index * STEP, mask=valid, other=0).to(tl.float32)
        if not SIDE.symmetric:
            zero = tl.load(halves + index * STEP + 1, mask=valid, other=0).to(tl.float32)
    if SIDE.symmetric:
        zero = scale * SIDE.zero_factor
    return scale, zero


@triton.jit
def encode_plane(
    x, data, x_batch, x_head, x_token, data_batch, data_head, data_page,
    SIDE: tl.constexpr, INDEX: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """One bit plane, ``UNITS`` 16-bit units a program; the parameters are in the records already.

    Grid: (pages x blocks of units, heads, batch).
    """
    PLANE: tl.constexpr = SIDE.planes[INDEX]
    BLOCKS: tl.constexpr = (PLANE.units + UNITS - 1) // UNITS
    page, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    unit = block * UNITS + tl.arange(0, UNITS)
    word, h = unit // 2, unit % 2
    lane, chunk = word // PLANE.words % 32, word // PLANE.words // 32
    field = tl.arange(0, PLANE.fields)
    sequence = (word % PLANE.words * PLANE.fields)[:, None] + field[None, :]
    stream, pair = sequence // PLANE.pairs, sequence % PLANE.pairs
    row = (chunk * PLANE.chunk_tiles)[:, None] * 16 + stream * 8 + (lane // 4)[:, None]
    if SIDE.is_key:
        token, channel = row, (lane % 4 * (SIDE.head_dim // 4) + h)[:, None] + 2 * pair
    else:
        token, channel = (lane % 4 * 2 + h)[:, None] + 8 * pair, row
    valid = (unit < PLANE.units)[:, None] & (field >= 0)[None, :]
    record = data + batch * data_batch + head * data_head + page.to(tl.int64) * data_page
    scale, zero = _scale_and_zero(record, token, channel, valid, SIDE)
    slot = page.to(tl.int64) * SIDE.tokens + token
    values = tl.load(x + batch * x_batch + head * x_head + slot * x_token + channel, mask=valid, other=0).to(tl.float32)
    ratio = tl.where(scale > 0, tl.math.div_rn(values - zero, tl.where(scale > 0, scale, 1.0)), 0.0)
    codes = tl.minimum(tl.maximum((ratio + ROUND) - ROUND, 0.0), SIDE.levels).to(tl.int32)
    fields = ((codes >> PLANE.shift) & PLANE.mask) << (field * PLANE.bits)[None, :]
    to = (record + PLANE.offset).to(tl.pointer_type(tl.int16)) + unit
    tl.store(to, tl.sum(fields, 1).to(tl.int16), mask=unit < PLANE.units)


@triton.jit(do_not_specialize=["tokens"])
def decode_side(
    out, data, points, table, data_batch, data_head, data_page, table_batch, tokens,
    SIDE: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Dense elements ``out [batch, heads, tokens, head_dim]`` of one side, ``TOKENS`` tokens a program.

    ``points``, fp16, are those of the codebook, if there is one. ``table [batch, pages]`` names the records, if asked.

    Grid: (blocks of tokens, heads, batch); ``TOKENS`` divides a page.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * TOKENS
    page = start // SIDE.tokens
    token = (start % SIDE.tokens + tl.arange(0, TOKENS))[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    valid = (token >= 0) & (channel < SIDE.head_dim)
    if HAS_TABLE:
        page = tl.load(table + batch * table_batch + page)
    record = data + batch * data_batch + head * data_head + page.to(tl.int64) * data_page
    codes = tl.full((TOKENS, CHANNELS), 0, tl.int32)
    for index in tl.static_range(2):
        if index < SIDE.num_planes:
            codes |= _plane_codes(record, token, channel, valid, SIDE, index)
    scale, zero = _scale_and_zero(record, token, channel, valid, SIDE)
    if SIDE.has_codebook:
        values = tl.load(points + codes).to(tl.float32) * scale + zero
    else:
        values = codes.to(tl.float32) * scale + zero
    if out.dtype.element_ty == tl.float16:
        values = tl.minimum(tl.maximum(values, -FP16_MAX), FP16_MAX)
    to = (batch * HEADS + head) * tokens * SIDE.head_dim + (start + tl.arange(0, TOKENS))[:, None] * SIDE.head_dim
    tl.store(out + to + channel, values.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _plane_codes(record, token, channel, valid, SIDE: tl.constexpr, INDEX: tl.constexpr):
    """One plane's part of the codes of single elements, int32."""
    PLANE: tl.constexpr = SIDE.planes[INDEX]
    if SIDE.is_key:
        QUARTER: tl.constexpr = SIDE.head_dim // 4
        t, within = channel // QUARTER, channel % QUARTER
        unit, place = unit_and_place(token, within // 2, t, within % 2, PLANE)
    else:
        unit, place = unit_and_place(channel, token // 8, token % 8 // 2, token % 2, PLANE)
    units = tl.load((record + PLANE.offset).to(tl.pointer_type(tl.int16)) + unit, mask=valid, other=0)
    return ((units.to(tl.int32) >> place) & PLANE.mask) << PLANE.shift
