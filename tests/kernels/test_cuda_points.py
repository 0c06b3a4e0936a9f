"""The look-up of codebooks in attend.cu, instruction by instruction in plain Python, against the layout of pages."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from kvloom.kernels._points import has_codebook, point_arguments
from kvloom.pages import Format, SideLayout, pack_side, page_layout
from tests.kernels.codebooks import CASES, codebook_formats


def permuted(a: int, b: int, by: int) -> int:
    """The instruction ``prmt``, in its default mode."""
    both = a | b << 32
    picked = [both >> 8 * (by >> 4 * i & 7) & 255 for i in range(4)]
    assert all(by >> 4 * i & 8 == 0 for i in range(4)), "the top bit of a selector repeats a sign"
    return sum(byte << 8 * i for i, byte in enumerate(picked))


def nibbles(word: int, place: int, bits: int) -> int:
    """``Plane::nibbles`` for the pair at bit ``place`` of a word and the next."""
    byte = place // 8
    if bits < 4:
        mask, first, second = (2**bits - 1) * 0x01010101, place % 8, place % 8 + bits - 4
        moved = word >> second if second >= 0 else word << -second
        word = (word >> first & mask) | (moved & mask << 4)
    return permuted(word & 0xFFFFFFFF, 0, byte + (byte + 2) * 16)


def looked_up(codes: int, bits: int, low: list[int], high: list[int]) -> tuple[int, int]:
    """``Points::of``."""
    if bits < 4:
        parts = [permuted(table[0], table[1], codes & 0xFFFF) for table in (low, high)]
    else:
        index, upper = codes & 0x7777, permuted(0xFF00, 0, codes >> 3 & 0x1111)
        parts = [
            (permuted(table[0], table[1], index) & ~upper) | (permuted(table[2], table[3], index) & upper)
            for table in (low, high)
        ]
    return permuted(*parts, 0x5140), permuted(*parts, 0x7362)


def operands(data: bytes, side: SideLayout, lane: int, row_half: int, tile: int, step: int) -> list[float]:
    """What a lane gets of a row for the pairs ``2 * step`` and the next: low halves of both, then high halves."""
    codes = 0
    for plane in side.planes:
        pairs, per_word = plane.cols // 8, 16 // plane.bits
        words = plane.tiles_per_chunk * 2 * pairs // per_word
        chunk, own = divmod(tile, plane.tiles_per_chunk)
        at = (2 * own + row_half) * pairs + 2 * step
        start = plane.offset - side.offset + 4 * ((chunk * 32 + lane) * words + at // per_word)
        (word,) = struct.unpack("<I", data[start : start + 4])
        codes |= nibbles(word, at % per_word * plane.bits, plane.bits) << plane.shift
    table = struct.unpack("<8I", b"".join(struct.pack("<q", number.value) for number in point_arguments(side)))
    registers = looked_up(codes, side.fmt.bits, list(table[:4]), list(table[4:]))
    return [float(x) for x in np.array(registers, dtype=np.uint32).view(np.float16)]


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("case", range(CASES))
def test_every_lane_gets_the_points_of_its_codes(case: int, head_dim: int) -> None:
    layout = page_layout(*codebook_formats(case, head_dim), head_dim)
    generator = torch.Generator().manual_seed(case)
    for side in (layout.key, layout.value):
        fmt = side.fmt
        codes = torch.randint(2**fmt.bits, (side.page_tokens, head_dim), generator=generator).byte()
        shape = (side.groups, head_dim) if fmt.grouping == "per_channel" else (side.page_tokens, side.groups)
        params = (torch.ones(shape, dtype=torch.float16),) * fmt.num_params
        data = pack_side(codes, params, side).numpy().tobytes()
        matrix = codes if side.role == "key" else codes.T
        for lane in (0, 5, 30):
            g, t = divmod(lane, 4)
            for tile in range(side.rows // 16):
                for row_half in range(2):
                    for step in range(side.cols // 16):
                        first = 2 * step
                        if side.role == "key":
                            columns = [t * (head_dim // 4) + 2 * (first + i) + h for h in range(2) for i in range(2)]
                        else:
                            columns = [8 * (first + i) + 2 * t + h for h in range(2) for i in range(2)]
                        row = matrix[16 * tile + 8 * row_half + g]
                        expected = [fmt.points[int(row[column])] for column in columns]
                        assert operands(data, side, lane, row_half, tile, step) == expected


def test_arguments_are_low_bytes_then_high_bytes() -> None:
    side = page_layout(Format(2, "per_token", 64, True, "lloyd"), Format(2, "per_token", 64), 64).key
    halves = struct.pack("<4e", *side.fmt.points)
    given = b"".join(struct.pack("<q", number.value) for number in point_arguments(side))
    assert given == halves[::2] + bytes(12) + halves[1::2] + bytes(12)


def test_affine_sides_have_no_points() -> None:
    side = page_layout(Format(2, "per_token", 64), Format(16, "per_token", 64), 64).value
    assert not has_codebook(side)
    assert [number.value for number in point_arguments(side)] == [0, 0, 0, 0]
