"""The slow, obvious encoder: one element at a time, straight from the format's description."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvloom.pages import Format

f32, f16 = np.float32, np.float16


def fp16_down(x: np.float32) -> np.float16:
    h = f16(x)
    return np.nextafter(h, f16(-np.inf)) if f32(h) > x else h


def fp16_up(x: np.float32) -> np.float16:
    h = f16(x)
    return np.nextafter(h, f16(np.inf)) if f32(h) < x else h


def encode_group(values: list[np.float32], fmt: Format) -> tuple[list[int], list[np.float16]]:
    levels = f32(2**fmt.bits - 1)
    if fmt.symmetric:
        scale = fp16_up(f32(max(abs(v) for v in values)) * f32(2.0 / levels))
        zero, params = f32(scale) * f32(-0.5 * levels), [scale]
    else:
        low = fp16_down(min(values))
        scale = fp16_up((max(values) - f32(low)) / levels)
        zero, params = f32(low), [scale, low]
    if scale == 0:
        return [0] * len(values), params
    return [int(np.clip(np.rint((v - zero) / f32(scale)), 0, levels)) for v in values], params


def put(page: bytearray, bit: int, width: int, value: int) -> None:
    for i in range(width):
        page[(bit + i) // 8] |= (value >> i & 1) << (bit + i) % 8


def fragment_bit(role: str, rows: int, cols: int, bits: int, row: int, col: int) -> int:
    """First bit of element (row, col) of a plane, from the text of the format."""
    tile, row_half, g = row // 16, row % 16 // 8, row % 8
    half = col % 2
    if role == "key":  # thread t holds channels t*cols/4 .. (t+1)*cols/4 - 1
        t, pair = col // (cols // 4), col % (cols // 4) // 2
    else:  # field index f = 2*mtile + a; token = 16*mtile + 8*a + 2*t + h
        t, pair = col % 8 // 2, col // 8
    lane = 4 * g + t
    pairs, per_word = cols // 8, 16 // bits
    chunks = [n for n in range(1, rows // 16 + 1) if rows // 16 % n == 0]
    tiles = next(n for load in (16, 8, 4) for n in chunks if n * cols * bits % (16 * load) == 0)
    words_per_lane = tiles * 2 * pairs // per_word
    sequence = (tile % tiles * 2 + row_half) * pairs + pair
    word = (tile // tiles * 32 + lane) * words_per_lane + sequence // per_word
    return 32 * word + bits * (sequence % per_word) + 16 * half


def split_outliers(x: np.ndarray, fmt: Format, count: int) -> tuple[dict[int, float], np.ndarray]:
    """Outliers of ``x`` [tokens, channels] by index, and the page with medians in their places."""
    tokens, channels = x.shape
    size, outside = fmt.group_size, max(1, fmt.group_size // 16)
    dense, distance, median = x.copy(), {}, {}
    for t in range(tokens):
        for c in range(channels):
            if fmt.grouping == "per_channel":
                group = sorted(x[t // size * size : (t // size + 1) * size, c])
            else:
                group = sorted(x[t, c // size * size : (c // size + 1) * size])
            distance[t * channels + c] = max(group[outside] - x[t, c], x[t, c] - group[-1 - outside])
            median[t * channels + c] = group[(size - 1) // 2]
    chosen = sorted(distance, key=lambda at: (-distance[at], at))[:count]
    for at in chosen:
        dense[divmod(at, channels)] = median[at]
    return {at: float(x[divmod(at, channels)]) for at in sorted(chosen)}, dense


def encode_outliers(outliers: dict[int, float]) -> bytes:
    return np.array(list(outliers), dtype=np.uint16).tobytes() + np.array(list(outliers.values()), dtype=f16).tobytes()


def encode_side(x: np.ndarray, role: str, fmt: Format) -> bytes:
    """Bytes of one side of a page from ``x`` [tokens, channels] float32."""
    tokens, channels = x.shape
    size = fmt.group_size
    if fmt.outliers:
        asked = fmt.outliers * tokens * channels
        count = min(range(4, tokens * channels, 4), key=lambda n: abs(n - asked))
        kept, x = split_outliers(x, fmt, count)
        return encode_side(x, role, replace(fmt, outliers=0.0)) + encode_outliers(kept)
    codes = np.zeros((tokens, channels), dtype=int)
    if fmt.grouping == "per_channel":
        params = np.zeros((fmt.num_params, tokens // size, channels), dtype=f16)
        for group in range(tokens // size):
            for c in range(channels):
                span = range(group * size, (group + 1) * size)
                found, numbers = encode_group([x[t, c] for t in span], fmt)
                for t, code in zip(span, found, strict=True):
                    codes[t, c] = code
                params[:, group, c] = numbers
    else:
        params = np.zeros((channels // size, tokens, fmt.num_params), dtype=f16)
        for t in range(tokens):
            for group in range(channels // size):
                span = range(group * size, (group + 1) * size)
                found, numbers = encode_group([x[t, c] for c in span], fmt)
                for c, code in zip(span, found, strict=True):
                    codes[t, c] = code
                params[group, t, :] = numbers
    out = b""
    shift = 0
    matrix = codes if role == "key" else codes.T
    for bits in {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}[fmt.bits]:
        plane = bytearray(tokens * channels * bits // 8)
        for row in range(matrix.shape[0]):
            for col in range(matrix.shape[1]):
                value = int(matrix[row, col]) >> shift & (2**bits - 1)
                put(plane, fragment_bit(role, *matrix.shape, bits, row, col), bits, value)
        out += bytes(plane)
        shift += bits
    return out + params.tobytes()
